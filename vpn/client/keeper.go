package client

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"time"
)

// What a keeper does when.
const (
	answerPatience = time.Second     // an initiation unanswered for so long: knock again
	probePatience  = 2 * time.Second // the proxy unreachable for so long: UDP seems blocked
	probeEvery     = 30 * time.Second
	reviveLimit    = 4 // revivals in vain before a new session is asked for
	longestPause   = time.Minute
	refusedPause   = 10 * time.Minute // where only a person can help
)

// States of a tunnel, as status shows them.
const (
	Connecting = "connecting"
	Up         = "up"
	Retrying   = "retrying" // it was up, and does not answer
)

// Data says whether packets have come back through the tunnel.
const (
	DataUnknown   = "not yet confirmed"
	DataConfirmed = "confirmed"
	DataBlocked   = "no answer: UDP seems blocked"
)

// Status is what `vpn status --json` prints.
type Status struct {
	State         string         `json:"state"` // connecting, up, retrying; down when there is no process
	Profile       string         `json:"profile"`
	User          string         `json:"user"`
	Device        string         `json:"device,omitempty"`
	PID           int            `json:"pid,omitempty"`
	Session       string         `json:"session,omitempty"`
	Interface     string         `json:"interface,omitempty"`
	Address       netip.Prefix   `json:"address,omitzero"`
	Proxy         netip.AddrPort `json:"proxy,omitzero"`
	Console       netip.AddrPort `json:"console,omitzero"`
	Gate          netip.AddrPort `json:"gate,omitzero"`
	Egress        []string       `json:"egress,omitempty"`
	PostQuantum   bool           `json:"post_quantum"`
	Data          string         `json:"data,omitempty"`
	Since         time.Time      `json:"since,omitzero"`
	Expires       time.Time      `json:"expires,omitzero"`
	LastHandshake time.Time      `json:"last_handshake,omitzero"`
	Received      uint64         `json:"received_bytes"`
	Sent          uint64         `json:"sent_bytes"`
	Problem       string         `json:"problem,omitempty"`
}

// Keeper holds a tunnel up: it follows a changed network, renews the session before its end, and asks for a new one when
// the gate has forgotten this one.
type Keeper struct {
	Options
	Timeout time.Duration // for a session to come up
	Now     func() time.Time

	mu      sync.Mutex
	tunnel  *Tunnel
	state   string
	data    string
	since   time.Time
	problem string
}

// Start opens the first session. Stop must follow, if it returned nil.
func (k *Keeper) Start(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, k.Timeout)
	defer cancel()
	t, err := Open(ctx, k.Options, nil)
	if err != nil {
		return err
	}
	k.adopt(t)
	return nil
}

func (k *Keeper) adopt(t *Tunnel) (old *Tunnel) {
	k.mu.Lock()
	defer k.mu.Unlock()
	old, k.tunnel = k.tunnel, t
	k.state, k.data, k.problem, k.since = Up, DataUnknown, "", k.Now()
	return old
}

// Stop takes the tunnel down, here and at the gate.
func (k *Keeper) Stop() {
	k.mu.Lock()
	t := k.tunnel
	k.mu.Unlock()
	closed := make(chan struct{})
	go func() { t.Close(); close(closed) }()
	ctx, cancel := context.WithTimeout(context.Background(), endPatience)
	defer cancel()
	if err := EndSession(ctx, k.Profile, k.Tokens, t.Session.ID); err != nil {
		k.Log.Warn("the gate was not told; the session expires by itself", "session", t.Session.ID, "error", err)
	}
	<-closed
}

// vitals are what a keeper decides from.
type vitals struct {
	now      time.Time
	asked    time.Time // last initiation sent by UDP
	answered time.Time // last handshake complete
	moved    bool      // another network, or a wake from sleep
	revived  int       // revivals since the last answer
	nextTry  time.Time // no attempt before
	renewAt  time.Time
}

type action int

const (
	nothing action = iota
	healthy        // an answer came: forget earlier trouble
	revive         // knock and shake hands again
	renew          // ask for a new session
)

// decide is pure; it is asked once a second.
func (v vitals) decide() action {
	silent := v.asked.After(v.answered) && v.now.Sub(v.asked) > answerPatience
	switch {
	case v.moved:
		return revive
	case v.now.Before(v.nextTry):
		return nothing
	case !v.now.Before(v.renewAt):
		return renew
	case silent && v.revived >= reviveLimit:
		return renew
	case silent:
		return revive
	case !v.asked.After(v.answered) && v.revived > 0:
		return healthy
	}
	return nothing
}

// pause grows with each attempt in vain, and never falls in step with other clients'.
func pause(attempt int, longest time.Duration) time.Duration {
	d := min(time.Second<<min(attempt, 16), longest)
	return d*3/4 + rand.N(d/2)
}

// renewTime is well before the end: a tenth of the session's life, ten minutes at most.
func renewTime(began, ends time.Time) time.Time {
	early := min(ends.Sub(began)/10, 10*time.Minute)
	return ends.Add(-early - rand.N(early/4+1))
}

