package gate

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/curve25519"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun/tuntest"

	"perimeterd/internal/identity"
	"perimeterd/internal/session"
	"perimeterd/internal/statefile"
	"perimeterd/vpn"
)

// openDoor is a Door that remembers what it was told.
type openDoor struct {
	mu       sync.Mutex
	admitted map[netip.Addr]time.Time
	peers    map[netip.AddrPort]time.Time
}

func (d *openDoor) Admit(a netip.Addr, _ []uint16, until time.Time) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.admitted[a] = until
	return nil
}

func (d *openDoor) Dismiss(a netip.Addr) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.admitted, a)
	return nil
}

func (d *openDoor) AddPeer(p netip.AddrPort, until time.Time) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.peers[p] = until
	return nil
}

func (d *openDoor) RemovePeer(p netip.AddrPort) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.peers, p)
	return nil
}

func (d *openDoor) Resume(admitted map[netip.Addr]time.Time, _ map[netip.Addr][]uint16, peers map[netip.AddrPort]time.Time) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.admitted, d.peers = admitted, peers
	return nil
}

func (d *openDoor) sizes() (admitted, peers int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.admitted), len(d.peers)
}

// bench is a gate on loopback with a real WireGuard device behind it.
type bench struct {
	t        *testing.T
	ca       *identity.CA
	caFile   string
	users    *identity.Users
	store    *session.Bolt
	tunnel   *Tunnel
	gate     *Gate
	tun      *tuntest.ChannelTUN
	door     *openDoor
	address  string
	serverWG [32]byte
	private  [32]byte
	cfg      Config
	db       *statefile.DB
	log      *slog.Logger
	stop     func() // of the tunnel
	now      func() time.Time
}

// startTunnel puts a tunnel behind the store, as a start of the daemon does.
func (b *bench) startTunnel() {
	b.t.Helper()
	var err error
	if b.store, err = session.OpenBolt(b.db, time.Now()); err != nil {
		b.t.Fatal(err)
	}
	b.tun = tuntest.NewChannelTUN()
	if b.tunnel, err = NewTunnel(b.cfg, b.private, b.tun.TUN(), b.door, b.log); err != nil {
		b.t.Fatal(err)
	}
	if err := b.tunnel.Resume(b.store.List(), time.Now()); err != nil {
		b.t.Fatal(err)
	}
	b.store.Watch(b.tunnel.SessionEvent)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	tunnel, store, inner := b.tunnel, b.store, b.tun
	go func() { done <- tunnel.Run(ctx, store.Note) }()
	b.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			b.t.Error(err)
		}
		whileTaken(inner, tunnel.Close)
	})
	b.t.Cleanup(b.stop)
}

// whileTaken ends a device: a packet that nobody takes would keep its peer, and so the end, for ever. A real TUN drops it.
func whileTaken(tun *tuntest.ChannelTUN, end func()) {
	ended := make(chan struct{})
	go func() {
		for {
			select {
			case <-tun.Inbound:
			case <-ended:
				return
			}
		}
	}()
	end()
	close(ended)
}

func keyPair(t testing.TB) (private, public [32]byte) {
	t.Helper()
	rand.Read(private[:])
	p, err := curve25519.X25519(private[:], curve25519.Basepoint)
	if err != nil {
		t.Fatal(err)
	}
	return private, [32]byte(p)
}

