//go:build linux

package swarm

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"sync/atomic"
	"time"

	"golang.zx2c4.com/wireguard/device"

	"perimeterd/knock"
	"perimeterd/vpn"
)

// Member is one client.
type Member struct {
	Name    string
	Address netip.Addr // inner
	Outer   netip.Addr
	Session vpn.SessionReply

	swarm *Swarm

	certificate tls.Certificate
	secret      []byte
	in          chan []byte // packets for the tunnel
	out         atomic.Pointer[device.Device]
	knocks      atomic.Uint32
	echoes      chan struct{} // gets a token for each answer to an echo
}

// join knocks, asks for a session, and brings the tunnel up by the handshake in the request.
func (m *Member) join(ctx context.Context) error {
	s := m.swarm
	private, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	b := &bind{member: m, injected: make(chan []byte, 1)}
	dev := device.NewDevice(&tun{member: m, closed: make(chan struct{})}, b, device.NewLogger(device.LogLevelSilent, ""))
	fail := func(err error) error {
		dev.Close()
		return err
	}
	if err := dev.IpcSet(fmt.Sprintf("private_key=%x\npublic_key=%x\nallowed_ip=10.77.0.1/32\n", private.Bytes(), s.server)); err != nil {
		return fail(err)
	}
	if err := dev.Up(); err != nil {
		return fail(err)
	}
	first := &firstMessage{out: make(chan []byte, 1)}
	gate := dev.LookupPeer(s.server)
	gate.SetEndpointFromPacket(first)
	if err := gate.SendHandshakeInitiation(false); err != nil {
		return fail(err)
	}
	if err := b.knock(); err != nil {
		return fail(err)
	}
	body, err := json.Marshal(vpn.SessionRequest{PublicKey: private.PublicKey().Bytes(), Initiation: <-first.out, Device: "lab"})
	if err != nil {
		return fail(err)
	}
	if err := m.Ask(ctx, http.MethodPost, vpn.SessionPath, body, &m.Session); err != nil {
		return fail(err)
	}
	if len(m.Session.Response) != vpn.ResponseSize {
		return fail(errors.New("the gate gave no response to the handshake"))
	}
	m.Address = m.Session.Address.Addr()
	if err := dev.IpcSet(fmt.Sprintf("public_key=%x\nupdate_only=true\npreshared_key=%x\nendpoint=%v\npersistent_keepalive_interval=25\n", s.server, m.Session.PresharedKey, s.gate)); err != nil {
		return fail(err)
	}
	if err := b.inject(m.Session.Response); err != nil {
		return fail(err)
	}
	m.out.Store(dev)
	return nil
}

// Ask makes a request of the session API, on a connection of its own from the member's outer address. The window must be open, or
// opening. Reply may be nil.
func (m *Member) Ask(ctx context.Context, method, path string, body []byte, reply any) error {
	conn, err := m.Call(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	if deadline, ok := ctx.Deadline(); ok {
		conn.SetDeadline(deadline)
	}
	req, err := http.NewRequestWithContext(ctx, method, "https://"+m.swarm.name+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	if err := req.Write(conn); err != nil {
		return err
	}
	answer, err := http.ReadResponse(bufio.NewReader(conn), req)
	if err != nil {
		return err
	}
	text, err := io.ReadAll(answer.Body)
	if err != nil {
		return err
	}
	if answer.StatusCode/100 != 2 {
		return fmt.Errorf("the gate says %s: %s", answer.Status, text)
	}
	if reply == nil {
		return nil
	}
	return json.Unmarshal(text, reply)
}

// Call connects to the gate by TLS. A SYN may overtake the knock: then the next one gets through.
func (m *Member) Call(ctx context.Context) (*tls.Conn, error) {
	s := m.swarm
	for patience := 50 * time.Millisecond; ; patience *= 2 {
		attempt, cancel := context.WithTimeout(ctx, patience)
		raw, err := s.lab.Client.DialFrom(attempt, m.Outer, "tcp", s.gate.String())
		cancel()
		if err != nil {
			if patience > 4*time.Second || ctx.Err() != nil {
				return nil, err
			}
			continue
		}
		conn := tls.Client(raw, &tls.Config{MinVersion: tls.VersionTLS13, ServerName: s.name, RootCAs: s.roots, Certificates: []tls.Certificate{m.certificate}})
		if err := conn.HandshakeContext(ctx); err != nil {
			raw.Close()
			return nil, err
		}
		return conn, nil
	}
}

// Dial connects through the tunnel.
func (m *Member) Dial(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	return m.swarm.lab.Client.DialFrom(ctx, m.Address, "tcp", to.String())
}

// Handshake shakes hands anew by UDP, and reports when keys are there.
func (m *Member) Handshake(ctx context.Context) error {
	dev := m.out.Load()
	p := dev.LookupPeer(m.swarm.server)
	p.ExpireCurrentKeypairs()
	before := m.LastHandshake()
	if err := p.SendHandshakeInitiation(false); err != nil {
		return err
	}
	for m.LastHandshake().Equal(before) {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Millisecond):
		}
	}
	return nil
}

// echoEvery is how often Echo asks again.
const echoEvery = 10 * time.Millisecond

// Echo asks the server for an answer through the tunnel (ICMP, RFC 792) until one comes.
func (m *Member) Echo(ctx context.Context) error {
	for {
		select {
		case <-m.echoes:
			continue // of an earlier one
		default:
		}
		break
	}
	packet := echo(m.Address, netip.MustParseAddr("10.77.0.1"))
	for {
		select {
		case m.in <- packet:
		case <-ctx.Done():
			return ctx.Err()
		}
		select {
		case <-m.echoes:
			return nil
		case <-time.After(echoEvery):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// token is the member's next knock.
func (m *Member) token() knock.Token {
	n := m.knocks.Add(1) - 1
	return knock.NewToken(m.secret, m.swarm.knock, knock.StepAt(time.Now(), m.swarm.step), uint8(n%knock.Indexes))
}

func (m *Member) close() {
	if dev := m.out.Swap(nil); dev != nil {
		dev.RemoveAllPeers()
		dev.Close()
	}
}

// Knock sends the member's next token, from its tunnel's socket.
func (m *Member) Knock() error {
	b, ok := m.out.Load().Bind().(*bind)
	if !ok {
		return errors.New("the tunnel is down")
	}
	return b.knock()
}
