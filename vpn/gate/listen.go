package gate

import (
	"context"
	"crypto/tls"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"perimeterd/vpn"

	"golang.org/x/time/rate"
)

// Connections an outsider can hold: he needs an open window for the first, and no administrator needs this many.
const (
	perSource = 32
	// Without a finished handshake, which may buffer a quarter of a megabyte each: so many in all, and half of them for
	// sources that knocked by token. Whoever knows a sequence, which is no secret for long, cannot shut the others out.
	unfinished = 256
	reserved   = unfinished / 2
	overall    = 4096
	// What the kernel may hold of one, bytes each way.
	socketBuffer = 64 << 10
)

// capped bounds connections at a time, for each source and for all together. One too many is closed before its TLS
// handshake.
type capped struct {
	net.Listener
	known   func(netip.Addr) bool
	callers *callers

	mu      sync.Mutex
	held    map[netip.Addr]int
	total   int
	pending int // of total: the handshake is not finished
}

func newCapped(l net.Listener, known func(netip.Addr) bool, callers *callers) *capped {
	return &capped{Listener: l, known: known, callers: callers, held: map[netip.Addr]int{}}
}

func (l *capped) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		source := addrPort(c.RemoteAddr()).Addr()
		if l.take(source) {
			if t, ok := c.(*net.TCPConn); ok { // requests and answers are small; a caller who reads nothing is felt soon
				t.SetReadBuffer(socketBuffer)
				t.SetWriteBuffer(socketBuffer)
				if raw, err := t.SyscallConn(); err == nil {
					_ = vpn.Impatient(raw)
				}
			}
			return &counted{Conn: c, list: l, known: l.callers, source: source}, nil
		}
		c.Close()
	}
}

func (l *capped) take(a netip.Addr) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.held[a] >= perSource || l.total >= overall || l.pending >= unfinished || l.pending >= unfinished-reserved && !l.known(a) {
		return false
	}
	l.held[a]++
	l.total++
	l.pending++
	return true
}

type counted struct {
	net.Conn
	list   *capped
	known  *callers
	source netip.Addr
	state  atomic.Int32 // 0 in its handshake, 1 past it, 2 closed
	freed  atomic.Bool  // not among the source's any more
}

// callers knows who is behind each connection past its handshake.
type callers struct {
	mu sync.Mutex
	by map[*counted]caller
}

type caller struct {
	certificate [32]byte
	state       tls.ConnectionState
}

// note is for a connection whose certificate was accepted. One that is closed already is not kept.
func (k *callers) note(c *counted, who caller) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if c.state.Load() != 2 {
		k.by[c] = who
	}
}

func (k *callers) forget(c *counted) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.by, c)
}

// cut resets the connections of those whom out names.
func (k *callers) cut(out func(caller) bool) {
	k.mu.Lock()
	all := maps.Clone(k.by)
	k.mu.Unlock()
	for c, who := range all {
		if out(who) {
			c.reset()
		}
	}
}

// reset closes the connection with RST.
func (c *counted) reset() {
	if t, ok := c.Conn.(*net.TCPConn); ok {
		t.SetLinger(0)
	}
	c.Close()
}

// finished is the server's ConnState hook: a connection is active when its first request begins, past the handshake.
func finished(c net.Conn, s http.ConnState) {
	if t, ok := c.(*tls.Conn); ok && s == http.StateActive {
		if n, ok := t.NetConn().(*counted); ok && n.state.CompareAndSwap(0, 1) {
			n.list.mu.Lock()
			n.list.pending--
			n.list.mu.Unlock()
		}
	}
}

func (c *counted) Close() error {
	if was := c.state.Swap(2); was != 2 {
		c.known.forget(c)
		c.free(was == 0)
	}
	return c.Conn.Close()
}

// release makes room for another of the source.
func (c *counted) release() { c.free(false) }

func (c *counted) free(pending bool) {
	if !c.freed.CompareAndSwap(false, true) {
		return
	}
	l := c.list
	l.mu.Lock()
	defer l.mu.Unlock()
	l.total--
	if pending {
		l.pending--
	}
	if l.held[c.source]--; l.held[c.source] == 0 {
		delete(l.held, c.source)
	}
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

// pace bounds new sessions of a certificate, and renewals: each leaves a key behind for ever. Certificates are the operator's to give,
// so the map is as long as his list.
type pace struct {
	mu   sync.Mutex
	next map[[32]byte]time.Time
}

const (
	sessionEvery = 5 * time.Second
	sessionBurst = 20
)

// wait is how long a certificate must wait for its next session; zero: it may begin one now, which is counted.
func (p *pace) wait(certificate [32]byte, now time.Time) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	next := p.next[certificate]
	if floor := now.Add(-sessionBurst * sessionEvery); next.Before(floor) {
		next = floor
	}
	if next.After(now) {
		return next.Sub(now)
	}
	p.next[certificate] = next.Add(sessionEvery)
	return 0
}

// fewLines logs what who has a window can cause as often as he likes: failed handshakes, a line a second.
type fewLines struct {
	log        *slog.Logger
	limit      *rate.Limiter
	watch      func(Refusal)
	suppressed atomic.Int64
}

func (f *fewLines) line(level slog.Level, msg string, args ...any) {
	if !f.log.Enabled(context.Background(), level) {
		return
	}
	if !f.limit.Allow() {
		f.suppressed.Add(1)
		return
	}
	if n := f.suppressed.Swap(0); n > 0 {
		args = append(args, "suppressed", n)
	}
	f.log.Log(context.Background(), level, msg, args...)
}

// Write takes net/http's lines.
func (f *fewLines) Write(b []byte) (int, error) {
	text := strings.TrimSpace(string(b))
	rest, isTLS := strings.CutPrefix(text, "http: TLS handshake error from ")
	source, cause, _ := strings.Cut(rest, ": ")
	switch {
	case !isTLS:
		f.line(slog.LevelWarn, "gate", "err", text)
	case strings.HasPrefix(cause, "certificate of "), strings.HasPrefix(cause, "no client certificate"):
		// Logged already, as a certificate refused.
	case cause == "EOF", strings.HasSuffix(cause, "connection reset by peer"):
		// Clients race several connections and close all but one.
		f.line(slog.LevelDebug, "handshake not begun", "source", source, "err", cause)
	default:
		id := refusalID()
		f.watch(Refusal{ID: id, Stage: Handshake, Source: source, Text: cause})
		f.line(slog.LevelInfo, "handshake failed", "id", id, "source", source, "err", cause)
	}
	return len(b), nil
}
