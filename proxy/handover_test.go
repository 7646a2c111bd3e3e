package proxy

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"perimeterd/internal/session"
)

// generation is one process of several that hand tunnels on: a Server with everybody's passage, listener and people.
func generation(t *testing.T, cfg Config, p *Passage, people *people, watch func(Access)) (addr string, end func()) {
	t.Helper()
	l := newLab(t, cfg)
	l.sessions = people
	l.Hand(p)
	l.Watch(watch)
	ln, err := Listen(t.Context(), netip.MustParseAddrPort(bastion+":0"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx, ln) }()
	end = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if n := l.Live(); n != 0 {
			t.Errorf("%d links are left", n)
		}
	})
	t.Cleanup(end)
	return ln.Addr().String(), end
}

func newPassage(t *testing.T) *Passage {
	t.Helper()
	p, err := NewPassage()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	return p
}

func folk() (*people, session.Session) {
	p := &people{by: map[netip.Addr]session.Session{}}
	return p, p.put("10.77.0.2", "alice", "operators")
}

// through opens a tunnel at a proxy.
func through(t *testing.T, proxy, target string) *net.TCPConn {
	t.Helper()
	far, err := net.ResolveTCPAddr("tcp", proxy)
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.DialTCP("tcp", &net.TCPAddr{IP: net.IPv4(10, 77, 0, 2)}, far)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if status, body := ask(t, c, "CONNECT "+target+" HTTP/1.1\r\nHost: "+target+"\r\n\r\n"); status != 200 {
		t.Fatalf("CONNECT %s: %d %s", target, status, body)
	}
	return c
}

// seeded writes n bytes that the seed names, and hash reads to the end: what it got, and how many.
func seeded(c io.Writer, seed uint64, n int) error {
	_, err := io.CopyN(c, rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)}), int64(n))
	return err
}

func hashOf(r io.Reader) (sum [32]byte, n int64, err error) {
	h := sha256.New()
	n, err = io.Copy(h, r)
	return [32]byte(h.Sum(nil)), n, err
}

func expected(seed uint64, n int) [32]byte {
	h := sha256.New()
	seeded(h, seed, n)
	return [32]byte(h.Sum(nil))
}

// slowly reads a little at a time, so that a pipe and every buffer on the way are full.
type slowly struct{ io.Reader }

func (s slowly) Read(b []byte) (int, error) {
	time.Sleep(time.Millisecond)
	return s.Reader.Read(b[:min(len(b), 16<<10)])
}

