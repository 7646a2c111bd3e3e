package client

import (
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"time"

	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"

	"perimeterd/vpn"
)

// handshakePatience is for two initiations, which are five seconds apart, and each of which is sent several times.
const handshakePatience = 6500 * time.Millisecond

// session says whether a session comes up, and whether the gate answers by UDP. A tunnel that is up is asked; where it is
// down, a session without an interface is tried, unless the certificate has one somewhere: a further one could end it.
func (d *Doctor) session(ctx context.Context, g *gateConn, list []vpn.SessionReply, how opened) {
	asking, cancel := context.WithTimeout(ctx, gatePatience)
	defer cancel()
	_, err := AskStatus(asking, d.Profile)
	switch {
	case !errors.Is(err, ErrDown): // inside looks at it
		return
	case len(list) > 0:
		text := fmt.Sprintf("the gate has %d of this certificate, and none is this machine's: another is not tried", len(list))
		if how.token == nil {
			text += "; UDP reaches the gate, since the token did"
		}
		d.well("session", "%s", text)
		if d.doubt {
			d.passes(false)
		}
		return
	}
	handshake, err := d.trySession(ctx, g)
	var api *vpn.APIError
	switch {
	case errors.As(err, &api):
		d.found(Problem, "session", CodeRefused, "the gate gives none: "+api.Message, api.Fix)
	case err != nil:
		d.found(Problem, "session", CodeRefused, err.Error(), "")
	case handshake == 0:
		d.well("session", "the gate gives one; it was ended again")
		d.passes(false)
	default:
		d.well("session", "the gate gives one; it was ended again")
		d.well("udp", "port %d answers a handshake (%d ms)", d.Profile.TunnelPort, handshake.Milliseconds())
		d.passes(true)
	}
	if d.doubt {
		d.passes(false)
	}
}

// trySession begins a session, shakes hands by UDP alone, and ends it. Zero: there was no answer by UDP.
func (d *Doctor) trySession(ctx context.Context, g *gateConn) (handshake time.Duration, err error) {
	private, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return 0, err
	}
	var s vpn.SessionReply
	asking, cancel := context.WithTimeout(ctx, gatePatience)
	defer cancel()
	request := vpn.SessionRequest{PublicKey: private.PublicKey().Bytes(), Device: "vpn doctor"}
	if err := g.do(asking, http.MethodPost, vpn.SessionPath, request, &s); err != nil {
		return 0, err
	}
	if err := checkReply(&s); err != nil {
		return 0, err
	}
	defer func() {
		ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), endPatience)
		defer cancel()
		if e := endSession(ending, g, s.ID); e != nil && err == nil {
			err = fmt.Errorf("the session %s was begun and not ended; it expires by itself: %w", s.ID, e)
		}
	}()
	_, port, err := splitEndpoint(s.Endpoint)
	if err != nil {
		return 0, err
	}
	t := Tunnel{wire: newWire()}
	t.dev = device.NewDevice(newNoTUN(), t.wire, &device.Logger{Verbosef: device.DiscardLogf, Errorf: device.DiscardLogf})
	defer t.Close()
	if err := t.dev.IpcSet(fmt.Sprintf("private_key=%x\npublic_key=%x\npreshared_key=%x\nendpoint=%v\nallowed_ip=%v/32\npersistent_keepalive_interval=1\n",
		private.Bytes(), s.ServerPublicKey, s.PresharedKey, netip.AddrPortFrom(d.gate.Addr(), port), s.Proxy.Addr())); err != nil {
		return 0, err
	}
	start := time.Now()
	if err := t.dev.Up(); err != nil {
		return 0, fmt.Errorf("UDP socket: %w", err)
	}
	for time.Since(start) < handshakePatience && ctx.Err() == nil {
		if !t.Stats().LastHandshake.IsZero() {
			return max(time.Since(start), 1), nil
		}
		time.Sleep(5 * time.Millisecond)
	}
	return 0, ctx.Err()
}

// noTUN is the inner end of a device that only shakes hands.
type noTUN struct {
	events chan tun.Event
	closed chan struct{}
}

func newNoTUN() *noTUN { return &noTUN{make(chan tun.Event), make(chan struct{})} }

func (*noTUN) File() *os.File             { return nil }
func (*noTUN) MTU() (int, error)          { return minMTU, nil }
func (*noTUN) Name() (string, error)      { return "none", nil }
func (*noTUN) BatchSize() int             { return 1 }
func (n *noTUN) Events() <-chan tun.Event { return n.events }

func (n *noTUN) Read([][]byte, []int, int) (int, error) {
	<-n.closed
	return 0, os.ErrClosed
}

func (*noTUN) Write(bufs [][]byte, _ int) (int, error) { return len(bufs), nil }

// Close implements tun.Device. The device calls it once.
func (n *noTUN) Close() error {
	close(n.closed)
	close(n.events)
	return nil
}
