package gate

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun/tuntest"

	"perimeterd/internal/session"
	"perimeterd/vpn"
)

// client is a WireGuard client whose session came with its handshake.
type client struct {
	dev        *device.Device
	tun        *tuntest.ChannelTUN
	public     session.Key
	address    netip.Addr
	id         session.ID
	initiation []byte       // that travelled in the request
	asked      atomic.Int64 // initiations that the server sent it
}

// join brings a client's tunnel up by its request's handshake. Its data go to the server's UDP port.
func (b *bench) join(name string) *client {
	b.t.Helper()
	c := &client{tun: tuntest.NewChannelTUN()}
	private, public := keyPair(b.t)
	c.public = public
	bind := &watched{Bind: vpn.NewBind(), heed: func([]byte) bool { c.asked.Add(1); return true }}
	c.dev = device.NewDevice(c.tun.TUN(), bind, device.NewLogger(device.LogLevelSilent, ""))
	b.t.Cleanup(func() { whileTaken(c.tun, c.dev.Close) })
	must := func(err error) {
		b.t.Helper()
		if err != nil {
			b.t.Fatal(err)
		}
	}
	must(c.dev.IpcSet(fmt.Sprintf("private_key=%x\npublic_key=%x\nallowed_ip=10.77.0.1/32\n", private, b.serverWG)))
	must(c.dev.Up())
	flight := vpn.NewFlight(netip.MustParseAddrPort("127.0.0.1:9"))
	server := c.dev.LookupPeer(b.serverWG)
	server.SetEndpointFromPacket(flight)
	must(server.SendHandshakeInitiation(false))
	c.initiation = <-flight.Message()
	body, err := json.Marshal(vpn.SessionRequest{PublicKey: public[:], Initiation: c.initiation})
	must(err)
	status, answer, err := b.do(b.user(name, "mac", time.Hour), "POST", vpn.SessionPath, string(body))
	var reply vpn.SessionReply
	if err != nil || status != 201 || json.Unmarshal(answer, &reply) != nil || len(reply.Response) != vpn.ResponseSize {
		b.t.Fatalf("%d %s %v", status, answer, err)
	}
	c.address = reply.Address.Addr()
	c.id, err = session.ParseID(reply.ID)
	must(err)
	to := fmt.Sprintf("127.0.0.1:%d", listenPort(b.t, b.tunnel.engine.(userspace).Device))
	endpoint, err := bind.ParseEndpoint(to)
	must(err)
	must(c.dev.IpcSet(fmt.Sprintf("public_key=%x\nupdate_only=true\npreshared_key=%x\nendpoint=%s\n", b.serverWG, reply.PresharedKey, to)))
	must(bind.Inject(reply.Response, endpoint))
	return c
}

var server = netip.MustParseAddr("10.77.0.1")

// arrives puts packets in at one end until one comes out at the other.
func arrives(t *testing.T, packet []byte, in chan<- []byte, out <-chan []byte, what string) {
	t.Helper()
	again := time.NewTicker(200 * time.Millisecond)
	defer again.Stop()
	for deadline := time.After(20 * time.Second); ; {
		select {
		case in <- packet:
		case <-deadline:
			t.Fatal("nothing comes through ", what)
		}
		select {
		case <-out:
			return
		case <-again.C:
		case <-deadline:
			t.Fatal("nothing comes through ", what)
		}
	}
}

func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !holds(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("never: ", what)
		}
	}
}

