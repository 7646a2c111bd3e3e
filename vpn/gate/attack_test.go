package gate

import (
	"crypto/tls"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/blake2s"
	"golang.org/x/crypto/chacha20poly1305"
	"golang.org/x/crypto/curve25519"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun/tuntest"

	"perimeterd/internal/session"
	"perimeterd/vpn"
)

// craft makes an initiation with a time of one's own choice, as only the holder of the private key can.
func craft(t *testing.T, private, server [32]byte, made time.Time) []byte {
	t.Helper()
	dh := func(private, public []byte) []byte {
		s, err := curve25519.X25519(private, public)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	ephemeral, public := keyPair(t)
	static := dh(private[:], curve25519.Basepoint)
	m := make([]byte, 8, vpn.InitiationSize)
	m[0] = messageInitiation
	m = append(m, public[:]...)
	chain := blake2s.Sum256([]byte("Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s"))
	transcript := sum(chain[:], []byte("WireGuard v1 zx2c4 Jason@zx2c4.com"))
	transcript = sum(transcript[:], server[:])
	transcript = sum(transcript[:], public[:])
	chain = [32]byte(mac(mac(chain[:], public[:]), []byte{1}))
	seal := func(shared, plain []byte) {
		secret := mac(chain[:], shared)
		next := mac(secret, []byte{1})
		chain = [32]byte(next)
		aead, err := chacha20poly1305.New(mac(secret, append(next, 2)))
		if err != nil {
			t.Fatal(err)
		}
		sealed := aead.Seal(nil, make([]byte, 12), plain, transcript[:])
		transcript = sum(transcript[:], sealed)
		m = append(m, sealed...)
	}
	seal(dh(ephemeral[:], server[:]), static)
	stamp := binary.BigEndian.AppendUint64(nil, uint64(made.Unix())+1<<62)
	seal(dh(private[:], server[:]), binary.BigEndian.AppendUint32(stamp, uint32(made.Nanosecond())))
	key := sum([]byte("mac1----"), server[:])
	h, err := blake2s.New128(key[:])
	if err != nil {
		t.Fatal(err)
	}
	h.Write(m)
	return append(h.Sum(m), make([]byte, 16)...)
}

// stranger is a UDP socket that sends to the tunnel.
type stranger struct {
	*net.UDPConn
	t *testing.T
}

func (b *bench) stranger() stranger {
	b.t.Helper()
	c, err := net.DialUDP("udp", nil, &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: listenPort(b.t, b.tunnel.engine.(userspace).Device)})
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { c.Close() })
	return stranger{c, b.t}
}

// answered tells whether a message brings a handshake response.
func (s stranger) answered(message []byte, wait time.Duration) bool {
	s.t.Helper()
	if _, err := s.Write(message); err != nil {
		s.t.Fatal(err)
	}
	s.SetReadDeadline(time.Now().Add(wait))
	n, err := s.Read(make([]byte, 2000))
	return err == nil && n == vpn.ResponseSize
}

const (
	silence = 300 * time.Millisecond // in which an answer would be there
	answer  = 20 * time.Second
)

func TestRecordedInitiationIsWorthNothingAfterItsSession(t *testing.T) {
	b := newBench(t, nil)
	alice := b.user("alice", "mac", time.Hour)
	private, public := keyPair(t)
	reply := b.post(alice, public)
	s := b.stranger()
	recorded := craft(t, private, b.serverWG, time.Now())
	if !s.answered(recorded, answer) {
		t.Fatal("an initiation of a live session is not answered: this test shows nothing")
	}
	if b.stranger().answered(recorded, silence) {
		t.Error("the same initiation is answered to another port")
	}
	b.end(reply.ID)
	later := craft(t, private, b.serverWG, time.Now().Add(time.Second))
	if s.answered(recorded, silence) || s.answered(later, silence) {
		t.Error("an initiation of a session that ended is answered")
	}
	_, next := keyPair(t)
	b.post(alice, next)
	if s.answered(recorded, silence) {
		t.Error("the next session of the same certificate answers it")
	}
}

// The store forgets the key of an ended session in time, and its owner may use it again.
func TestInitiationThatIsOlderThanAKeysMemoryIsRefused(t *testing.T) {
	b := newBench(t, nil)
	private, public := keyPair(t)
	b.post(b.user("alice", "mac", time.Hour), public)
	s := b.stranger()
	if s.answered(craft(t, private, b.serverWG, time.Now().Add(-session.InitiationAge)), silence) {
		t.Error("an old one is answered")
	}
	if !s.answered(craft(t, private, b.serverWG, time.Now().Add(time.Hour-session.InitiationAge)), answer) {
		t.Error("one of a clock that is merely wrong is not")
	}
}

func TestPointsOfLowOrderAreNoKeys(t *testing.T) {
	for _, point := range []string{ // https://cr.yp.to/ecdh.html#validate: those that are so with the top bit masked (RFC 7748, 5)
		"0000000000000000000000000000000000000000000000000000000000000000",
		"0100000000000000000000000000000000000000000000000000000000000000",
		"e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
		"5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
		"ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
		"edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
		"eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
	} {
		p, err := hex.DecodeString(point)
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if !lowOrder(p) {
				t.Errorf("%x is taken", p)
			}
			p[31] ^= 0x80
		}
	}
	_, good := keyPair(t)
	if lowOrder(good[:]) {
		t.Error("a good key is refused")
	}
}

