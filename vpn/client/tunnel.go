package client

import (
	"bufio"
	"context"
	"crypto/ecdh"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"

	"perimeterd/vpn"
)

// Link is the inner end of a tunnel: what packets come from and go to.
type Link interface {
	tun.Device
	// Configure gives it its address and MTU and makes proxy reachable through it. With takeOver another link reaches
	// that proxy now, and no longer after.
	Configure(address, proxy netip.Addr, mtu int, takeOver bool) error
	// DialContext connects through the tunnel.
	DialContext(ctx context.Context, network, address string) (net.Conn, error)
}

// Options are what a tunnel is made from.
type Options struct {
	Profile  *Profile
	Tokens   *Tokens
	NewLink  func() (Link, error)
	Progress func(step string) // nil: nobody watches
	Log      *slog.Logger
}

// Tunnel is a session that is up.
type Tunnel struct {
	Session     vpn.SessionReply // without its secrets
	Interface   string
	PostQuantum bool // the preshared key travelled under X25519MLKEM768
	Gate        netip.AddrPort

	link       Link
	wire       *wire
	dev        *device.Device
	peer       *device.Peer
	private    *ecdh.PrivateKey
	shared     []byte        // the preshared key
	roundTrip  time.Duration // to the gate, as it was when the tunnel came up
	visited    []string      // by the kept session, where there was one
	configured bool          // the link is
	responded  bool          // the reply had the handshake's response in it
	proven     bool          // a way for data: a handshake was answered there, or it is the stream that the reply came by
	endpoint   conn.Endpoint // the gate's, UDP: the only one that the device knows
}

// initiationLife is how long an initiation is good for the request: after five seconds the device makes another, and
// forgets this one.
const initiationLife = 4 * time.Second

// endPatience is how long the gate may take to end a session: it also ends by itself.
const endPatience = 2 * time.Second

// responsePatience is how long the device may take to work a response in; it takes less than a millisecond.
const responsePatience = 500 * time.Millisecond

// Open knocks, asks for a session and brings the tunnel up. The WireGuard initiation travels in the request and its
// response in the reply: with the reply the tunnel has keys, on a way that UDP need not have worked on yet. With replaces,
// routes move over from that tunnel and its session is ended; closing it is the caller's.
func Open(ctx context.Context, o Options, replaces *Tunnel) (*Tunnel, error) {
	if err := o.Profile.checkDates(time.Now()); err != nil {
		return nil, err
	}
	var k *kept
	if replaces == nil {
		k = loadKept(o.Profile, time.Now())
	}
	t, err := openWith(ctx, o, replaces, k, nil)
	if stale := (errStale{}); errors.As(err, &stale) {
		if err := dropKept(o.Profile); err != nil {
			o.Log.Warn("the kept session is of no use, and stays", "error", err)
		}
		return openWith(ctx, o, replaces, nil, stale.gate)
	}
	return t, err
}

// openWith opens with what there is: a session that was kept, and a connection to the gate.
func openWith(ctx context.Context, o Options, replaces *Tunnel, k *kept, g *gateConn) (*Tunnel, error) {
	link, err := o.NewLink()
	if err != nil {
		return nil, err
	}
	t := &Tunnel{link: link, wire: newWire()}
	t.wire.onUDP = o.Tokens.Answered
	t.dev = device.NewDevice(newQuietTUN(link), t.wire, &device.Logger{
		Verbosef: device.DiscardLogf,
		Errorf:   func(format string, a ...any) { o.Log.Debug(fmt.Sprintf(format, a...)) },
	})
	if err := t.open(ctx, o, replaces, k, g); err != nil {
		t.Close()
		return nil, err
	}
	return t, nil
}

