package gate

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/crypto/curve25519"
	"golang.org/x/time/rate"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"

	"perimeterd/internal/session"
	"perimeterd/vpn"
)

// Door is the part of the firewall that lets sessions in.
type Door interface {
	Admit(a netip.Addr, services []uint16, until time.Time) error
	Dismiss(netip.Addr) error
	AddPeer(netip.AddrPort, time.Time) error
	RemovePeer(netip.AddrPort) error
	// Resume makes these, and no others, the admitted addresses with their services, and the endpoints.
	Resume(admitted map[netip.Addr]time.Time, services map[netip.Addr][]uint16, peers map[netip.AddrPort]time.Time) error
}

// Tunnel is the server's WireGuard device. Sessions come and go by events from the store. A new session is pending: its
// peer exists, its address is not admitted until the first packet that came through its keys, since whoever asked for it
// may have named someone else's key.
type Tunnel struct {
	keys   [2][32]byte // private, public
	engine engine
	bind   *watched // userspace
	count  counter
	inner  *admitting
	door   Door
	log    *slog.Logger
	wake   chan struct{} // a session was admitted: its endpoint is known now
	begun  chan struct{} // closed: see Begun

	offered []Service
	reading *rate.Limiter // of initiations

	mu     sync.Mutex // also over what is told the door of endpoints, so that it never gets there in another order
	peers  map[session.Key]*peer
	back   []*peer // of sessions that came back, whose handshake is the server's to begin
	barred int     // peers with initiations barred
}

type peer struct {
	session  session.Session
	endpoint netip.AddrPort // as last written to the door
	until    time.Time      // and how long it may stay there
	shared   *[32]byte      // secret of its static key and ours, once it was needed
	stamp    [12]byte       // of its latest initiation
	barred   [12]byte       // no initiation up to this one: replays, of before a restart
	noted    session.Seen
}

// NewTunnel starts WireGuard on a TUN device. The private key is the server's static one.
func NewTunnel(cfg Config, private session.Key, dev tun.Device, door Door, log *slog.Logger) (*Tunnel, error) {
	public, err := curve25519.X25519(private[:], curve25519.Basepoint)
	if err != nil {
		return nil, fmt.Errorf("the tunnel's private key: %w", err)
	}
	t := newTunnel(cfg, door, log)
	t.keys, t.bind = [2][32]byte{private, [32]byte(public)}, &watched{Bind: vpn.NewBind(), heed: t.heed}
	t.inner.Device = dev
	quiet := &device.Logger{Verbosef: device.DiscardLogf, Errorf: func(format string, args ...any) {
		log.Debug("wireguard: " + fmt.Sprintf(format, args...))
	}}
	wg := device.NewDevice(t.inner, t.bind, quiet)
	if err := wg.IpcSet(fmt.Sprintf("private_key=%x\nlisten_port=%d\n", private, cfg.TunnelPort)); err != nil {
		wg.Close()
		return nil, fmt.Errorf("tunnel.port %d: %w", cfg.TunnelPort, err)
	}
	if err := wg.Up(); err != nil {
		wg.Close()
		return nil, fmt.Errorf("tunnel.port %d: %w: does another program use it?", cfg.TunnelPort, err)
	}
	t.engine, t.count = userspace{wg}, t.bind
	return t, nil
}

func newTunnel(cfg Config, door Door, log *slog.Logger) *Tunnel {
	t := &Tunnel{door: door, log: log, offered: cfg.Services, wake: make(chan struct{}, 1), begun: make(chan struct{}),
		peers: map[session.Key]*peer{}, reading: rate.NewLimiter(readRate, readBurst)}
	t.inner = &admitting{admit: t.admit, pending: map[[4]byte]session.Session{}}
	return t
}

// Close ends the tunnel: no packet passes any more.
func (t *Tunnel) Close() { t.engine.close() }

// Pending is how many sessions wait for the first packet through their keys.
func (t *Tunnel) Pending() int { return int(t.inner.count.Load()) }

// Begun is closed when Run has begun the handshakes of all sessions that came back.
func (t *Tunnel) Begun() <-chan struct{} { return t.begun }

