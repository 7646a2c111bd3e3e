package client

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// carryPatience is how long a connection may take to come up through the tunnel: as long as one revival does.
const carryPatience = 10 * time.Second

// unavailable says why there is no tunnel to go through.
type unavailable string

func (u unavailable) Error() string { return string(u) }

// Dial connects to an address of the bastion's through the tunnel of the moment, and sends what is to come first there: more than
// once, if a connection breaks off as it begins. The error is unavailable where there is no tunnel.
func (k *Keeper) Dial(ctx context.Context, to netip.AddrPort, first []byte) (net.Conn, error) {
	for {
		k.mu.Lock()
		t, state, problem := k.tunnel, k.state, k.problem
		k.hurry = k.hurry || state == Retrying
		k.mu.Unlock()
		switch {
		case state == Refused:
			return nil, unavailable("the gate refuses this profile: " + problem)
		case t == nil:
			return nil, unavailable("the tunnel is not up yet")
		}
		conn, err := t.dial(ctx, to, first)
		if err == nil {
			return conn, nil
		}
		k.mu.Lock()
		replaced := k.tunnel != t
		state, problem = k.state, k.problem
		k.mu.Unlock()
		switch {
		case replaced && ctx.Err() == nil: // by a new session, meanwhile
			continue
		case state == Refused:
			return nil, unavailable("the gate refuses this profile: " + problem)
		case state != Up:
			return nil, unavailable(fmt.Sprintf("the tunnel is %s: %s", state, problem))
		}
		return nil, fmt.Errorf("%v does not answer through the tunnel: %w", to, err)
	}
}

// awaitRefusal returns why the gate refuses the profile, when it does; empty when ctx ends before.
func (k *Keeper) awaitRefusal(ctx context.Context) string {
	for {
		k.mu.Lock()
		state, problem := k.state, k.problem
		if k.changed == nil {
			k.changed = make(chan struct{})
		}
		changed := k.changed
		k.mu.Unlock()
		if state == Refused {
			return problem
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ""
		}
	}
}

// addresses are those of the session of the moment; not valid while there is none.
func (k *Keeper) addresses() (proxy, console netip.AddrPort) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.tunnel == nil {
		return
	}
	return k.tunnel.Session.Proxy, k.tunnel.Session.Console
}

// roundTrip is how long the way to the gate was when the tunnel came up; not ok while it is not up.
func (k *Keeper) roundTrip() (d time.Duration, ok bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.tunnel == nil || k.state != Up {
		return 0, false
	}
	return k.tunnel.roundTrip, true
}

// earliness is whether a request leaves with the first packet of its connection to the proxy, which then takes no round trip of
// its own.
type earliness int32

const (
	never   earliness = iota // this link cannot, or the proxy does not take it
	perhaps                  // it was not tried yet
	likely                   // it did
)

// earlyLink is a Link that may send the first bytes of a connection before the other end has answered.
type earlyLink interface {
	// DialWith is DialContext, and sends first.
	DialWith(ctx context.Context, network, address string, first []byte) (net.Conn, error)
	early() earliness
}

func (t *Tunnel) dial(ctx context.Context, to netip.AddrPort, first []byte) (net.Conn, error) {
	if e, ok := t.link.(earlyLink); ok && len(first) > 0 {
		return e.DialWith(ctx, "tcp", to.String(), first)
	}
	conn, err := t.link.DialContext(ctx, "tcp", to.String())
	if err != nil || len(first) == 0 {
		return conn, err
	}
	if _, err := conn.Write(first); err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

func (k *Keeper) early() earliness {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.tunnel != nil {
		if e, ok := k.tunnel.link.(earlyLink); ok {
			return e.early()
		}
	}
	return never
}

const (
	// spareCount is how many connections to the proxy are kept ready: a page or a command opens several at once.
	spareCount = 4
	// spareLife is less than the ten seconds after which the proxy closes a connection that asks for nothing.
	spareLife = 8 * time.Second
)

// spares are connections to the proxy that are made ahead, so that a request leaves at once and not after a round trip.
// They are made as others are used, so that an idle client has none; and none where requests leave at once without.
type spares struct {
	dial  func(ctx context.Context, first []byte) (net.Conn, error)
	early func() earliness

	mu      sync.Mutex
	ready   []*spare
	coming  int
	waiting []chan bool // each gets whether another is ready, or did not come
	closed  bool
}

// spare is watched while it waits: read gets what ends the watch.
type spare struct {
	net.Conn
	read  chan error
	lapse *time.Timer
}

// take returns a connection that is alive as far as is known here, and has first sent on it; or makes one.
func (s *spares) take(ctx context.Context, first []byte) (net.Conn, error) {
	defer s.fill()
	for {
		s.mu.Lock()
		if len(s.ready) > 0 {
			c := s.ready[0]
			s.ready = s.ready[1:]
			s.mu.Unlock()
			if c.awake() {
				if _, err := c.Write(first); err == nil {
					return c.Conn, nil
				}
			}
			c.Close()
			continue
		}
		if len(s.waiting) >= s.coming || len(first) > 0 && s.early() != never {
			s.mu.Unlock()
			return s.dial(ctx, first)
		}
		// One that is on its way is there sooner than one that begins now, and the next is for who comes after.
		sooner := make(chan bool, 1)
		s.waiting = append(s.waiting, sooner)
		s.mu.Unlock()
		select {
		case came := <-sooner:
			if came {
				continue
			}
		case <-ctx.Done():
			s.mu.Lock()
			s.waiting = slices.DeleteFunc(s.waiting, func(c chan bool) bool { return c == sooner })
			s.mu.Unlock()
		}
		return s.dial(ctx, first) // or the reason why not
	}
}

// awake ends the watch, and says whether the connection is alive.
func (c *spare) awake() bool {
	c.lapse.Stop()
	c.SetReadDeadline(time.Unix(1, 0))
	var timeout net.Error
	err := <-c.read
	return errors.As(err, &timeout) && timeout.Timeout() && c.SetReadDeadline(time.Time{}) == nil
}

// fill makes what is missing, behind the back of who uses the last.
func (s *spares) fill() {
	if s.early() == likely {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for !s.closed && len(s.ready)+s.coming < spareCount {
		s.coming++
		go s.make()
	}
}

func (s *spares) make() {
	ctx, cancel := context.WithTimeout(context.Background(), carryPatience)
	defer cancel()
	conn, err := s.dial(ctx, nil)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.coming--
	if len(s.waiting) > 0 {
		s.waiting[0] <- err == nil
		s.waiting = s.waiting[1:]
	}
	if err != nil {
		return
	}
	if s.closed {
		conn.Close()
		return
	}
	c := &spare{Conn: conn, read: make(chan error, 1)}
	c.lapse = time.AfterFunc(spareLife, func() { s.drop(c) })
	s.ready = append(s.ready, c)
	go func() {
		n, err := c.Read(make([]byte, 1))
		if n > 0 {
			err = errors.New("the proxy speaks before it is asked")
		}
		c.read <- err
		var timeout net.Error
		if !errors.As(err, &timeout) {
			s.drop(c)
		}
	}()
}

// drop takes one out that has lapsed or died, unless somebody has it already.
func (s *spares) drop(c *spare) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.ready {
		if s.ready[i] == c {
			s.ready = append(s.ready[:i:i], s.ready[i+1:]...)
			c.lapse.Stop()
			c.Close()
			return
		}
	}
}

func (s *spares) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for _, c := range s.ready {
		c.lapse.Stop()
		c.Close()
	}
	s.ready = nil
}