func (t *Tunnel) open(ctx context.Context, o Options, replaces *Tunnel, k *kept, g *gateConn) (err error) {
	ours := true // the connection is to be closed here
	defer func() {
		if g != nil && ours {
			g.Close()
		}
	}()
	if t.private, err = k.privateKey(); err != nil {
		return err
	}
	if t.Interface, err = t.link.Name(); err != nil {
		return err
	}
	if err := t.dev.IpcSet("private_key=" + hex.EncodeToString(t.private.Bytes()) + "\n"); err != nil {
		return err
	}
	if err := t.dev.Up(); err != nil {
		return fmt.Errorf("UDP socket: %w", err)
	}
	if k != nil {
		if up, err := t.warm(ctx, o, k); up || err != nil {
			return err
		}
	}

	// The token leaves first; keys are worked out while it travels.
	var way <-chan reached
	if g == nil {
		reaching, cancel := context.WithCancel(ctx)
		defer cancel()
		way = t.reach(reaching, o)
	}
	began := time.Now()
	var initiation []byte
	if k == nil {
		if initiation, err = t.initiate(o.Profile.typed.serverKey); err != nil {
			return err
		}
	}
	if way != nil {
		keyed := t.wire.keyed
		if k == nil {
			keyed = nil
		}
		select {
		case r := <-way:
			if g, err = r.gate, r.err; err != nil {
				return err
			}
		case <-keyed:
			go func() {
				if r := <-way; r.gate != nil {
					r.gate.Close()
				}
			}()
			return t.welcome(o)
		}
	}
	if k != nil || time.Since(began) > initiationLife {
		t.peer.ExpireCurrentKeypairs() // lets it make another at once
		if initiation, err = t.initiate(o.Profile.typed.serverKey); err != nil {
			return err
		}
	}
	name := o.Profile.Device
	if name == "" {
		name, _ = os.Hostname()
	}
	request := vpn.SessionRequest{PublicKey: t.private.PublicKey().Bytes(), Initiation: initiation, Device: name[:min(len(name), 64)]}
	var reply vpn.SessionReply
	if err := g.do(ctx, http.MethodPost, vpn.SessionPath, request, &reply); err != nil {
		var api *vpn.APIError
		if k != nil && errors.As(err, &api) && api.Code == vpn.CodeKeyBound {
			ours = false
			return errStale{g}
		}
		if certificateRefused(err) {
			err = errors.Join(err, dropKept(o.Profile))
		}
		return err
	}
	t.Session = reply
	o.Profile.accepted()
	if o.Progress != nil {
		o.Progress("certificate accepted")
	}
	t.PostQuantum, t.roundTrip = g.postQuantum(), g.roundTrip
	t.Gate = g.RemoteAddr().(*net.TCPAddr).AddrPort()
	if err = checkReply(&t.Session); err == nil {
		err = t.complete(o, replaces != nil)
	}
	if err != nil { // a session of no use to anybody
		endOn(ctx, g, t.Session.ID, o.Log)
		return err
	}
	if replaces != nil {
		endOn(ctx, g, replaces.Session.ID, o.Log)
	}
	// The connection goes on as the tunnel's way, until UDP has answered.
	ours = false
	if err := t.attach(g, func(error) {}); err != nil {
		o.Log.Debug("no stream", "error", err)
	} else {
		t.proven = t.Session.Streams
	}
	if err := t.waitKeys(ctx); err != nil {
		return err
	}
	return t.keepAlive()
}

// reached is an authenticated connection to the gate, or why there is none.
type reached struct {
	gate *gateConn
	err  error
}

// reach knocks, connects and authenticates.
func (t *Tunnel) reach(ctx context.Context, o Options) <-chan reached {
	to := make(chan reached, 1)
	go func() {
		spare, done := context.WithCancel(ctx)
		defer done()
		d := Dialer{Profile: o.Profile, Tokens: o.Tokens, SendToken: t.wire.token, Progress: o.Progress, spare: spare}
		r := d.dial(ctx)
		if r.err != nil {
			to <- reached{err: r.err}
			return
		}
		g, err := o.Profile.handshakeHedged(ctx, r)
		to <- reached{g, err}
	}()
	return to
}

func endOn(ctx context.Context, g *gateConn, id string, log *slog.Logger) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), endPatience)
	defer cancel()
	if err := endSession(ctx, g, id); err != nil {
		log.Warn("a session was not ended; it expires by itself", "session", id, "error", err)
	}
}

// initiate makes the device know the gate's key and takes the handshake's first message out of it.
func (t *Tunnel) initiate(gate wgKey) ([]byte, error) {
	if t.peer == nil {
		if err := t.addPeer(gate); err != nil {
			return nil, err
		}
	}
	flight := vpn.NewFlight(netip.AddrPort{})
	t.peer.SetEndpointFromPacket(flight)
	if err := t.peer.SendHandshakeInitiation(false); err != nil {
		return nil, fmt.Errorf("WireGuard initiation: %w", err)
	}
	select {
	case m := <-flight.Message():
		return m, nil
	default:
		return nil, errors.New("WireGuard initiation: the device made none")
	}
}