func newBench(t *testing.T, change func(*Config)) *bench {
	t.Helper()
	dir := t.TempDir()
	b := &bench{t: t, door: &openDoor{admitted: map[netip.Addr]time.Time{}, peers: map[netip.AddrPort]time.Time{}}, caFile: filepath.Join(dir, "ca.crt"), now: time.Now}
	b.log = slog.New(slog.NewTextHandler(t.Output(), nil))
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	var err error
	b.ca, err = identity.NewCA("test", time.Now())
	must(err)
	must(b.ca.Save(b.caFile, filepath.Join(dir, "ca.key")))
	issued, err := b.ca.IssueServer(strings.Repeat("ab", 16), "127.0.0.1", time.Now())
	must(err)
	cert, err := tls.X509KeyPair(issued.Certificate, issued.Key)
	must(err)
	b.db, err = identity.OpenState(filepath.Join(dir, "state.db"))
	must(err)
	t.Cleanup(func() { b.db.Close() })
	b.users = identity.NewUsers(b.db)
	verifier, err := identity.NewVerifier(b.caFile, b.users, func() time.Time { return b.now() })
	must(err)
	b.private, b.serverWG = keyPair(t)
	b.cfg = Config{Endpoint: "198.18.1.1:1194", Network: netip.MustParsePrefix("10.77.0.0/16"), MTU: 1420, Keepalive: 25 * time.Second,
		Max: 12 * time.Hour, Limit: 100, Devices: 2, Proxy: netip.MustParseAddrPort("10.77.0.1:3128"), Console: netip.MustParseAddrPort("10.77.0.1:80")}
	if change != nil {
		change(&b.cfg)
	}
	b.startTunnel()
	g, err := New(b.cfg, func(netip.Addr) bool { return false }, b.serverWG, cert, verifier, b.store, b.tunnel, b.log)
	must(err)
	b.gate = g
	b.store.Watch(g.SessionEvent)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(err)
	b.address = l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- g.Run(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return b
}

// user enrols a device and returns a client with its certificate.
func (b *bench) user(name, device string, valid time.Duration) *http.Client {
	b.t.Helper()
	issued, err := b.ca.IssueClient(name, device, valid, time.Now())
	if err != nil {
		b.t.Fatal(err)
	}
	if _, err := b.users.Add(identity.Enrolment{Name: name, Groups: []string{"admins"}, Device: device, Key: issued.KeyHash, NotAfter: issued.NotAfter}, time.Now()); err != nil {
		b.t.Fatal(err)
	}
	return b.client(issued.Certificate, issued.Key)
}

func (b *bench) client(certificate, key []byte) *http.Client {
	b.t.Helper()
	cert, err := tls.X509KeyPair(certificate, key)
	if err != nil {
		b.t.Fatal(err)
	}
	roots := x509.NewCertPool()
	pem, err := os.ReadFile(b.caFile)
	if err != nil || !roots.AppendCertsFromPEM(pem) {
		b.t.Fatal("CA: ", err)
	}
	tr := &http.Transport{TLSClientConfig: &tls.Config{Certificates: []tls.Certificate{cert}, RootCAs: roots, MinVersion: tls.VersionTLS13}}
	b.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 15 * time.Second}
}

func (b *bench) do(c *http.Client, method, path, body string) (status int, answer []byte, err error) {
	b.t.Helper()
	req, err := http.NewRequest(method, "https://"+b.address+path, strings.NewReader(body))
	if err != nil {
		b.t.Fatal(err)
	}
	resp, err := c.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	answer, err = io.ReadAll(resp.Body)
	if resp.Header.Get("Cache-Control") != "no-store" {
		b.t.Errorf("%s %s: an answer that may be cached", method, path)
	}
	return resp.StatusCode, answer, err
}

func (b *bench) post(c *http.Client, public [32]byte) vpn.SessionReply {
	b.t.Helper()
	status, answer, err := b.do(c, "POST", vpn.SessionPath, fmt.Sprintf(`{"public_key":%q}`, base64.StdEncoding.EncodeToString(public[:])))
	var reply vpn.SessionReply
	if err != nil || status != http.StatusCreated || json.Unmarshal(answer, &reply) != nil {
		b.t.Fatalf("POST: %d %s %v", status, answer, err)
	}
	return reply
}