// Resume adds the sessions that outlived an earlier run. It is to be called before the tunnel hears of events.
//
// Who has proven his key then need not do it again, and is admitted: until he sends something, what the host sends him would be
// dropped. Run shakes hands with those who were there a moment ago.
func (t *Tunnel) Resume(sessions []session.Session, now time.Time) error {
	admitted, services, endpoints := map[netip.Addr]time.Time{}, map[netip.Addr][]uint16{}, map[netip.AddrPort]time.Time{}
	var list []newcomer
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, s := range sessions {
		p := t.knowLocked(s)
		list = append(list, newcomer{Session: s})
		if s.Seen.Handshake.IsZero() {
			t.inner.expect(s)
			continue
		}
		admitted[s.Address], services[s.Address] = s.Expires, t.services(s.Groups)
		if age := now.Sub(s.Seen.Handshake); s.Seen.Endpoint.IsValid() && age >= 0 && age < keysLife {
			p.endpoint, p.until = s.Seen.Endpoint, endpointEnd(s, s.Seen.Handshake, now)
			endpoints[p.endpoint] = p.until
			list[len(list)-1].endpoint = p.endpoint
			t.back = append(t.back, p)
		}
	}
	if err := t.door.Resume(admitted, services, endpoints); err != nil {
		return err
	}
	if err := t.engine.keep(t.peers); err != nil {
		return fmt.Errorf("peers of sessions that ended: %w", err)
	}
	if err := t.engine.add(list...); err != nil {
		return fmt.Errorf("peers of %d sessions: %w", len(sessions), err)
	}
	return nil
}

// SessionEvent adds or removes a peer. It is a session.Store watcher.
func (t *Tunnel) SessionEvent(e session.Event) {
	if e.Ended == "" {
		t.add(e.Session)
	} else {
		t.remove(e.Session)
	}
}

func (t *Tunnel) add(s session.Session) {
	t.mu.Lock()
	if p := t.peers[s.PublicKey]; p != nil && p.session.ID == s.ID { // resumed
		t.mu.Unlock()
		return
	}
	t.knowLocked(s)
	t.mu.Unlock()
	t.inner.expect(s)
	if err := t.engine.add(newcomer{Session: s}); err != nil {
		t.log.Error("peer not added", "session", s.ID, "user", s.User, "err", err)
	}
}

// knowLocked is before the device knows the peer, so that each of its initiations is read.
func (t *Tunnel) knowLocked(s session.Session) *peer {
	p := &peer{session: s, stamp: s.Seen.Stamp, barred: s.Seen.Stamp, noted: s.Seen}
	t.peers[s.PublicKey] = p
	if p.barred != ([12]byte{}) {
		t.barred++
	}
	return p
}