func (t *Tunnel) addPeer(key wgKey) error {
	if err := t.dev.IpcSet("public_key=" + key.hex() + "\n"); err != nil {
		return err
	}
	if t.peer = t.dev.LookupPeer(device.NoisePublicKey(key)); t.peer == nil {
		return errors.New("WireGuard: the gate's key is this client's own")
	}
	return nil
}

// complete turns the reply into a tunnel with keys, address and route.
func (t *Tunnel) complete(o Options, takeOver bool) error {
	s := &t.Session
	_, port, _ := splitEndpoint(s.Endpoint)
	// The gate answered at this address, whatever it calls itself; the window is open there.
	t.Gate = netip.AddrPortFrom(t.Gate.Addr().Unmap(), port)
	var err error
	if t.endpoint, err = t.wire.ParseEndpoint(t.Gate.String()); err != nil {
		return err
	}
	t.wire.gate.Store(&t.Gate)
	key, response := wgKey(s.ServerPublicKey), s.Response
	if key != o.Profile.typed.serverKey { // rotated since the profile was made: the initiation was for another
		if err := t.dev.IpcSet("public_key=" + o.Profile.typed.serverKey.hex() + "\nremove=true\n"); err != nil {
			return err
		}
		if err := t.addPeer(key); err != nil {
			return err
		}
		response = nil
	}
	if err := t.dev.IpcSet(peerConfig(s)); err != nil {
		return err
	}
	t.shared = s.PresharedKey
	s.PresharedKey, s.Response = nil, nil
	t.peer.SetEndpointFromPacket(t.endpoint)
	if t.responded = response != nil; t.responded {
		if err := t.wire.Inject(response, t.endpoint); err != nil {
			return err
		}
	}
	if t.configured {
		return nil
	}
	return t.link.Configure(s.Address.Addr(), s.Proxy.Addr(), s.MTU, takeOver)
}

// keepAlive begins when there are keys: without, it begins a handshake of its own.
func (t *Tunnel) keepAlive() error {
	return t.dev.IpcSet(fmt.Sprintf("public_key=%s\nupdate_only=true\npersistent_keepalive_interval=%d\n", wgKey(t.Session.ServerPublicKey).hex(), t.Session.Keepalive))
}

