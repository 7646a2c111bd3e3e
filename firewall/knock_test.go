package firewall

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"perimeterd/internal/lab"
	"perimeterd/knock"
)

// room is a lab whose bastion has the table, a gate that listens behind the interlock, and an observer.
type room struct {
	*lab.Lab
	t  *testing.T
	fw *Firewall

	mu       sync.Mutex
	openings []Opening
	refusals []Refusal
}

func newRoom(t *testing.T, cfg Config) *room { return newRoomWith(t, cfg, false) }

func newRoomWith(t *testing.T, cfg Config, plain bool) *room {
	t.Helper()
	r := &room{Lab: lab.Start(t, lab.Options{}), t: t}
	var fd int
	r.inBastion(func() (err error) {
		fd, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		return err
	})
	t.Cleanup(func() { unix.Close(fd) })
	r.fw = New(testLog(t), fd)
	r.fw.plain = plain
	if _, err := r.fw.Apply(cfg); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done, ready := make(chan error, 1), make(chan struct{})
	go func() {
		done <- r.fw.Observe(ctx, cfg.LogGroup, ready, func(o Opening) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.openings = append(r.openings, o)
		}, func(refusal Refusal) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.refusals = append(r.refusals, refusal)
		})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error("Observe: ", err)
		}
	})
	select {
	case <-ready:
	case err := <-done:
		done <- nil
		t.Fatal("Observe: ", err)
	}
	var gate *net.TCPListener
	r.inBastion(func() (err error) {
		gate, err = Listen(ctx, ":1194")
		return err
	})
	t.Cleanup(func() { gate.Close() })
	go func() {
		for {
			c, err := gate.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	return r
}

func (r *room) inBastion(fn func() error) {
	r.t.Helper()
	if err := r.Bastion.Do(fn); err != nil {
		r.t.Fatal(err)
	}
}

// accepted tells whether the gate takes a connection from one of the client's addresses within 300 ms.
func (r *room) accepted(from netip.Addr) bool {
	r.t.Helper()
	to := r.Bastion.Addr
	if from.Is6() {
		to = r.Bastion.Addr6
	}
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	c, err := r.Client.DialFrom(ctx, from, "tcp", netip.AddrPortFrom(to, 1194).String())
	if err == nil {
		c.Close()
		return true
	}
	if !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, os.ErrDeadlineExceeded) {
		r.t.Fatalf("the gate answered %v with %v: it must be silent", from, err)
	}
	return false
}

func (r *room) send(from netip.Addr, payloads ...[]byte) {
	r.t.Helper()
	to := r.Bastion.Addr
	if from.Is6() {
		to = r.Bastion.Addr6
	}
	c, err := r.Client.DialFrom(context.Background(), from, "udp", netip.AddrPortFrom(to, 1194).String())
	if err != nil {
		r.t.Fatal(err)
	}
	defer c.Close()
	for _, p := range payloads {
		if _, err := c.Write(p); err != nil {
			r.t.Fatal(err)
		}
	}
}

func (r *room) load(tokens ...Token) {
	r.t.Helper()
	if err := r.fw.AddTokens(tokens); err != nil {
		r.t.Fatal(err)
	}
}

func (r *room) seen() []Opening {
	time.Sleep(50 * time.Millisecond)
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.openings)
}

