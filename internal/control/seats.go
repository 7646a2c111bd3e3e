package control

import (
	"net"
	"net/http"
	"sync"

	"golang.org/x/sys/unix"

	"perimeterd/vpn"
)

// What is held at a time, on each socket for itself: readers shut no operator out, and one reader not the others.
const (
	connections       = 64 // of a socket
	readerConnections = 16 // of one account that may only read
	operatorSeats     = 16 // who read events: each may hold a copy of all that is remembered
	readerSeats       = 16
	readerSeatsEach   = 4
)

// seats bounds what accounts hold at a time, each and all together.
type seats struct {
	all, each int

	mu    sync.Mutex
	total int
	held  map[uint32]int
}

func newSeats(all, each int) *seats { return &seats{all: all, each: each, held: map[uint32]int{}} }

func (s *seats) take(uid uint32) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.total >= s.all || s.held[uid] >= s.each {
		return false
	}
	s.total++
	s.held[uid]++
	return true
}

func (s *seats) leave(uid uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.total--
	if s.held[uid]--; s.held[uid] == 0 {
		delete(s.held, uid)
	}
}

// bound refuses who finds no seat.
func (s *seats) bound(h http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		uid := peer(r.Context()).Uid
		if !s.take(uid) {
			answer(w, nil, &vpn.APIError{Status: http.StatusServiceUnavailable, Code: codeBusy, Message: "too many read the events already", Fix: "end one who does, or try again"})
			return
		}
		defer s.leave(uid)
		h(w, r)
	}
}

// guests takes connections while there are seats. One too many is closed, and so is one of nobody knows whom.
type guests struct {
	net.Listener
	seats *seats
}

// guest is a connection and who is at its other end. Not netutil's: that hides the socket, and with it the peer.
type guest struct {
	net.Conn
	peer  *unix.Ucred
	leave func()
}

func (l *guests) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if u, ok := c.(*net.UnixConn); ok {
			if peer, err := peerOf(u); err == nil && l.seats.take(peer.Uid) {
				return &guest{c, peer, sync.OnceFunc(func() { l.seats.leave(peer.Uid) })}, nil
			}
		}
		c.Close()
	}
}

func (g *guest) Close() error {
	defer g.leave()
	return g.Conn.Close()
}
