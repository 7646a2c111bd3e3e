package gate

import (
	"bufio"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/curve25519"
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
}

// Tunnel is the server's WireGuard device. Sessions come and go by events from the store. A new session is pending: its
// peer exists, its address is not admitted until the first packet that came through its keys, since whoever asked for it
// may have named someone else's key.
type Tunnel struct {
	keys  [2][32]byte // private, public
	dev   *device.Device
	bind  *vpn.Bind
	inner *admitting
	door  Door
	log   *slog.Logger
	wake  chan struct{} // a session was admitted: its endpoint is known now

	offered []Service

	mu    sync.Mutex // also over what is told the door of endpoints, so that it never gets there in another order
	peers map[session.Key]*peer
}

type peer struct {
	session  session.Session
	endpoint netip.AddrPort // as last written to the door
}

// NewTunnel starts WireGuard on a TUN device. The private key is the server's static one.
func NewTunnel(cfg Config, private session.Key, dev tun.Device, door Door, log *slog.Logger) (*Tunnel, error) {
	public, err := curve25519.X25519(private[:], curve25519.Basepoint)
	if err != nil {
		return nil, fmt.Errorf("the tunnel's private key: %w", err)
	}
	t := &Tunnel{keys: [2][32]byte{private, [32]byte(public)}, bind: vpn.NewBind(), door: door, log: log, offered: cfg.Services, wake: make(chan struct{}, 1), peers: map[session.Key]*peer{}}
	t.inner = &admitting{Device: dev, admit: t.admit, pending: map[[4]byte]session.Session{}}
	quiet := &device.Logger{Verbosef: device.DiscardLogf, Errorf: func(format string, args ...any) {
		log.Debug("wireguard: " + fmt.Sprintf(format, args...))
	}}
	t.dev = device.NewDevice(t.inner, t.bind, quiet)
	if err := t.dev.IpcSet(fmt.Sprintf("private_key=%x\nlisten_port=%d\n", private, cfg.TunnelPort)); err != nil {
		t.dev.Close()
		return nil, fmt.Errorf("tunnel.port %d: %w", cfg.TunnelPort, err)
	}
	if err := t.dev.Up(); err != nil {
		t.dev.Close()
		return nil, fmt.Errorf("tunnel.port %d: %w: does another program use it?", cfg.TunnelPort, err)
	}
	return t, nil
}

// Close ends the tunnel. Peers go first, since closing the device closes the TUN before them.
func (t *Tunnel) Close() {
	t.dev.RemoveAllPeers()
	t.dev.Close()
}

// Pending is how many sessions wait for the first packet through their keys.
func (t *Tunnel) Pending() int { return int(t.inner.count.Load()) }

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
	t.peers[s.PublicKey] = &peer{session: s}
	t.mu.Unlock()
	t.inner.expect(s)
	err := t.dev.IpcSet(fmt.Sprintf("public_key=%x\npreshared_key=%x\nreplace_allowed_ips=true\nallowed_ip=%s/32\n", s.PublicKey, s.PresharedKey, s.Address))
	if err != nil { // IpcSet's errors quote no values
		t.log.Error("peer not added", "session", s.ID, "user", s.User, "err", err)
	}
}

func (t *Tunnel) remove(s session.Session) {
	if err := t.dev.IpcSet(fmt.Sprintf("public_key=%x\nremove=true\n", s.PublicKey)); err != nil {
		t.log.Error("peer not removed", "session", s.ID, "user", s.User, "err", err)
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
	}
}

// moveLocked tells the door of a peer's endpoint, and takes out the one it had unless another peer is there too.
func (t *Tunnel) moveLocked(p *peer, to netip.AddrPort, until time.Time) {
	old := p.endpoint
	p.endpoint = to
	if to.IsValid() {
		if err := t.door.AddPeer(to, until); err != nil {
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
	select {
	case t.wake <- struct{}{}:
	default:
	}
	return true
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
// the initiation is not one of the key given for this server's, is a replay, or the device is under load. Another peer's
// initiation goes no further: it would move that peer's endpoint to this request.
func (t *Tunnel) Handshake(ctx context.Context, key session.Key, initiation []byte, outer netip.AddrPort) []byte {
	if from, ok := initiator(initiation, t.keys[0], t.keys[1]); !ok || from != key {
		return nil
	}
	flight := vpn.NewFlight(outer)
	if err := t.bind.Inject(initiation, flight); err != nil {
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

// endpointLife is how long an endpoint may send without a window after its last handshake: WireGuard repeats handshakes
// every two minutes and gives up on keys after three.
const endpointLife = 5 * time.Minute

// Run keeps the door's peers at the endpoints of the handshakes, until ctx ends. Asking the device for its peers costs
// some 2 µs each, so it asks only when a handshake was answered, and at most once a second.
func (t *Tunnel) Run(ctx context.Context) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	var seen uint64
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.wake:
		case <-tick.C:
			n := t.bind.Handshakes()
			if n == seen {
				continue
			}
			seen = n
		}
		endpoints, err := t.endpoints()
		if err != nil {
			t.log.Error("endpoints of the tunnel not read", "err", err)
			continue
		}
		t.follow(endpoints, time.Now())
	}
}

// follow writes endpoints to the door.
func (t *Tunnel) follow(endpoints map[session.Key]status, now time.Time) {
	for key, e := range endpoints {
		t.mu.Lock()
		if p := t.peers[key]; p != nil {
			until := e.handshake.Add(endpointLife)
			if p.session.Expires.Before(until) {
				until = p.session.Expires
			}
			if until.After(now) {
				t.moveLocked(p, e.endpoint, until)
			}
		}
		t.mu.Unlock()
	}
}

// status is what the device says of a peer whose handshake is complete.
type status struct {
	endpoint  netip.AddrPort
	handshake time.Time
}

// endpoints reads the device's state (https://www.wireguard.com/xplatform/). The text holds private and preshared keys:
// it must never be logged.
func (t *Tunnel) endpoints() (map[session.Key]status, error) {
	text, err := t.dev.IpcGet()
	if err != nil {
		return nil, err
	}
	list := map[session.Key]status{}
	var key session.Key
	var s status
	note := func() {
		if s.endpoint.IsValid() && !s.handshake.IsZero() {
			list[key] = s
		}
		s = status{}
	}
	for lines := bufio.NewScanner(strings.NewReader(text)); lines.Scan(); {
		name, value, _ := strings.Cut(lines.Text(), "=")
		switch name {
		case "public_key":
			note()
			b, err := hex.DecodeString(value)
			if err != nil || len(b) != len(key) {
				return nil, errors.New("the device lists a public key that is none")
			}
			key = session.Key(b)
		case "endpoint":
			if e, err := netip.ParseAddrPort(value); err == nil {
				s.endpoint = netip.AddrPortFrom(e.Addr().Unmap().WithZone(""), e.Port())
			}
		case "last_handshake_time_sec":
			var sec int64
			if _, err := fmt.Sscan(value, &sec); err == nil && sec > 0 {
				s.handshake = time.Unix(sec, 0)
			}
		}
	}
	note()
	return list, nil
}