// Run keeps the tunnel until ctx ends.
func (k *Keeper) Run(ctx context.Context) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	t := k.tunnel
	v := vitals{renewAt: renewTime(k.since, t.Session.Expires)}
	failures := 0
	began := time.Now()
	place := newPlace(t.Gate, k.Now(), 0)
	var probeAt time.Time
	for {
		now := k.Now()
		if k.unconfirmed(t) && !now.Before(probeAt) {
			probeAt = now.Add(probeEvery)
			go k.probe(ctx, t)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		v.now = k.Now()
		v.moved = place.moved(v.now, time.Since(began))
		v.answered = t.Stats().LastHandshake
		if i := t.wire.initiation.Load(); i != nil {
			v.asked = i.at
		}
		switch v.decide() {
		case healthy:
			v.revived, failures, v.nextTry = 0, 0, time.Time{}
			k.trouble(nil)
		case revive:
			v.nextTry = v.now.Add(pause(v.revived, longestPause))
			v.revived++
			err := t.revive(k.Tokens, k.Profile.TunnelPort)
			if v.moved {
				k.Log.Info("the network changed: knocked again", "error", err)
			} else {
				k.trouble(cmpError(err, errors.New("the gate does not answer by UDP: knocking again")))
			}
		case renew:
			failures++
			opening, cancel := context.WithTimeout(ctx, k.Timeout)
			fresh, err := Open(opening, k.Options, t)
			cancel()
			if err != nil {
				longest := longestPause
				if permanent(err) {
					longest = refusedPause
					failures = max(failures, 9)
				}
				v.nextTry = k.Now().Add(pause(failures, longest))
				if ctx.Err() == nil {
					k.trouble(err)
				}
				break
			}
			k.adopt(fresh).Close()
			k.Log.Info("new session", "session", fresh.Session.ID, "address", fresh.Session.Address, "expires", fresh.Session.Expires)
			t, place, probeAt = fresh, newPlace(fresh.Gate, k.Now(), time.Since(began)), time.Time{}
			// A session whose packets do not come back is no reason to ask for the next one at once.
			v = vitals{renewAt: renewTime(k.Now(), t.Session.Expires), nextTry: k.Now().Add(pause(failures, longestPause))}
		}
	}
}

func cmpError(err, otherwise error) error {
	if err != nil {
		return err
	}
	return otherwise
}

// trouble notes why the tunnel does not work, and says it once.
func (k *Keeper) trouble(err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	was := k.problem
	if err == nil {
		k.state, k.problem = Up, ""
	} else {
		k.state, k.problem = Retrying, err.Error()
	}
	if was != k.problem {
		if err == nil {
			k.Log.Info("the tunnel works again")
		} else {
			k.Log.Warn("the tunnel does not work", "error", err)
		}
	}
}

func (k *Keeper) unconfirmed(t *Tunnel) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.tunnel == t && k.data != DataConfirmed
}

func (k *Keeper) probe(ctx context.Context, t *Tunnel) {
	ctx, cancel := context.WithTimeout(ctx, probePatience)
	defer cancel()
	err := t.Probe(ctx)
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.tunnel != t || errors.Is(ctx.Err(), context.Canceled) {
		return
	}
	was := k.data
	if k.data = DataConfirmed; err != nil {
		k.data = DataBlocked
	}
	if k.data == DataBlocked && was != k.data {
		k.Log.Warn(fmt.Sprintf("the proxy does not answer through the tunnel: UDP port %d seems blocked on the way", t.Gate.Port()), "error", err)
	}
}

// Status is a snapshot.
func (k *Keeper) Status() Status {
	k.mu.Lock()
	defer k.mu.Unlock()
	p := k.Profile
	s := Status{State: k.state, Profile: p.Name(), User: p.User, Device: p.Device, Egress: p.Egress, Problem: k.problem}
	if s.State == "" {
		s.State = Connecting
	}
	if t := k.tunnel; t != nil {
		stats := t.Stats()
		s.Session, s.Interface, s.Address, s.Proxy, s.Console = t.Session.ID, t.Interface, t.Session.Address, t.Session.Proxy, t.Session.Console
		s.Gate, s.PostQuantum, s.Data, s.Since, s.Expires = t.Gate, t.PostQuantum, k.data, k.since, t.Session.Expires
		s.LastHandshake, s.Received, s.Sent = stats.LastHandshake, stats.Received, stats.Sent
	}
	return s
}

// place is where this machine is, as the gate sees it: the source address towards it. While a machine sleeps the wall
// clock goes on and the monotonic one does not.
type place struct {
	gate   netip.AddrPort
	source netip.Addr
	wall   time.Time
	awake  time.Duration
}

func newPlace(gate netip.AddrPort, wall time.Time, awake time.Duration) *place {
	return &place{gate, sourceTowards(gate), wall.Round(0), awake}
}

// moved tells of another network or a sleep since it was last asked. Awake is the monotonic clock's time.
func (p *place) moved(wall time.Time, awake time.Duration) bool {
	wall = wall.Round(0) // or the subtraction would use the monotonic clock
	slept := wall.Sub(p.wall)-(awake-p.awake) > 3*time.Second
	p.wall, p.awake = wall, awake
	source := sourceTowards(p.gate)
	if !source.IsValid() { // between networks: wait for the next
		return false
	}
	changed := source != p.source
	p.source = source
	return changed || slept
}

// sourceTowards asks the routes; nothing is sent.
func sourceTowards(gate netip.AddrPort) netip.Addr {
	c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(gate))
	if err != nil {
		return netip.Addr{}
	}
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap()
}
