package gate

import (
	"net"
	"net/netip"
	"sync"
)

// Connections an outsider can hold: he needs an open window for the first, and no administrator needs this many.
const (
	perSource = 32
	overall   = 4096
)

// capped bounds connections at a time, for each source and for all together. One too many is closed before its TLS
// handshake.
type capped struct {
	net.Listener
	mu    sync.Mutex
	held  map[netip.Addr]int
	total int
}

func newCapped(l net.Listener) *capped { return &capped{Listener: l, held: map[netip.Addr]int{}} }

func (l *capped) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		source := addrPort(c.RemoteAddr()).Addr()
		if l.take(source) {
			return &counted{Conn: c, done: func() { l.put(source) }}, nil
		}
		c.Close()
	}
}

func (l *capped) take(a netip.Addr) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.held[a] >= perSource || l.total >= overall {
		return false
	}
	l.held[a]++
	l.total++
	return true
}

func (l *capped) put(a netip.Addr) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.total--
	if l.held[a]--; l.held[a] == 0 {
		delete(l.held, a)
	}
}

type counted struct {
	net.Conn
	once sync.Once
	done func()
}

func (c *counted) Close() error {
	c.once.Do(c.done)
	return c.Conn.Close()
}

// addrPort is a TCP address as netip has it, IPv4 unmapped.
func addrPort(a net.Addr) netip.AddrPort {
	t, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	p := t.AddrPort()
	return netip.AddrPortFrom(p.Addr().Unmap(), p.Port())
}