func TestTunnelsGoOnThroughManyProcessesToTheByte(t *testing.T) {
	const flows, size, generations = 24, 12 << 20, 6
	people, _ := folk()
	p := newPassage(t)
	var mu sync.Mutex
	var ended []Access
	watch := func(a Access) {
		mu.Lock()
		defer mu.Unlock()
		ended = append(ended, a)
	}
	// Odd ones send to the client, even ones take from it; both answer the end of the other stream with a byte.
	uploads := make(chan [32]byte, flows)
	var seeds sync.Mutex
	next := uint64(0)
	at := serveOutside(t, outsideHost+":0", func(c *net.TCPConn) {
		kind := make([]byte, 1)
		if _, err := io.ReadFull(c, kind); err != nil {
			return
		}
		if kind[0] == 'd' {
			seeds.Lock()
			next++
			seed := next
			seeds.Unlock()
			c.Write([]byte{byte(seed)})
			seeded(c, seed, size)
			c.CloseWrite()
			io.Copy(io.Discard, c)
			return
		}
		sum, _, err := hashOf(slowly{c})
		if err != nil {
			t.Error("the server's reading: ", err)
		}
		uploads <- sum
		io.WriteString(c, "!")
	})
	before := runtime.NumGoroutine()
	proxy, end := generation(t, openConfig(), p, people, watch)
	var wg sync.WaitGroup
	for i := range flows {
		c := through(t, proxy, at.String())
		if i%2 == 0 {
			wg.Go(func() {
				io.WriteString(c, "u")
				if err := seeded(c, uint64(i), size); err != nil {
					t.Error(err)
				}
				c.CloseWrite()
				if b, err := io.ReadAll(c); string(b) != "!" || err != nil {
					t.Errorf("the upload's answer: %q, %v", b, err)
				}
			})
			continue
		}
		wg.Go(func() {
			io.WriteString(c, "d")
			seed := make([]byte, 1)
			if _, err := io.ReadFull(c, seed); err != nil {
				t.Error(err)
				return
			}
			var r io.Reader = c
			if i%4 == 1 {
				r = slowly{c}
			}
			sum, n, err := hashOf(r)
			if err != nil || n != size || sum != expected(uint64(seed[0]), size) {
				t.Errorf("a download: %d bytes of %d, right %v, %v", n, size, sum == expected(uint64(seed[0]), size), err)
			}
			c.Close()
		})
	}
	idle := through(t, proxy, at.String())
	for range generations {
		time.Sleep(20 * time.Millisecond) // so that something moves; nothing hangs on it
		end()
		_, end = generation(t, openConfig(), p, people, watch)
	}
	wg.Wait()
	for range flows / 2 {
		if sum := <-uploads; !func() bool {
			for i := 0; i < flows; i += 2 {
				if sum == expected(uint64(i), size) {
					return true
				}
			}
			return false
		}() {
			t.Error("the server got other bytes than a client sent")
		}
	}
	idle.SetDeadline(time.Now().Add(time.Minute))
	io.WriteString(idle, "u")
	idle.CloseWrite()
	if b, err := io.ReadAll(idle); string(b) != "!" || err != nil {
		t.Errorf("who was silent all the time: %q, %v", b, err)
	}
	eventually(t, "each tunnel has its line", func() bool { mu.Lock(); defer mu.Unlock(); return len(ended) == flows+1 })
	end()
	for _, a := range ended {
		up, down := int64(1), int64(1)
		if a.Up > 1 {
			up += size
		} else if a.Down > 1 {
			down += size
		}
		if a.End != Closed || a.Up != up || a.Down != down || a.User != "alice" || !a.Decision.Allow {
			t.Errorf("a tunnel's line: %+v", a)
		}
	}
	// Each generation's name server stays until the test's end.
	eventually(t, "no goroutine is left", func() bool { return runtime.NumGoroutine() <= before+generations+1 })
}

// resetBoth says that neither side of a tunnel takes it for ended well.
func resetBoth(t *testing.T, client net.Conn, server <-chan error) {
	t.Helper()
	client.SetDeadline(time.Now().Add(time.Minute))
	if b, err := io.ReadAll(client); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the client got %d bytes, %v: want a reset", len(b), err)
	}
	if err := <-server; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the server got %v: want a reset", err)
	}
}

func TestWhatIsHandedOverIsJudgedAgain(t *testing.T) {
	results := make(chan error, 1)
	at := serveOutside(t, outsideHost+":0", func(c *net.TCPConn) {
		io.WriteString(c, "half of it")
		_, err := io.Copy(io.Discard, c)
		results <- err
	})
	closed := openConfig()
	closed.Rules[0].Allow = []string{"www.lab.test"}
	for _, tt := range []struct {
		name   string
		change func(*people, *Config, *Passage)
		want   Reason
	}{
		{"the session ended", func(p *people, _ *Config, _ *Passage) { p.drop("10.77.0.2") }, NoSession},
		{"another has the address", func(p *people, _ *Config, _ *Passage) { p.put("10.77.0.2", "alice", "operators") }, NoSession},
		{"the rules changed", func(_ *people, c *Config, _ *Passage) { *c = closed }, PolicyChanged},
		{"the user's groups changed", func(p *people, _ *Config, _ *Passage) {
			p.mu.Lock()
			defer p.mu.Unlock()
			a := netip.MustParseAddr("10.77.0.2")
			s := p.by[a]
			s.Groups = []string{"readers"}
			p.by[a] = s
		}, PolicyChanged},
		{"nobody takes it", func(_ *people, _ *Config, p *Passage) { p.Close() }, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			people, _ := folk()
			cfg, p := openConfig(), newPassage(t)
			var mu sync.Mutex
			var ended []Access
			watch := func(a Access) { mu.Lock(); defer mu.Unlock(); ended = append(ended, a) }
			proxy, end := generation(t, cfg, p, people, watch)
			c := through(t, proxy, at.String())
			if _, err := io.ReadFull(c, make([]byte, 4)); err != nil {
				t.Fatal(err)
			}
			end()
			if len(ended) != 0 {
				t.Errorf("a line although it goes on: %+v", ended)
			}
			tt.change(people, &cfg, p)
			if tt.want != "" {
				_, end = generation(t, cfg, p, people, watch)
			}
			resetBoth(t, c, results)
			if end(); tt.want != "" && (len(ended) != 1 || ended[0].End != tt.want || ended[0].Up != 0 || ended[0].Down != 10) {
				t.Errorf("the lines: %+v, want one with %s", ended, tt.want)
			}
		})
	}
}