func TestSessionFromPostToDelete(t *testing.T) {
	b := newBench(t, nil)
	alice, bob := b.user("alice", "mac", time.Hour), b.user("bob", "mac", time.Hour)
	_, public := keyPair(t)
	reply := b.post(alice, public)
	if reply.User != "alice" || reply.Address.String() != "10.77.0.2/32" || !reply.PostQuantum || len(reply.PresharedKey) != 32 ||
		!bytes.Equal(reply.ServerPublicKey, b.serverWG[:]) || time.Until(reply.Expires) > time.Hour {
		t.Errorf("reply %+v: want alice's first address, post-quantum, at most as long as the certificate", reply)
	}
	if again := b.post(alice, public); again.ID != reply.ID || !bytes.Equal(again.PresharedKey, reply.PresharedKey) {
		t.Error("the same request again made another session")
	}
	path := vpn.SessionPath + "/" + reply.ID
	if status, answer, _ := b.do(alice, "GET", path+"/wg-quick", ""); status != 200 || !strings.Contains(string(answer), "\nPrivateKey =\nAddress = 10.77.0.2/32\nMTU = 1420\n") ||
		!strings.Contains(string(answer), base64.StdEncoding.EncodeToString(reply.PresharedKey)) {
		t.Errorf("wg-quick: %d\n%s", status, answer)
	}
	for _, p := range []string{path, vpn.SessionPath} {
		if status, answer, _ := b.do(alice, "GET", p, ""); status != 200 || !strings.Contains(string(answer), reply.ID) || strings.Contains(string(answer), "preshared_key") {
			t.Errorf("GET %s: %d %s: want the session without its key", p, status, answer)
		}
	}
	if status, answer, _ := b.do(bob, "GET", vpn.SessionPath, ""); status != 200 || string(answer) != "[]\n" {
		t.Errorf("bob's list: %d %s", status, answer)
	}
	for _, c := range []struct{ method, path string }{{"GET", path}, {"DELETE", path}, {"GET", path + "/wg-quick"}} {
		if status, answer, _ := b.do(bob, c.method, c.path, ""); status != 404 {
			t.Errorf("bob's %s of alice's session: %d %s", c.method, status, answer)
		}
	}
	if status, answer, _ := b.do(alice, "DELETE", path, ""); status != 204 || len(answer) != 0 {
		t.Errorf("DELETE: %d %s", status, answer)
	}
	if status, _, _ := b.do(alice, "DELETE", path, ""); status != 404 {
		t.Errorf("second DELETE: %d", status)
	}
	if n := len(b.store.List()); n != 0 {
		t.Errorf("%d sessions left", n)
	}
	if e, err := b.tunnel.engine.statuses(); err != nil || len(e) != 0 {
		t.Errorf("peers left: %v, %v", e, err)
	}
}

func TestOneDeviceTooManyReplacesTheOldest(t *testing.T) {
	b := newBench(t, nil) // two devices
	alice := b.user("alice", "mac", time.Hour)
	var ids []string
	for range 3 {
		_, public := keyPair(t)
		ids = append(ids, b.post(alice, public).ID)
	}
	var live []string
	for _, s := range b.store.List() {
		live = append(live, s.ID.String())
	}
	if len(live) != 2 || slices.Contains(live, ids[0]) {
		t.Errorf("live %v of %v: want the last two", live, ids)
	}
}