func tok(n byte) knock.Token {
	return knock.Token{n, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
}

func soon() time.Time { return time.Now().Add(time.Minute) }

func TestTokenOpensForItsSourceOnceAndIsObserved(t *testing.T) {
	r := newRoom(t, example())
	me, other := r.Client.Addr, r.Stranger
	if r.accepted(me) {
		t.Fatal("open without a knock")
	}
	r.load(Token{tok(1), 42, soon()})
	r.send(me, []byte("\x01\x01\x02\x03\x04\x05\x06\x07\x08\x09\x0a\x0b\x0c\x0d\x0e\x0f"))
	if !r.accepted(me) {
		t.Error("the token did not open")
	}
	if r.accepted(other) {
		t.Error("the window is open for another source")
	}
	token := tok(1)
	r.send(other, token[:])
	if r.accepted(other) {
		t.Error("the replayed token opened")
	}
	o := r.seen()
	if len(o) != 1 || o[0].Source != me || o[0].Credential != 42 || o[0].Token != tok(1) || o[0].Sequence || o[0].Port == 0 {
		t.Errorf("observed %+v", o)
	}
	w, err := r.fw.Windows()
	if err != nil || len(w) != 1 || w[0].Source != me || w[0].Credential != 42 || time.Until(w[0].Expires) > time.Minute {
		t.Errorf("windows %+v, %v", w, err)
	}
	if err := r.fw.Revoke(42, nil); err != nil {
		t.Fatal(err)
	}
	if r.accepted(me) {
		t.Error("open after the credential was closed")
	}
}

func TestTokenOpensByIPv6(t *testing.T) {
	r := newRoom(t, example())
	r.load(Token{tok(1), 42, soon()})
	token := tok(1)
	r.send(r.Client.Addr6, token[:])
	if !r.accepted(r.Client.Addr6) || r.accepted(r.Stranger6) {
		t.Error("want it open for the client's IPv6 address alone")
	}
}

func TestWhatIsNotTheTokenOpensNothing(t *testing.T) {
	r := newRoom(t, example())
	good := tok(1)
	r.load(Token{good, 42, soon()}, Token{tok(2), 43, time.Now().Add(200 * time.Millisecond)})
	flipped := good
	flipped[15] ^= 1
	time.Sleep(300 * time.Millisecond)
	expired := tok(2)
	for name, payload := range map[string][]byte{
		"empty": {}, "15 bytes": good[:15], "17 bytes": append(good[:len(good):len(good)], 0), "oversized": append(good[:len(good):len(good)], make([]byte, 1400)...),
		"a bit flipped": flipped[:], "zero": make([]byte, 16), "expired": expired[:],
	} {
		r.send(r.Client.Addr, payload)
		if r.accepted(r.Client.Addr) {
			t.Errorf("%s opened", name)
		}
	}
	if o := r.seen(); len(o) != 0 {
		t.Errorf("observed %+v", o)
	}
}

func TestDatagramRightBehindTheTokenIsAccepted(t *testing.T) {
	r := newRoom(t, example())
	var tunnel net.PacketConn
	r.inBastion(func() (err error) {
		tunnel, err = net.ListenPacket("udp", ":1194")
		return err
	})
	defer tunnel.Close()
	const rounds = 200
	for i := range rounds {
		token := tok(byte(i))
		r.load(Token{token, 7, soon()})
		c, err := r.Client.DialFrom(t.Context(), r.Client.Addr, "udp", netip.AddrPortFrom(r.Bastion.Addr, 1194).String())
		if err != nil {
			t.Fatal(err)
		}
		c.Write(token[:])
		c.Write(fmt.Appendf(nil, "initiation %d", i))
		tunnel.SetReadDeadline(time.Now().Add(time.Second))
		b := make([]byte, 100)
		n, _, err := tunnel.ReadFrom(b)
		if err != nil || string(b[:n]) != fmt.Sprintf("initiation %d", i) {
			t.Fatalf("round %d: %q, %v", i, b[:n], err)
		}
		c.Close()
		if err := r.fw.Revoke(7, nil); err != nil {
			t.Fatal(err)
		}
	}
}

func TestOneTokenFromTwoSourcesAtOnceOpensOnce(t *testing.T) {
	const pairs = 10000
	windows, tokens, told := race(t, pairs, false)
	// A pair may get lost on the way to a busy host; none may win twice.
	if windows != tokens || tokens < pairs*99/100 {
		t.Errorf("want %d windows, one for each token, some for each side", pairs)
	}
	if told != windows {
		t.Errorf("%d openings were observed of %d windows", told, windows)
	}
}

// On an earlier draft a token was spent by its deletion, of which the kernel does not say whether it deleted anything.
func TestTokenSpentByDeletionOpensTwice(t *testing.T) {
	for pairs := 5000; ; pairs *= 2 {
		windows, tokens, _ := race(t, pairs, true)
		if windows > tokens {
			return
		}
		if pairs > 20000 {
			t.Fatal("no token opened twice: the attack is none, and proves nothing of the rule that stands against it")
		}
	}
}

// race sends each of many tokens from two hosts at once, each time from other sources, and tells how many windows are open
// then, for how many tokens, and how many openings were observed.
func race(t *testing.T, pairs int, earlier bool) (windows, tokens, told int) {
	cfg := example()
	cfg.Window = 10 * time.Minute // longer than the slowest machine takes
	r := newRoomWith(t, cfg, earlier)
	if earlier {
		r.nft(deleteOnUse)
	}
	mallory, err := r.AddHost(t.Context(), "mallory")
	if err != nil {
		t.Fatal(err)
	}
	var list []Token
	for i := range pairs {
		list = append(list, Token{knock.NewToken([]byte("test"), knock.ServerID{}, int64(i), 0), uint32(i + 1), time.Now().Add(10 * time.Minute)})
	}
	r.load(list...)
	// Every pair has sources of its own, so that the windows themselves tell who won.
	first := [2]netip.Addr{netip.MustParseAddr("198.18.64.0"), netip.MustParseAddr("198.18.128.0")}
	var at [2]atomic.Int64
	var wg sync.WaitGroup
	for side, host := range []*lab.Namespace{r.Client, mallory} {
		var raw int
		if err := host.Do(func() (err error) {
			raw, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
			return err
		}); err != nil {
			t.Fatal(err)
		}
		defer unix.Close(raw)
		wg.Go(func() {
			source := first[side]
			for i := range list {
				packet := udp4(source, r.Bastion.Addr, 1194, list[i].Token[:])
				source = source.Next()
				at[side].Store(int64(i + 1))
				for deadline := time.Now().Add(time.Second); at[1-side].Load() < int64(i+1) && time.Now().Before(deadline); {
				}
				if err := unix.Sendto(raw, packet, 0, &unix.SockaddrInet4{Addr: r.Bastion.Addr.As4()}); err != nil {
					t.Error(err)
				}
				// The receiving queue holds a thousand packets; what it drops would race with nothing.
				for start := time.Now(); time.Since(start) < 20*time.Microsecond; {
				}
			}
		})
	}
	wg.Wait()
	time.Sleep(200 * time.Millisecond)
	open, err := r.fw.Windows()
	if err != nil {
		t.Fatal(err)
	}
	times, won := map[uint32]int{}, [2]int{}
	for _, w := range open {
		times[w.Credential]++
		if w.Source.Less(first[1]) {
			won[0]++
		} else {
			won[1]++
		}
	}
	t.Logf("%d windows of %d tokens; won by one side %d, by the other %d", len(open), len(times), won[0], won[1])
	if min(won[0], won[1]) == 0 {
		t.Error("one side won all: they did not race")
	}
	for deadline := time.Now().Add(10 * time.Second); len(r.seen()) < len(open) && time.Now().Before(deadline); {
	}
	return len(open), len(times), len(r.seen())
}

// udp4 is an IPv4 datagram without a UDP checksum (RFC 768 allows that); the kernel fills in the header's.
func udp4(from, to netip.Addr, port uint16, payload []byte) []byte {
	length := 28 + len(payload)
	f, d := from.As4(), to.As4()
	b := []byte{0x45, 0, byte(length >> 8), byte(length), 0, 0, 0, 0, 64, knock.UDP, 0, 0}
	b = append(append(b, f[:]...), d[:]...)
	b = append(b, 0x1f, 0x90, byte(port>>8), byte(port), byte((length-20)>>8), byte(length-20), 0, 0)
	return append(b, payload...)
}

func sequence(t *testing.T, ports ...string) knock.Sequence {
	t.Helper()
	s := knock.Sequence{Name: "test", Credential: 9}
	for _, p := range ports {
		port, err := knock.ParsePort(p)
		if err != nil {
			t.Fatal(err)
		}
		s.Ports = append(s.Ports, port)
	}
	return s
}

func withSequence(t *testing.T) Config {
	cfg := example()
	cfg.Sequences = []knock.Sequence{sequence(t, "7102", "19044/udp", "33127")}
	return cfg
}

func (r *room) stockKnock(ports ...string) {
	r.t.Helper()
	out, err := r.Client.Command(r.t.Context(), "/usr/bin/knock", append([]string{"-d", "20", r.Bastion.Addr.String()}, ports...)...).CombinedOutput()
	if err != nil {
		r.t.Fatalf("knock %v: %v\n%s", ports, err, out)
	}
}

func TestStockKnockOpensWithTheSequence(t *testing.T) {
	r := newRoom(t, withSequence(t))
	for _, wrong := range [][]string{
		{"7102", "33127", "19044:udp"}, {"7102", "19044:udp"}, {"7102", "19044:tcp", "33127"}, {"7102", "19044:udp", "33128"},
		{"7102", "5000", "19044:udp", "33127"}, {"19044:udp", "33127"},
	} {
		r.stockKnock(wrong...)
		if r.accepted(r.Client.Addr) {
			t.Fatalf("%v opened", wrong)
		}
	}
	r.stockKnock("7102", "19044:udp", "33127")
	if !r.accepted(r.Client.Addr) {
		t.Error("the sequence did not open")
	}
	if r.accepted(r.Stranger) {
		t.Error("open for another source")
	}
	if o := r.seen(); len(o) != 1 || !o[0].Sequence || o[0].Credential != 9 || o[0].Source != r.Client.Addr {
		t.Errorf("observed %+v", o)
	}
}

func TestScansDoNotOpen(t *testing.T) {
	cfg := example()
	cfg.Sequences = []knock.Sequence{sequence(t, "7102", "19044", "33127")}
	r := newRoom(t, cfg)
	for _, order := range [][]string{{"-r"}, nil, nil} { // ascending, then shuffled, which is nmap's way
		args := append([]string{"-Pn", "-n", "-sS", "--max-retries", "1", "-T5", "--min-rate", "8000", "-p", "1-65535"}, order...)
		out, err := r.Client.Command(t.Context(), "nmap", append(args, r.Bastion.Addr.String())...).CombinedOutput()
		if err != nil {
			t.Fatalf("nmap: %v\n%s", err, out)
		}
		if r.accepted(r.Client.Addr) {
			t.Errorf("opened by nmap %v:\n%s", args, out)
		}
	}
	if o := r.seen(); len(o) != 0 {
		t.Errorf("observed %+v", o)
	}
}

func TestFlushedRulesetStaysClosedAndComesBack(t *testing.T) {
	r := newRoomWith(t, example(), true)
	ctx, cancel := context.WithCancel(t.Context())
	watched := make(chan error, 1)
	token, second := tok(1), tok(2)
	tokens := []Token{{token, 42, soon()}, {second, 43, soon()}}
	r.load(tokens...)
	go func() {
		watched <- r.fw.Watch(ctx, func(lost bool) error {
			if lost {
				t.Error("openings were lost")
			}
			return r.fw.AddTokens(tokens)
		})
	}()
	r.send(r.Client.Addr, token[:])
	if !r.accepted(r.Client.Addr) || len(r.seen()) != 1 {
		t.Fatal("the token did not open")
	}
	if err := r.fw.Admit(netip.MustParseAddr("10.77.0.9"), []uint16{22}, soon()); err != nil {
		t.Fatal(err)
	}
	before, err := r.fw.Windows()
	if err != nil {
		t.Fatal(err)
	}
	strangers, err := r.Strangers(t.Context(), 16)
	if err != nil {
		t.Fatal(err)
	}
	p := r.Prober(r.Client, r.Bastion.Addr, 1194, strangers...)
	probing, stop := context.WithCancel(t.Context())
	probed := make(chan error, 1)
	go func() { probed <- p.Run(probing) }()
	for range 4 {
		time.Sleep(300 * time.Millisecond)
		// A plain table each time: the one that a repair makes would be owned.
		out, err := r.Bastion.Command(t.Context(), "nft", "flush", "ruleset").CombinedOutput()
		if err != nil {
			t.Fatalf("nft: %v\n%s", err, out)
		}
	}
	time.Sleep(500 * time.Millisecond)
	stop()
	if err := <-probed; err != nil {
		t.Error("prober: ", err)
	}
	tally := p.Tally()
	t.Logf("strangers during four flushes: %+v", tally)
	if tally.Accepted != 0 || tally.Refused != 0 || tally.Silent < 50 {
		t.Errorf("strangers were answered: %+v", tally)
	}
	after, err := r.fw.Windows()
	if err != nil || len(after) != 1 || after[0].Source != r.Client.Addr || after[0].Expires.Sub(before[0].Expires).Abs() > time.Second {
		t.Errorf("windows before %+v, after %+v, %v", before, after, err)
	}
	if !r.accepted(r.Client.Addr) {
		t.Error("the friend's window did not come back")
	}
	r.send(r.Stranger, token[:])
	if r.accepted(r.Stranger) {
		t.Error("the spent token opened again after the repair")
	}
	r.send(r.Stranger, second[:])
	if !r.accepted(r.Stranger) {
		t.Error("the unspent token did not come back")
	}
	cancel()
	if err := <-watched; err != nil {
		t.Error(err)
	}
	if a, err := r.fw.elementsLocked("admitted"); err != nil || len(a) != 1 { // nobody else is at the connection now
		t.Errorf("admitted after the repair: %v, %v", a, err)
	}
}

func TestWindowExpiresOnTimeWithoutTheDaemon(t *testing.T) {
	cfg := example()
	cfg.Window = 2 * time.Second
	r := newRoom(t, cfg)
	token := tok(1)
	r.load(Token{token, 42, soon()})
	r.send(r.Client.Addr, token[:])
	opened := time.Now()
	for r.accepted(r.Client.Addr) {
		if time.Since(opened) > 5*time.Second {
			t.Fatal("still open after 5 s")
		}
		time.Sleep(50 * time.Millisecond)
	}
	if d := time.Since(opened); d < 1900*time.Millisecond || d > 3*time.Second {
		t.Errorf("closed after %v, want 2 s", d)
	}
}