// waitKeys returns when the device has keys: from the reply's response, or else from a handshake.
func (t *Tunnel) waitKeys(ctx context.Context) error {
	if t.responded {
		select {
		case <-t.wire.keyed:
			return nil
		case <-time.After(responsePatience):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	t.peer.ExpireCurrentKeypairs() // also lets it send at once
	if err := t.peer.SendHandshakeInitiation(false); err != nil {
		return fmt.Errorf("WireGuard handshake with %v: %w", t.Gate, err)
	}
	select {
	case <-t.wire.keyed:
		t.proven = true
		return nil
	case <-ctx.Done():
		return fmt.Errorf("the gate gave a session, but UDP port %d of %v does not answer, and the gate takes no packets by TLS: "+
			"a network on the way seems to block UDP", t.Gate.Port(), t.Gate.Addr())
	}
}

// Probe connects to the proxy through the tunnel. A refusal counts: it came through.
func (t *Tunnel) Probe(ctx context.Context) error {
	conn, err := t.link.DialContext(ctx, "tcp", t.Session.Proxy.String())
	if err == nil {
		return conn.Close()
	}
	if errors.Is(err, syscall.ECONNREFUSED) {
		return nil
	}
	return err
}

// Stats are a tunnel's counters: authenticated bytes, by UDP and inside the request.
type Stats struct {
	LastHandshake time.Time
	Received      uint64
	Sent          uint64
}

// Stats reads the counters. The listing they come from holds keys and goes nowhere else.
func (t *Tunnel) Stats() (s Stats) {
	text, _ := t.dev.IpcGet()
	var sec, nsec int64
	for lines := bufio.NewScanner(strings.NewReader(text)); lines.Scan(); {
		key, value, _ := strings.Cut(lines.Text(), "=")
		switch key {
		case "last_handshake_time_sec":
			sec, _ = strconv.ParseInt(value, 10, 64)
		case "last_handshake_time_nsec":
			nsec, _ = strconv.ParseInt(value, 10, 64)
		case "rx_bytes":
			s.Received, _ = strconv.ParseUint(value, 10, 64)
		case "tx_bytes":
			s.Sent, _ = strconv.ParseUint(value, 10, 64)
		}
	}
	if sec != 0 {
		s.LastHandshake = time.Unix(sec, nsec)
	}
	return s
}

// revive knocks and shakes hands again, in one flight and from the tunnel's socket: the gate follows the tunnel to where
// this machine is now, and connections inside it live on.
func (t *Tunnel) revive(tokens *Tokens, tunnelPort uint16) error {
	return errors.Join(t.knock(tokens, tunnelPort), t.rekey()) // the gate lets a new place stay by a handshake alone
}

// knock sends the token of now, the same one again while it is of now.
func (t *Tunnel) knock(tokens *Tokens, tunnelPort uint16) error {
	token, err := tokens.Repeated(t.Gate.Addr(), time.Now())
	if err != nil {
		return err
	}
	return t.wire.token(token[:], netip.AddrPortFrom(t.Gate.Addr(), tunnelPort))
}

// initiateAgain says whether the device made an initiation: under five seconds after the last one it makes none.
func (t *Tunnel) initiateAgain() (bool, error) {
	before := t.wire.initiation.Load()
	err := t.peer.SendHandshakeInitiation(false)
	return t.wire.initiation.Load() != before, err
}

// shake sends an initiation: a new one, or the last unanswered one again.
func (t *Tunnel) shake() error {
	fresh, err := t.initiateAgain()
	if i := t.wire.initiation.Load(); !fresh && i != nil {
		err = errors.Join(err, t.wire.Bind.Send([][]byte{i.datagram}, i.to))
		go t.wire.resend(i, time.Now(), func() bool { return t.wire.initiation.Load() == i })
	}
	return err
}

// ask knocks from the tunnel's socket, shakes hands, and asks the gate by TLS to take the tunnel's packets there. That
// answers too whether it knows the session: nil, or its refusal as in Open. Packets and handshake do not wait for it.
func (t *Tunnel) ask(ctx context.Context, o Options) error {
	began := time.Now()
	d := Dialer{Profile: o.Profile, Tokens: o.Tokens, SendToken: func(token []byte, to netip.AddrPort) error {
		return errors.Join(t.wire.token(token, to), t.shake())
	}}
	conn, err := d.Dial(ctx)
	if err != nil {
		return err
	}
	g, err := o.Profile.handshake(ctx, conn)
	if err != nil {
		return err
	}
	if t.wire.answered.Load() > began.UnixNano() && !t.wire.onStream() { // by UDP, and only a session that stands is answered
		return g.Close()
	}
	answer := make(chan error, 1)
	if err := t.attach(g, func(err error) { answer <- err }); err != nil {
		return err
	}
	if err := t.rekey(); err != nil { // through the door that is surely open now
		return err
	}
	select {
	case err := <-answer:
		var api *vpn.APIError
		if errors.As(err, &api) && api.Code == vpn.CodeNoStream { // and it knows the session
			return nil
		}
		return err
	case <-ctx.Done():
		return fmt.Errorf("the gate gave no answer in time: %w", ctx.Err())
	}
}

// rekey shakes hands anew, however short ago the last one was: a gate that was restarted knows no keys.
func (t *Tunnel) rekey() error {
	t.peer.ExpireCurrentKeypairs()
	return t.peer.SendHandshakeInitiation(false)
}

// tryUDP knocks, and shakes hands by UDP alone: an answer makes it the way.
func (t *Tunnel) tryUDP(tokens *Tokens, tunnelPort uint16) {
	_ = t.knock(tokens, tunnelPort) // the window may be open without
	t.wire.trying.Store(true)
	defer t.wire.trying.Store(false)
	_ = t.peer.SendHandshakeInitiation(false) // the next try comes
}

// Close ends the tunnel here. The peers go first: the device would write to a closed interface.
func (t *Tunnel) Close() {
	t.wire.leave()
	t.dev.RemoveAllPeers()
	t.dev.Close()
}

func endSession(ctx context.Context, g *gateConn, id string) error {
	err := g.do(ctx, http.MethodDelete, vpn.SessionPath+"/"+id, nil, nil)
	if forgotten(err) {
		return nil
	}
	return err
}

// EndSession knocks, and tells the gate that a session is over.
func EndSession(ctx context.Context, p *Profile, tokens *Tokens, id string) error {
	g, err := p.connect(ctx, tokens)
	if err != nil {
		return err
	}
	defer g.Close()
	return endSession(ctx, g, id)
}