func TestAddressOfALiveSessionIsNobodyElses(t *testing.T) {
	b := newBench(t, func(c *Config) { c.Devices = 50 })
	c := b.join("alice")
	arrives(t, tuntest.Ping(server, c.address), c.tun.Outbound, b.tun.Inbound, "to the server")
	// As a fault in the pool would have it.
	_, public := keyPair(t)
	thief := session.Session{ID: session.NewID(), User: "mallory", PublicKey: public, Address: c.address, Created: time.Now(), Expires: time.Now().Add(time.Hour)}
	if err := b.store.Put(thief); !errors.Is(err, session.ErrAddressTaken) {
		t.Errorf("a session with an address that is taken: %v", err)
	}
	if p := b.tunnel.engine.(userspace).Device.LookupPeer(device.NoisePublicKey(public)); p != nil {
		t.Error("its peer was added")
	}
	arrives(t, tuntest.Ping(server, c.address), c.tun.Outbound, b.tun.Inbound, "to the server, after the attempt")
	// And many at once.
	bob := b.user("bob", "mac", time.Hour)
	replies := make(chan vpn.SessionReply, 20)
	var all sync.WaitGroup
	for range cap(replies) {
		all.Go(func() {
			_, public := keyPair(t)
			replies <- b.post(bob, public)
		})
	}
	all.Wait()
	close(replies)
	taken := map[netip.Addr]bool{c.address: true}
	for r := range replies {
		if taken[r.Address.Addr()] {
			t.Errorf("%v was given twice", r.Address)
		}
		taken[r.Address.Addr()] = true
	}
}

// What a caller does not send, or does not read, is his alone to wait for, and not for long.
func TestStalledCallersKeepNobodyWaitingAndAreCut(t *testing.T) {
	t.Parallel() // it waits for the gate's patience to end
	b := newBench(t, func(c *Config) { c.Devices = 50 })
	mallory := b.user("mallory", "mac", time.Hour)
	config := mallory.Transport.(*http.Transport).TLSClientConfig.Clone()
	config.ServerName = "127.0.0.1"
	var waits []net.Conn
	raw := func() net.Conn {
		c, err := net.Dial("tcp", b.address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	deafCut := make(chan error, 1)
	for range cap(deafCut) {
		silent, half, body, deaf := raw(), raw(), raw(), raw()
		waits = append(waits, silent, half, body)
		half.Write([]byte{22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3}) // begins a ClientHello
		fmt.Fprintf(tls.Client(body, config), "POST %s HTTP/1.1\r\nHost: gate\r\nContent-Length: 100\r\n\r\n{", vpn.SessionPath)
		deaf.(*net.TCPConn).SetReadBuffer(4096)
		asks := tls.Client(deaf, config)
		if err := asks.Handshake(); err != nil {
			t.Fatal(err)
		}
		go func() { // and never reads
			asks.SetWriteDeadline(time.Now().Add(time.Minute))
			for {
				if _, err := fmt.Fprintf(asks, "GET %s HTTP/1.1\r\nHost: gate\r\n\r\n", vpn.SessionPath); err != nil {
					deafCut <- err
					return
				}
			}
		}()
	}
	for i := range 5 {
		c := b.join(fmt.Sprintf("user%d", i))
		arrives(t, tuntest.Ping(server, c.address), c.tun.Outbound, b.tun.Inbound, "beside stalled callers")
	}
	deadline := time.Now().Add(time.Minute)
	for i, c := range waits {
		c.SetReadDeadline(deadline)
		if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("caller %d, who sends no more, is still there", i)
		}
	}
	for range cap(deafCut) {
		if err := <-deafCut; errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error("a caller who does not read is still there")
		}
	}
}

// FuzzInitiation: whoever has a window may send anything.
func FuzzInitiation(f *testing.F) {
	private, public := [32]byte{1}, [32]byte{}
	p, err := curve25519.X25519(private[:], curve25519.Basepoint)
	if err != nil {
		f.Fatal(err)
	}
	copy(public[:], p)
	f.Add([]byte{1, 0, 0, 0})
	known, err := base64.StdEncoding.DecodeString("AQAAAA==")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(append(known, make([]byte, 144)...))
	f.Fuzz(func(t *testing.T, message []byte) {
		if i, ok := openInitiation(message, private, public); ok && len(message) != vpn.InitiationSize {
			t.Errorf("%x of %x was opened", i.static, message)
		}
	})
}

// Whoever names another's key gets a session that nothing ever passes.
func TestKeyThatIsNotProvenIsNeverAdmitted(t *testing.T) {
	b := newBench(t, nil)
	victims, public := keyPair(t)
	stolen := b.post(b.user("mallory", "mac", time.Hour), public)
	s := b.stranger()
	if !s.answered(craft(t, victims, b.serverWG, time.Now()), answer) {
		t.Fatal("the handshake that only the victim can begin is not answered: this test shows nothing")
	}
	// The answer was made with a preshared key that the victim does not have: nothing follows.
	for _, junk := range [][]byte{make([]byte, 32), append([]byte{4, 0, 0, 0}, make([]byte, 60)...)} {
		if _, err := s.Write(junk); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case p := <-b.tun.Inbound:
		t.Errorf("a packet came through: %x", p)
	case <-time.After(silence):
	}
	if admitted, peers := b.door.sizes(); admitted != 0 || peers != 0 || b.tunnel.Pending() != 1 {
		t.Errorf("%d admitted, %d endpoints, %d pending: want none, none, one", admitted, peers, b.tunnel.Pending())
	}
	id, err := session.ParseID(stolen.ID)
	if err != nil {
		t.Fatal(err)
	}
	if s, _ := b.store.Get(id); !s.Seen.Handshake.IsZero() {
		t.Error("it counts as seen")
	}
}
