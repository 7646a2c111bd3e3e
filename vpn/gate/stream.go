package gate

import (
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"perimeterd/internal/identity"
	"perimeterd/internal/session"
	"perimeterd/vpn"
)

// streamInitiations are what a stream may carry in a second: a device makes one in five seconds, and each costs a curve.
const streamInitiations = 5

// streams are the connections that carry datagrams: of a session one, the latest.
type streams struct {
	mu     sync.Mutex
	by     map[session.ID]*stream
	closed bool
	ended  sync.WaitGroup
}

type stream struct {
	*vpn.Stream
	conn net.Conn
}

// reset ends it with RST: an orderly end would wait for what the peer has not read.
func (s *stream) reset() {
	reset(s.conn)
	s.Close()
}

// put makes s the session's stream, in the place of one that it may have.
func (l *streams) put(id session.ID, s *stream) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return false
	}
	if old := l.by[id]; old != nil {
		old.reset()
	}
	l.by[id] = s
	l.ended.Add(1)
	return true
}

func (l *streams) drop(id session.ID, s *stream) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.by[id] == s {
		delete(l.by, id)
	}
	l.ended.Done()
}

// cut ends the stream of a session.
func (l *streams) cut(id session.ID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if s := l.by[id]; s != nil {
		s.reset()
	}
}

// close ends all of them, and those to come.
func (l *streams) close() {
	l.mu.Lock()
	l.closed = true
	for _, s := range l.by {
		s.reset()
	}
	l.mu.Unlock()
	l.ended.Wait()
}

// stream turns a request into a stream of the caller's session.
func (g *Gate) stream(w http.ResponseWriter, r *http.Request, id identity.Identity) error {
	s, err := g.streamed(r, id)
	if err != nil {
		w.Header().Set("Connection", "close") // datagrams may be behind the request
		return err
	}
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return err
	}
	conn.SetDeadline(time.Time{}) // it was the request's
	c := &stream{g.tunnel.bind.NewStream(conn, buffered.Reader, outer(r)), conn}
	if !g.streams.put(s.ID, c) {
		c.reset()
		return nil
	}
	release(conn)
	// Before the answer: an end of the session that came first found no stream, and one that comes now finds it.
	_, live := g.store.Get(s.ID)
	if _, err := g.verifier.Identify(*r.TLS); err != nil || !live {
		c.reset()
	}
	conn.SetWriteDeadline(time.Now().Add(requestTimeout))
	fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\nCache-Control: no-store\r\n\r\n", vpn.StreamProtocol)
	go func() {
		defer g.streams.drop(s.ID, c)
		began := time.Now()
		err := c.Run(nil, c.Stream, g.tunnel.only(s.PublicKey))
		g.tunnel.look() // with the first answer by UDP its client left it, and no handshake tells where he is
		g.log.Debug("stream ended", "session", s.ID, "user", s.User, "source", outer(r), "after", time.Since(began), "err", err)
	}()
	return nil
}

// streamed is the session that a stream is asked for: the one that the request names, or else the only one of the caller.
func (g *Gate) streamed(r *http.Request, id identity.Identity) (s session.Session, err error) {
	if !strings.EqualFold(r.Header.Get("Upgrade"), vpn.StreamProtocol) || !strings.Contains(strings.ToLower(r.Header.Get("Connection")), "upgrade") {
		return s, badRequest("no stream without its headers: want Connection: Upgrade, Upgrade: %s", vpn.StreamProtocol)
	}
	own := g.store.Of(id.Certificate)
	switch name := r.URL.Query().Get("session"); {
	case name != "":
		if s, err = g.find(name, id); err != nil {
			return s, err
		}
	case len(own) == 1:
		s = own[0]
	default:
		return s, badRequest("%d sessions are yours: want %s?session=ID", len(own), vpn.StreamPath)
	}
	if g.tunnel.bind == nil {
		return s, &vpn.APIError{Code: vpn.CodeNoStream, Message: "the kernel's WireGuard takes no datagrams by TLS", Fix: `use UDP; the operator may set tunnel.backend = "userspace"`}
	}
	return s, nil
}

// only passes what a session's own device may send: an initiation that another key made would move that key's endpoint to this
// stream. Whose the other messages are is WireGuard's to prove: they open with the keys of one peer, once.
func (t *Tunnel) only(key session.Key) func(datagram []byte) bool {
	pace := rate.NewLimiter(streamInitiations, streamInitiations)
	return func(d []byte) bool {
		if d[0] != messageInitiation {
			return true
		}
		if !pace.Allow() {
			return false
		}
		i, ok := openInitiation(d, t.keys[0], t.keys[1])
		return ok && i.static == key
	}
}

// release takes a connection that became a stream off those that are counted by source: sessions are counted themselves, and an
// office may have many behind one address.
func release(c net.Conn) {
	if n := beneath(c); n != nil {
		n.release()
		if t, ok := n.Conn.(*net.TCPConn); ok {
			roomy(t)
		}
	}
}

func reset(c net.Conn) {
	if n := beneath(c); n != nil {
		n.reset()
	}
}

func beneath(c net.Conn) *counted {
	if t, ok := c.(*tls.Conn); ok {
		n, _ := t.NetConn().(*counted)
		return n
	}
	return nil
}
