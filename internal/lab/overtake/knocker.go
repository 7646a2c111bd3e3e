//go:build linux

package main

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun/tuntest"

	"perimeterd/vpn"
	"perimeterd/vpn/client"
)

func base64Of(b []byte) string { return base64.StdEncoding.EncodeToString(b) }

// knocker is the process in the client's namespace.
func knocker(ctx context.Context, file string) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var t task
	if err := json.Unmarshal(text, &t); err != nil {
		return err
	}
	k := &sender{task: t}
	if k.link, err = netlink.LinkByName("outside"); err != nil {
		return err
	}
	w, err := k.session(ctx)
	if err != nil {
		return err
	}
	defer w.dev.Close()
	defer w.dev.RemoveAllPeers()
	var n counts
	for i := range t.Knocks { // interleaved, so that a moment's load meets all alike
		for _, knock := range []func(context.Context, int) (time.Duration, bool, error){k.bare, k.cold, w.warm} {
			if err := k.move(); err != nil {
				return err
			}
			took, answered, err := knock(ctx, i)
			if err != nil {
				return err
			}
			of := []*kind{&n.Bare, &n.Cold, &n.Warm}[k.moves%3]
			if answered {
				of.Answered++
				of.Took = append(of.Took, took)
			}
			k.moves++
		}
	}
	return json.NewEncoder(os.Stdout).Encode(n)
}

type sender struct {
	task
	link  netlink.Link
	moves int
}

// move gives the next knock a source address of its own: its door is closed.
func (k *sender) move() error {
	n := k.moves + 1
	return netlink.RouteReplace(&netlink.Route{LinkIndex: k.link.Attrs().Index, Scope: netlink.SCOPE_LINK,
		Dst: &net.IPNet{IP: k.To.AsSlice(), Mask: net.CIDRMask(32, 32)}, Src: net.IPv4(198, 18, 128|byte(n>>8), byte(n))})
}

// user is the one whose token the next knock spends.
func (k *sender) user() (*client.Profile, *client.Tokens, error) {
	n := k.moves % len(k.Secrets)
	p, err := profileOf(k.Profile, n, k.Secrets[n])
	if err != nil {
		return nil, nil, err
	}
	tokens, err := client.NewTokens(p)
	return p, tokens, err
}