func TestRefusals(t *testing.T) {
	b := newBench(t, func(c *Config) { c.Limit = 1; c.Devices = 5 })
	alice, bob := b.user("alice", "mac", time.Hour), b.user("bob", "mac", time.Hour)
	_, public := keyPair(t)
	key := base64.StdEncoding.EncodeToString(public[:])
	ok := fmt.Sprintf(`{"public_key":%q}`, key)
	for _, c := range []struct {
		name, method, path, body string
		status                   int
		code, says               string
	}{
		{"not JSON", "POST", "/v1/session", "public_key=x", 400, "bad_request", "invalid character"},
		{"empty", "POST", "/v1/session", "", 400, "bad_request", "EOF"},
		{"unknown field", "POST", "/v1/session", `{"public_key":"` + key + `","role":"root"}`, 400, "bad_request", `unknown field "role"`},
		{"two objects", "POST", "/v1/session", ok + ok, 400, "bad_request", "something follows"},
		{"short key", "POST", "/v1/session", `{"public_key":"AAAA"}`, 400, "bad_request", "public_key has 3 bytes: want 32"},
		{"low-order key", "POST", "/v1/session", `{"public_key":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}`, 400, "bad_request", "low order"},
		{"short initiation", "POST", "/v1/session", `{"public_key":"` + key + `","initiation":"AAAA"}`, 400, "bad_request", "initiation has 3 bytes: want 148"},
		{"control byte in device", "POST", "/v1/session", `{"public_key":"` + key + `","device":"a\u001bb"}`, 400, "bad_request", "device"},
		{"huge body", "POST", "/v1/session", `{"device":"` + strings.Repeat("x", 5000) + `"}`, 413, "too_large", "more than 4096 bytes"},
		{"wrong method", "PUT", "/v1/session", ok, 405, "method", "PUT"},
		{"no such path", "GET", "/v1/nothing", "", 404, "not_found", "/v1/nothing"},
		{"foreign id", "GET", "/v1/session/" + strings.Repeat("0", 32), "", 404, "not_found", "no session"},
		{"no id", "DELETE", "/v1/session/..%2f", "", 404, "not_found", "no session"},
	} {
		status, answer, err := b.do(alice, c.method, c.path, c.body)
		var e vpn.ErrorReply
		if err != nil || json.Unmarshal(answer, &e) != nil || e.Error == nil || status != c.status || e.Error.Code != c.code || !strings.Contains(e.Error.Message, c.says) {
			t.Errorf("%s: %d %s %v: want %d %s …%s…", c.name, status, answer, err, c.status, c.code, c.says)
		}
	}
	if n := len(b.store.List()); n != 0 {
		t.Fatalf("%d sessions came of refused requests", n)
	}
	b.post(alice, public)
	if status, answer, _ := b.do(bob, "POST", vpn.SessionPath, ok); status != 503 || !strings.Contains(string(answer), "session_limit") {
		t.Errorf("over the limit: %d %s", status, answer)
	}
}

func TestKeyBelongsToOneCertificateForEver(t *testing.T) {
	b := newBench(t, nil)
	alice, bob := b.user("alice", "mac", time.Hour), b.user("bob", "mac", time.Hour)
	_, public := keyPair(t)
	reply := b.post(alice, public)
	body := fmt.Sprintf(`{"public_key":%q}`, base64.StdEncoding.EncodeToString(public[:]))
	if status, answer, _ := b.do(bob, "POST", vpn.SessionPath, body); status != 409 || !strings.Contains(string(answer), "key_bound") {
		t.Errorf("alice's key in bob's hands: %d %s", status, answer)
	}
	b.do(alice, "DELETE", vpn.SessionPath+"/"+reply.ID, "")
	if status, answer, _ := b.do(alice, "POST", vpn.SessionPath, body); status != 409 {
		t.Errorf("a key whose session ended: %d %s", status, answer)
	}
}