func (t *Tunnel) remove(s session.Session) {
	if err := t.engine.remove(s.PublicKey); err != nil {
		t.log.Error("peer not removed", "session", s.ID, "user", s.User, "err", err)
	}
	if t.bind != nil {
		t.bind.answers.forget()
	}
	t.inner.forget(s)
	if err := t.door.Dismiss(s.Address); err != nil {
		t.log.Error("address not dismissed", "session", s.ID, "address", s.Address, "err", err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if p := t.peers[s.PublicKey]; p != nil {
		t.moveLocked(p, netip.AddrPort{}, time.Time{})
		delete(t.peers, s.PublicKey)
		if p.barred != ([12]byte{}) {
			t.barred--
		}
	}
}

// moveLocked tells the door of a peer's endpoint, and takes out the one it had unless another peer is there too.
func (t *Tunnel) moveLocked(p *peer, to netip.AddrPort, until time.Time) {
	old := p.endpoint
	if old == to && until.Sub(p.until).Abs() < time.Second {
		return
	}
	p.endpoint, p.until = to, until
	if to.IsValid() {
		if err := t.door.AddPeer(to, until); err != nil {
			p.until = time.Time{} // with the next look
			t.log.Error("endpoint not written", "session", p.session.ID, "endpoint", to, "err", err)
		}
	}
	if !old.IsValid() || old == to {
		return
	}
	for _, other := range t.peers {
		if other.endpoint == old {
			return
		}
	}
	if err := t.door.RemovePeer(old); err != nil {
		t.log.Error("endpoint not removed", "session", p.session.ID, "endpoint", old, "err", err)
	}
}

// admit runs on the first packet of a pending session, before the packet goes on. A packet whose address cannot be
// admitted is dropped by the table, and the next one tries again.
func (t *Tunnel) admit(s session.Session) bool {
	if err := t.door.Admit(s.Address, t.services(s.Groups), s.Expires); err != nil {
		t.log.Error("address not admitted", "session", s.ID, "address", s.Address, "err", err)
		return false
	}
	t.log.Info("session admitted", "session", s.ID, "user", s.User, "address", s.Address)
	t.look()
	return true
}

// look makes Run look at the endpoints soon.
func (t *Tunnel) look() {
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

// services are the ports of the host that a member of these groups reaches.
func (t *Tunnel) services(groups []string) (ports []uint16) {
	for _, s := range t.offered {
		if slices.ContainsFunc(s.Groups, func(g string) bool { return g == "*" || slices.Contains(groups, g) }) {
			ports = append(ports, s.Port)
		}
	}
	return ports
}

// handshakeWait bounds how long a request waits for the device's answer to an initiation; it takes some 0.5 ms.
const handshakeWait = 500 * time.Millisecond

// Handshake lets the device answer an initiation that came in a request of outer, and returns its response; nil where
// the initiation is not one of the key given for this server's, is a replay, the device is under load, or is the kernel's,
// which takes none but by its socket. Another peer's initiation goes no further: it would move that peer's endpoint to this request.
func (t *Tunnel) Handshake(ctx context.Context, key session.Key, message []byte, outer netip.AddrPort) []byte {
	if t.bind == nil {
		return nil
	}
	if i, ok := openInitiation(message, t.keys[0], t.keys[1]); !ok || i.static != key {
		return nil
	}
	flight := vpn.NewFlight(outer)
	if err := t.bind.Inject(message, flight); err != nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, handshakeWait)
	defer cancel()
	select {
	case m := <-flight.Message():
		if len(m) == vpn.ResponseSize {
			return m
		}
	case <-ctx.Done():
	}
	return nil
}

// Initiations read in a second; a session makes one in two minutes. It bounds what somebody with a window costs the reader
// of the socket.
const (
	readRate  = 2000
	readBurst = 4000
)

// heed reads an initiation before the device gets it, and notes its stamp. A device knows no stamps of before its start: a
// handshake that was recorded then would move a session's endpoint to who replays it; so would one of an earlier session of
// the same key, which the store forgets in time. False: such a replay. What is not read, since too many come, passes where there is nothing to compare it with.
func (t *Tunnel) heed(message []byte) bool {
	if len(message) != vpn.InitiationSize || !mac1(message, t.keys[1]) {
		return true // the device refuses it; and what costs nothing to make must not use up what is read
	}
	if !t.reading.Allow() {
		t.mu.Lock()
		defer t.mu.Unlock()
		return t.barred == 0
	}
	i, ok := openInitiation(message, t.keys[0], t.keys[1])
	if !ok {
		return true // it is the device's to refuse
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	p := t.peers[i.static]
	if p == nil {
		return true
	}
	if p.shared == nil {
		shared, err := curve25519.X25519(t.keys[0][:], p.session.PublicKey[:])
		if err != nil {
			return true
		}
		p.shared = (*[32]byte)(shared)
	}
	stamp, ok := i.stamp(*p.shared)
	if !ok {
		return true
	}
	if bytes.Compare(stamp[:], p.barred[:]) <= 0 || time.Since(madeAt(stamp)) >= session.InitiationAge {
		return false
	}
	if bytes.Compare(stamp[:], p.stamp[:]) > 0 {
		p.stamp = stamp
	}
	return true
}

// endpointLife is how long an endpoint may send without a window after its last handshake: WireGuard repeats handshakes
// every two minutes and gives up on keys after three.
const (
	endpointLife = 5 * time.Minute
	keysLife     = 3 * time.Minute
)

// endpointEnd is when an endpoint needs a window again. A clock that was set back since the handshake adds nothing.
func endpointEnd(s session.Session, handshake, now time.Time) time.Time {
	until := handshake.Add(endpointLife)
	if most := now.Add(endpointLife); most.Before(until) {
		until = most
	}
	if s.Expires.Before(until) {
		until = s.Expires
	}
	return until
}

// The server begins handshakes after a restart, so many at once: their responses must not take the device's queue to where it
// wants cookies, an eighth of a thousand. Who has not answered after resumePatience is not waited for.
const (
	resumeAtOnce   = 64
	resumePace     = time.Millisecond
	resumePatience = 500 * time.Millisecond
)

// The device is asked for its peers, which costs some 2 µs each, at once after an admission and within a second after a
// handshake, and no more often than this.
const lookEvery = 250 * time.Millisecond

// Run keeps the door's peers at the endpoints of the handshakes, and gives note what must be known after a restart, until
// ctx ends. First it begins the handshakes of sessions that came back, or their clients, who know of no restart, would wait
// for 15 s before they begin one.
func (t *Tunnel) Run(ctx context.Context, note func(map[session.ID]session.Seen) error) error {
	if t.bind == nil {
		proving := make(chan struct{})
		go func() { t.admitProven(ctx); close(proving) }()
		defer func() { <-proving }()
	}
	tick, pace := time.NewTicker(lookEvery), time.NewTicker(resumePace)
	defer tick.Stop()
	defer pace.Stop()
	t.mu.Lock()
	back := t.back
	t.back = nil
	t.mu.Unlock()
	// Who was there last is most likely to be there still.
	slices.SortFunc(back, func(a, b *peer) int { return b.session.Seen.Handshake.Compare(a.session.Seen.Handshake) })
	open, answered, patience := 0, t.count.Responses(), time.Now()
	var seen uint64
	var looked time.Time
	woken, failed := false, ""
	for n := 1; ; {
		select {
		case <-ctx.Done():
			t.lastLook(note)
			return nil
		case <-pace.C:
			if len(back) == 0 {
				pace.Stop()
				close(t.begun)
				continue
			}
			now := t.count.Responses()
			if open -= int(now - answered); open < 0 || time.Since(patience) > resumePatience {
				open, patience = 0, time.Now()
			}
			answered = now
			for ; open < resumeAtOnce && len(back) > 0; back = back[1:] {
				t.engine.begin(back[0].session.PublicKey)
				open++
			}
			continue
		case <-t.wake:
			woken = true
		case <-tick.C:
			n++
		}
		handshakes := t.count.Handshakes()
		if time.Since(looked) < lookEvery || !woken && (handshakes == seen || n%int(time.Second/lookEvery) != 0) {
			continue
		}
		woken, seen, looked = false, handshakes, time.Now()
		endpoints, err := t.engine.statuses()
		if err != nil {
			t.log.Error("endpoints of the tunnel not read", "err", err)
			continue
		}
		changed := t.follow(endpoints, time.Now())
		if len(changed) == 0 {
			continue
		}
		if err := note(changed); err != nil {
			seen = 0 // again at the next tick
			if failed != err.Error() {
				failed = err.Error()
				t.log.Error("endpoints of sessions not written: after a restart their clients must begin", "err", err)
			}
			continue
		}
		failed = ""
		t.noted(changed)
	}
}

// lastLook notes what happened since the last look, so that the next process begins where this one ended.
func (t *Tunnel) lastLook(note func(map[session.ID]session.Seen) error) {
	endpoints, err := t.engine.statuses()
	if err == nil {
		if changed := t.follow(endpoints, time.Now()); len(changed) > 0 {
			err = note(changed)
		}
	}
	if err != nil {
		t.log.Error("endpoints of sessions not written: after a restart their clients must begin", "err", err)
	}
}

// follow writes endpoints to the door, and returns what is not noted of them.
func (t *Tunnel) follow(endpoints map[session.Key]status, now time.Time) map[session.ID]session.Seen {
	changed := map[session.ID]session.Seen{}
	for key, e := range endpoints {
		t.mu.Lock()
		if p := t.peers[key]; p != nil {
			// A stream needs no place at the door, and the one that the session had by UDP ends with its time: the client
			// may come back there.
			if e.stream {
				e.endpoint = netip.AddrPort{}
			} else if until := endpointEnd(p.session, e.handshake, now); until.After(now) {
				t.moveLocked(p, e.endpoint, until)
			}
			if seen := (session.Seen{Endpoint: e.endpoint, Handshake: e.handshake, Stamp: p.stamp}); seen != p.noted {
				changed[p.session.ID] = seen
			}
		}
		t.mu.Unlock()
	}
	return changed
}

func (t *Tunnel) noted(changed map[session.ID]session.Seen) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, p := range t.peers {
		if seen, ok := changed[p.session.ID]; ok {
			p.noted = seen
		}
	}
}
