package gate

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun/tuntest"

	"perimeterd/internal/session"
	"perimeterd/vpn"
)

// peer makes the client's side of a tunnel whose initiation is handed out instead of sent.
func newPeer(t *testing.T, server [32]byte) (dev *device.Device, bind *vpn.Bind, tun *tuntest.ChannelTUN, public [32]byte, initiation []byte) {
	t.Helper()
	private, public := keyPair(t)
	bind, tun = vpn.NewBind(), tuntest.NewChannelTUN()
	dev = device.NewDevice(tun.TUN(), bind, device.NewLogger(device.LogLevelSilent, ""))
	t.Cleanup(func() { whileTaken(tun, dev.Close) })
	flight := vpn.NewFlight(netip.MustParseAddrPort("127.0.0.1:9"))
	if err := dev.IpcSet(fmt.Sprintf("private_key=%x\npublic_key=%x\nallowed_ip=10.77.0.1/32\n", private, server)); err != nil {
		t.Fatal(err)
	}
	if err := dev.Up(); err != nil {
		t.Fatal(err)
	}
	p := dev.LookupPeer(server)
	p.SetEndpointFromPacket(flight)
	if err := p.SendHandshakeInitiation(false); err != nil {
		t.Fatal(err)
	}
	return dev, bind, tun, public, <-flight.Message()
}

func TestHandshakeInTheRequestBringsTheTunnelUpAndDataAdmits(t *testing.T) {
	b := newBench(t, nil)
	alice := b.user("alice", "mac", time.Hour)
	dev, bind, inner, public, initiation := newPeer(t, b.serverWG)
	body, _ := json.Marshal(vpn.SessionRequest{PublicKey: public[:], Initiation: initiation})
	status, answer, err := b.do(alice, "POST", vpn.SessionPath, string(body))
	var reply vpn.SessionReply
	if err != nil || status != 201 || json.Unmarshal(answer, &reply) != nil || len(reply.Response) != vpn.ResponseSize {
		t.Fatalf("%d %s %v", status, answer, err)
	}
	if a, _ := b.door.sizes(); a != 0 {
		t.Fatal("admitted before the key was proven")
	}
	port := listenPort(t, b.tunnel.engine.(userspace).Device)
	endpoint, err := bind.ParseEndpoint(fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		t.Fatal(err)
	}
	if err := dev.IpcSet(fmt.Sprintf("public_key=%x\nupdate_only=true\npreshared_key=%x\nendpoint=127.0.0.1:%d\n", b.serverWG, reply.PresharedKey, port)); err != nil {
		t.Fatal(err)
	}
	if err := bind.Inject(reply.Response, endpoint); err != nil {
		t.Fatal(err)
	}
	inner.Outbound <- tuntest.Ping(netip.MustParseAddr("10.77.0.1"), reply.Address.Addr())
	select {
	case <-b.tun.Inbound:
	case <-time.After(5 * time.Second):
		t.Fatal("no data came through")
	}
	if a, _ := b.door.sizes(); a != 1 {
		t.Error("the first packet did not admit its session")
	}
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if _, peers := b.door.sizes(); peers == 1 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the endpoint was not written to the door")
		}
	}
	b.do(alice, "DELETE", vpn.SessionPath+"/"+reply.ID, "")
	if a, p := b.door.sizes(); a != 0 || p != 0 {
		t.Errorf("after the end %d addresses and %d endpoints are let through", a, p)
	}
}

func TestInitiationOfAnotherKeyIsNotAnswered(t *testing.T) {
	b := newBench(t, nil)
	mallory := b.user("mallory", "mac", time.Hour)
	_, _, _, _, victims := newPeer(t, b.serverWG)
	_, own := keyPair(t)
	body, _ := json.Marshal(vpn.SessionRequest{PublicKey: own[:], Initiation: victims})
	status, answer, err := b.do(mallory, "POST", vpn.SessionPath, string(body))
	var reply vpn.SessionReply
	if err != nil || status != 201 || json.Unmarshal(answer, &reply) != nil || len(reply.Response) != 0 {
		t.Errorf("%d %s %v: want a session without a response", status, answer, err)
	}
}

func listenPort(t *testing.T, d *device.Device) (port int) {
	t.Helper()
	text, err := d.IpcGet()
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(text, "listen_port=")
	if _, err := fmt.Sscan(rest, &port); err != nil {
		t.Fatal(err)
	}
	return port
}

func TestAnotherPeersInitiationIsNotAnswered(t *testing.T) {
	b := newBench(t, nil)
	victim, mallory := b.user("victim", "mac", time.Hour), b.user("mallory", "mac", time.Hour)
	_, _, _, victims, initiation := newPeer(t, b.serverWG)
	b.post(victim, victims)
	_, own := keyPair(t)
	body, _ := json.Marshal(vpn.SessionRequest{PublicKey: own[:], Initiation: initiation})
	status, answer, err := b.do(mallory, "POST", vpn.SessionPath, string(body))
	var reply vpn.SessionReply
	if err != nil || status != 201 || json.Unmarshal(answer, &reply) != nil || len(reply.Response) != 0 {
		t.Errorf("%d %s %v: want a session without a response", status, answer, err)
	}
	if e, err := b.tunnel.engine.statuses(); err != nil || len(e) != 0 {
		t.Errorf("the victim's endpoint moved: %v, %v", e, err)
	}
}

func TestEndpointOfTwoPeersStaysForTheOther(t *testing.T) {
	b := newBench(t, nil)
	shared, elsewhere := netip.MustParseAddrPort("198.18.1.2:5000"), netip.MustParseAddrPort("198.18.1.2:6000")
	now := time.Now()
	b.tunnel.mu.Lock()
	for i := range byte(2) {
		b.tunnel.peers[session.Key{i}] = &peer{session: session.Session{Expires: now.Add(time.Hour)}}
	}
	b.tunnel.mu.Unlock()
	at := func(first, second netip.AddrPort) {
		b.tunnel.follow(map[session.Key]status{{0}: {endpoint: first, handshake: now}, {1}: {endpoint: second, handshake: now}}, now)
	}
	at(shared, shared)
	at(shared, elsewhere)
	b.door.mu.Lock()
	_, victims := b.door.peers[shared]
	b.door.mu.Unlock()
	if !victims {
		t.Error("one peer's move took the other's endpoint out of the door")
	}
	at(elsewhere, elsewhere)
	b.door.mu.Lock()
	defer b.door.mu.Unlock()
	if len(b.door.peers) != 1 {
		t.Errorf("endpoints left: %v", b.door.peers)
	}
}