func TestCertificatesThatDoNotOpen(t *testing.T) {
	b := newBench(t, nil)
	other, err := identity.NewCA("other", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := other.IssueClient("alice", "mac", time.Hour, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	server, err := b.ca.IssueServer(strings.Repeat("cd", 16), "alice", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	stranger, err := b.ca.IssueClient("nobody", "mac", time.Hour, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	revoked := b.user("eve", "mac", time.Hour)
	if _, err := b.users.Revoke("eve", "", time.Now()); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]*http.Client{
		"another CA": b.client(foreign.Certificate, foreign.Key), "a server's": b.client(server.Certificate, server.Key),
		"unknown user": b.client(stranger.Certificate, stranger.Key), "revoked": revoked,
	} {
		status, answer, err := b.do(c, "GET", vpn.SessionPath, "")
		if err == nil || !strings.Contains(err.Error(), "remote error: tls: ") {
			t.Errorf("%s: %d %s, %v: want a TLS alert", name, status, answer, err)
		}
	}
	if conn, err := tls.Dial("tcp", b.address, &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12}); err == nil {
		conn.Close()
		t.Error("TLS 1.2 was accepted")
	}
}

func TestRevokedOnALiveConnectionGets403(t *testing.T) {
	b := newBench(t, nil)
	alice := b.user("alice", "mac", time.Hour)
	if status, _, err := b.do(alice, "GET", vpn.SessionPath, ""); status != 200 {
		t.Fatal(status, err)
	}
	if _, err := b.users.Revoke("alice", "", time.Now()); err != nil {
		t.Fatal(err)
	}
	if status, answer, err := b.do(alice, "GET", vpn.SessionPath, ""); status != 403 || !strings.Contains(string(answer), `"revoked"`) {
		t.Errorf("%d %s %v", status, answer, err)
	}
	b.now = func() time.Time { return time.Now().Add(2 * time.Hour) }
	if status, answer, err := b.do(alice, "GET", vpn.SessionPath, ""); status != 403 {
		t.Errorf("expired on a live connection: %d %s %v", status, answer, err)
	}
}

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

func TestRefusedRequestReplacesNothing(t *testing.T) {
	b := newBench(t, func(c *Config) { c.Devices = 1 })
	alice := b.user("alice", "mac", time.Hour)
	_, first := keyPair(t)
	old := b.post(alice, first)
	b.do(alice, "DELETE", vpn.SessionPath+"/"+old.ID, "")
	_, second := keyPair(t)
	live := b.post(alice, second)
	if status, answer, _ := b.do(alice, "POST", vpn.SessionPath, fmt.Sprintf(`{"public_key":%q}`, base64.StdEncoding.EncodeToString(first[:]))); status != 409 {
		t.Fatalf("%d %s", status, answer)
	}
	if l := b.store.List(); len(l) != 1 || l[0].ID.String() != live.ID {
		t.Errorf("live after the refusal: %v", l)
	}
}

func TestSessionsOfOneCertificateArePaced(t *testing.T) {
	p := pace{next: map[[32]byte]time.Time{}}
	now := time.Unix(1e9, 0)
	begun := 0
	for range 100 {
		if p.wait([32]byte{1}, now) == 0 {
			begun++
		}
	}
	if begun != sessionBurst+1 {
		t.Errorf("%d at once, want %d", begun, sessionBurst+1)
	}
	if w := p.wait([32]byte{1}, now); w <= 0 || w > sessionEvery {
		t.Errorf("wait %v", w)
	}
	if p.wait([32]byte{2}, now) != 0 || p.wait([32]byte{1}, now.Add(sessionEvery)) != 0 {
		t.Error("want another certificate, and the same later, to go on")
	}
}

func TestConnectionsAreCappedAndSomeReservedForTokens(t *testing.T) {
	l := newCapped(nil, func(a netip.Addr) bool { return a == netip.MustParseAddr("192.0.2.1") }, &callers{})
	took := func(a string) bool { return l.take(netip.MustParseAddr(a)) }
	n := 0
	for took("192.0.2.9") {
		n++
	}
	if n != perSource {
		t.Errorf("one source holds %d connections, want %d", n, perSource)
	}
	for i := 0; l.pending < unfinished-reserved; i++ {
		took(fmt.Sprintf("2001:db8::%x", i/perSource))
	}
	if took("198.51.100.1") {
		t.Error("who did not knock by token got a reserved handshake")
	}
	if !took("192.0.2.1") {
		t.Error("who knocked by token got none")
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"public_key":"AAAA"}`))
	f.Add([]byte(`{"public_key":"hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=","initiation":null,"device":"x"}`))
	f.Add([]byte(`{}{}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		req, err := decode(bytes.NewReader(body))
		var api *vpn.APIError
		switch {
		case err != nil && (!errors.As(err, &api) || vpn.StatusOf(api.Code) >= 500):
			t.Errorf("%q: %v is not the caller's fault", body, err)
		case err == nil && (len(body) > vpn.MaxBody || len(req.PublicKey) != 32 || len(req.Initiation)%vpn.InitiationSize != 0 || !json.Valid(body)):
			t.Errorf("%q was taken", body)
		}
	})
}
