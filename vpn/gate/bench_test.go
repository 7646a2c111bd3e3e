package gate

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/curve25519"
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