// cold is what `knock` and `vpn up` do.
func (k *sender) cold(ctx context.Context, _ int) (time.Duration, bool, error) {
	p, tokens, err := k.user()
	if err != nil {
		return 0, false, err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	start := time.Now()
	conn, err := (&client.Dialer{Profile: p, Tokens: tokens}).Dial(ctx)
	if err != nil {
		return 0, false, nil
	}
	defer conn.Close()
	return time.Since(start), true, nil
}

// bare is a token, and one SYN right behind it, which the kernel repeats after a second.
func (k *sender) bare(ctx context.Context, _ int) (time.Duration, bool, error) {
	_, tokens, err := k.user()
	if err != nil {
		return 0, false, err
	}
	token, err := tokens.Next(time.Now())
	if err != nil {
		return 0, false, err
	}
	udp, err := net.Dial("udp", netip.AddrPortFrom(k.To, vpn.DefaultPort).String())
	if err != nil {
		return 0, false, err
	}
	defer udp.Close()
	start := time.Now()
	if _, err := udp.Write(token[:]); err != nil {
		return 0, false, err
	}
	conn, err := (&net.Dialer{Timeout: 900 * time.Millisecond}).DialContext(ctx, "tcp", netip.AddrPortFrom(k.To, vpn.DefaultPort).String())
	if err != nil {
		return 0, false, nil
	}
	conn.Close()
	return time.Since(start), true, nil
}

// roamer is a session whose peer moves.
type roamer struct {
	*sender
	dev  *device.Device
	bind *keeping
	peer *device.Peer
}

// keeping keeps the last initiation.
type keeping struct {
	*vpn.Bind
	initiation atomic.Pointer[[]byte]
}

func (k *keeping) Send(bufs [][]byte, to conn.Endpoint) error {
	if len(bufs[0]) == vpn.InitiationSize {
		kept := bytes.Clone(bufs[0])
		k.initiation.Store(&kept)
	}
	return k.Bind.Send(bufs, to)
}

// resends are when our client sends an unanswered initiation again.
var resends = []time.Duration{30 * time.Millisecond, 90 * time.Millisecond, 250 * time.Millisecond}

// session asks the gate for one, as curl would.
func (k *sender) session(ctx context.Context) (*roamer, error) {
	alice, err := client.ParseProfile([]byte(k.Profile))
	if err != nil {
		return nil, err
	}
	tokens, err := client.NewTokens(alice)
	if err != nil {
		return nil, err
	}
	door, err := (&client.Dialer{Profile: alice, Tokens: tokens}).Dial(ctx)
	if err != nil {
		return nil, err
	}
	door.Close() // the window is open now
	pair, err := tls.X509KeyPair([]byte(alice.Certificate), []byte(alice.Key))
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(alice.CA))
	gate := http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, ServerName: alice.ServerID, Certificates: []tls.Certificate{pair}}}}
	private, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	body, err := json.Marshal(vpn.SessionRequest{PublicKey: private.PublicKey().Bytes()})
	if err != nil {
		return nil, err
	}
	resp, err := gate.Post("https://"+alice.Endpoints[0]+vpn.SessionPath, "application/json", bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	var s vpn.SessionReply
	if err := json.NewDecoder(resp.Body).Decode(&s); err != nil || resp.StatusCode != http.StatusCreated {
		return nil, fmt.Errorf("session: %s, %v", resp.Status, err)
	}
	r := &roamer{sender: k, bind: &keeping{Bind: vpn.NewBind()}}
	r.dev = device.NewDevice(tuntest.NewChannelTUN().TUN(), r.bind, device.NewLogger(device.LogLevelSilent, ""))
	if err := r.dev.IpcSet(fmt.Sprintf("private_key=%x\npublic_key=%x\npreshared_key=%x\nendpoint=%s\nallowed_ip=%v/32\n",
		private.Bytes(), s.ServerPublicKey, s.PresharedKey, s.Endpoint, s.Proxy.Addr())); err != nil {
		return nil, err
	}
	r.peer = r.dev.LookupPeer(device.NoisePublicKey(s.ServerPublicKey))
	return r, r.dev.Up()
}

// warm sends a token and a handshake's initiation behind it, from the device's own socket.
func (r *roamer) warm(_ context.Context, _ int) (time.Duration, bool, error) {
	_, tokens, err := r.user()
	if err != nil {
		return 0, false, err
	}
	token, err := tokens.Next(time.Now())
	if err != nil {
		return 0, false, err
	}
	to, err := r.bind.ParseEndpoint(netip.AddrPortFrom(r.To, vpn.DefaultPort).String())
	if err != nil {
		return 0, false, err
	}
	r.peer.SetEndpointFromPacket(to) // and no source of before
	r.peer.ExpireCurrentKeypairs()   // or the device would wait five seconds
	before := r.handshake()
	start := time.Now()
	if err := r.bind.Send([][]byte{token[:]}, to); err != nil {
		return 0, false, err
	}
	if err := r.peer.SendHandshakeInitiation(false); err != nil {
		return 0, false, err
	}
	left := resends
	for time.Since(start) < time.Second {
		if len(left) > 0 && time.Since(start) > left[0] {
			left = left[1:]
			if err := r.bind.Bind.Send([][]byte{*r.bind.initiation.Load()}, to); err != nil {
				return 0, false, err
			}
		}
		if r.handshake() != before {
			took := time.Since(start)
			// A gate takes 50 initiations a second of a peer.
			time.Sleep(time.Until(start.Add(25 * time.Millisecond)))
			return took, true, nil
		}
		time.Sleep(50 * time.Microsecond)
	}
	return 0, false, nil
}

func (r *roamer) handshake() (at string) {
	text, _ := r.dev.IpcGet()
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "last_handshake_time_") {
			at += line
		}
	}
	return at
}