// freePort is a UDP port that a tunnel can have twice.
func freePort(t *testing.T) uint16 {
	t.Helper()
	c, err := net.ListenUDP("udp", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	return uint16(c.LocalAddr().(*net.UDPAddr).Port)
}

func TestAfterARestartTheServerBeginsTheHandshake(t *testing.T) {
	b := newBench(t, func(c *Config) { c.TunnelPort = freePort(t) })
	c := b.join("alice")
	arrives(t, tuntest.Ping(server, c.address), c.tun.Outbound, b.tun.Inbound, "to the server")
	eventually(t, "the handshake is noted", func() bool { s, _ := b.store.Get(c.id); return s.Seen.Endpoint.IsValid() && s.Seen.Stamp != [12]byte{} })
	before, _ := b.store.Get(c.id)
	b.stop()
	b.door.Dismiss(c.address)
	b.door.RemovePeer(before.Seen.Endpoint)

	b.startTunnel()
	if s, ok := b.store.Get(c.id); !ok || s.PublicKey != c.public || s.Address != c.address || s.PresharedKey != before.PresharedKey {
		t.Fatalf("came back as %+v", s)
	}
	if admitted, peers := b.door.sizes(); admitted != 1 || peers != 1 {
		t.Errorf("%d addresses and %d endpoints are let through before the client has done anything, want its own", admitted, peers)
	}
	// Nothing is sent at either end.
	eventually(t, "the server begins a handshake", func() bool { return c.asked.Load() > 0 })
	arrives(t, tuntest.Ping(c.address, server), b.tun.Outbound, c.tun.Inbound, "to a client that knows of no restart")
	arrives(t, tuntest.Ping(server, c.address), c.tun.Outbound, b.tun.Inbound, "to the server after its restart")
}

func TestAfterARestartNobodyIsSoughtWhereHeWasLongAgoOrHasNotProvenHisKey(t *testing.T) {
	b := newBench(t, func(c *Config) { c.TunnelPort = freePort(t) })
	listener, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	stale := listener.LocalAddr().(*net.UDPAddr).AddrPort()
	_, old := keyPair(t)
	gone := b.post(b.user("gone", "mac", time.Hour), old)
	_, never := keyPair(t)
	b.post(b.user("never", "mac", time.Hour), never)
	id, err := session.ParseID(gone.ID)
	if err != nil {
		t.Fatal(err)
	}
	ago := time.Now().Add(-keysLife - time.Second).UTC()
	for _, at := range []time.Time{ago, time.Now().Add(time.Hour).UTC()} { // the second: the clock was set back since
		if err := b.store.Note(map[session.ID]session.Seen{id: {Endpoint: stale, Handshake: at}}); err != nil {
			t.Fatal(err)
		}
		b.stop()
		b.startTunnel()
		if admitted, peers := b.door.sizes(); admitted != 1 || peers != 0 {
			t.Errorf("%d addresses and %d endpoints are let through, want the one that proved its key, and none", admitted, peers)
		}
		if n := b.tunnel.Pending(); n != 1 {
			t.Errorf("%d pending, want the one that never proved its key", n)
		}
		// What the host sends him now leads nowhere either.
		select {
		case b.tun.Outbound <- tuntest.Ping(gone.Address.Addr(), server):
		case <-time.After(20 * time.Second):
			t.Fatal("the tunnel takes no packet")
		}
		listener.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
		if n, _, err := listener.ReadFromUDP(make([]byte, 2000)); err == nil {
			t.Errorf("%d bytes were sent to where a client was %v", n, time.Since(at))
		}
	}
}

// A device forgets its peers' stamps when it ends, and a replay moves the endpoint: what was answered before a restart must
// not be answered after it.
func TestInitiationOfBeforeARestartIsAReplay(t *testing.T) {
	b := newBench(t, func(c *Config) { c.TunnelPort = freePort(t) })
	c := b.join("alice")
	arrives(t, tuntest.Ping(server, c.address), c.tun.Outbound, b.tun.Inbound, "to the server")
	eventually(t, "the stamp is noted", func() bool { s, _ := b.store.Get(c.id); return s.Seen.Stamp != [12]byte{} })
	b.stop()
	b.startTunnel()
	thief, err := net.DialUDP("udp", nil, &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: int(b.cfg.TunnelPort)})
	if err != nil {
		t.Fatal(err)
	}
	defer thief.Close()
	answered := func(message []byte, wait time.Duration) bool {
		if _, err := thief.Write(message); err != nil {
			t.Fatal(err)
		}
		thief.SetReadDeadline(time.Now().Add(wait))
		n, err := thief.Read(make([]byte, 2000))
		return err == nil && n == vpn.ResponseSize
	}
	if answered(c.initiation, 500*time.Millisecond) {
		t.Error("an initiation of before the restart was answered to who replays it")
	}
	// Not because nothing is: one that is new is taken, from wherever it comes.
	p := c.dev.LookupPeer(b.serverWG)
	p.ExpireCurrentKeypairs()
	flight := vpn.NewFlight(netip.MustParseAddrPort("127.0.0.1:9"))
	p.SetEndpointFromPacket(flight)
	if err := p.SendHandshakeInitiation(false); err != nil {
		t.Fatal(err)
	}
	if !answered(<-flight.Message(), 20*time.Second) {
		t.Error("a new initiation is not answered")
	}
}

func TestFloodOfInitiationsEndsTheReadingAndLetsNoReplayPass(t *testing.T) {
	b := newBench(t, nil)
	c := b.join("alice")
	b.tunnel.reading.SetBurst(0)
	b.tunnel.reading.SetLimit(0)
	if !b.tunnel.heed(c.initiation) {
		t.Error("with nothing to compare it with an initiation is the device's to judge")
	}
	b.tunnel.mu.Lock()
	b.tunnel.barred = 1
	b.tunnel.mu.Unlock()
	if b.tunnel.heed(c.initiation) {
		t.Error("an initiation passed unread while replays are barred")
	}
}

func TestGarbageDoesNotUseUpTheReading(t *testing.T) {
	b := newBench(t, nil)
	b.join("alice")
	b.tunnel.reading.SetLimit(0)
	garbage := make([]byte, vpn.InitiationSize)
	garbage[0] = 1
	for range 2 * readBurst {
		b.tunnel.heed(garbage)
	}
	if b.tunnel.reading.Tokens() < readBurst-10 {
		t.Errorf("%v of %d initiations may still be read", b.tunnel.reading.Tokens(), readBurst)
	}
}

func TestEndpointNeedsAWindowAgainInTimeWhateverTheClockDoes(t *testing.T) {
	now := time.Unix(1e9, 0)
	day := session.Session{Expires: now.Add(24 * time.Hour)}
	for _, c := range []struct {
		what      string
		s         session.Session
		handshake time.Time
		want      time.Time
	}{
		{"just now", day, now, now.Add(endpointLife)},
		{"a minute ago", day, now.Add(-time.Minute), now.Add(endpointLife - time.Minute)},
		{"the session ends before", session.Session{Expires: now.Add(time.Minute)}, now, now.Add(time.Minute)},
		{"the clock was set back a day since", day, now.Add(24 * time.Hour), now.Add(endpointLife)},
		{"the clock was set forward a day since", day, now.Add(-24 * time.Hour), now.Add(endpointLife - 24*time.Hour)},
	} {
		if got := endpointEnd(c.s, c.handshake, now); !got.Equal(c.want) {
			t.Errorf("%s: %v from now, want %v", c.what, got.Sub(now), c.want.Sub(now))
		}
	}
}