func TestRequestUnderWayBecomesATunnelBeforeTheEnd(t *testing.T) {
	people, _ := folk()
	cfg, p := openConfig(), newPassage(t)
	cfg.Rules[0].TLS = true
	at := serveOutside(t, outsideHost+":0", func(c *net.TCPConn) { io.Copy(c, c) })
	proxy, end := generation(t, cfg, p, people, func(Access) {})
	c := through(t, proxy, "www.lab.test:"+strings.Split(at.String(), ":")[1])
	stopped := make(chan struct{})
	go func() { end(); close(stopped) }()
	first := hello(t, &tls.Config{ServerName: "www.lab.test"})
	for _, b := range [][]byte{first[:50], first[50:]} {
		if _, err := c.Write(b); err != nil {
			t.Fatal(err)
		}
		time.Sleep(50 * time.Millisecond)
	}
	<-stopped
	generation(t, cfg, p, people, func(Access) {})
	got := make([]byte, len(first))
	c.SetDeadline(time.Now().Add(time.Minute))
	if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, first) {
		t.Errorf("the echo: %v, the same %v", err, bytes.Equal(got, first))
	}
}

func TestBandwidthIsKeptAndTakenOffAfterAHandover(t *testing.T) {
	people, _ := folk()
	cfg, p := openConfig(), newPassage(t)
	cfg.PerUserBandwidth = 8 << 20 // a megabyte a second
	at := serveOutside(t, outsideHost+":0", func(c *net.TCPConn) { seeded(c, 1, 16<<20) })
	proxy, end := generation(t, cfg, p, people, func(Access) {})
	c := through(t, proxy, at.String())
	read := make(chan [32]byte, 1)
	go func() { sum, _, _ := hashOf(c); read <- sum }()
	time.Sleep(300 * time.Millisecond)
	end()
	select {
	case <-read:
		t.Error("sixteen megabytes passed in a moment")
	default:
	}
	generation(t, openConfig(), p, people, func(Access) {})
	select {
	case sum := <-read:
		if sum != expected(1, 16<<20) {
			t.Error("other bytes arrived")
		}
	case <-time.After(time.Minute):
		t.Error("the limit outlived its configuration")
	}
}

func TestGarbageInAPassageEndsWithResets(t *testing.T) {
	p := newPassage(t)
	local, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer local.Close()
	c, err := net.Dial("tcp", local.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	far, err := local.Accept()
	if err != nil {
		t.Fatal(err)
	}
	far.(*net.TCPConn).SetLinger(0)
	_, out := p.Ends()
	if err := withDescriptors([]syscall.Conn{out, far.(*net.TCPConn)}, nil, func(fds []int) error {
		var errs []error
		for _, m := range []string{`[`, `[{}]`, `{}`, `[{"Access":{"Session":"zz"}}]`} {
			errs = append(errs, syscall.Sendmsg(fds[0], []byte(m), syscall.UnixRights(fds[1]), nil, 0))
		}
		return errors.Join(errs...)
	}); err != nil {
		t.Fatal(err)
	}
	far.Close()
	people, _ := folk()
	_, end := generation(t, openConfig(), p, people, func(Access) {})
	c.SetDeadline(time.Now().Add(time.Minute))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("who was in it got %v", err)
	}
	end()
}
