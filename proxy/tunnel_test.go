package proxy

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"perimeterd/internal/session"
)

// tunnel opens one through the proxy. The connection is past the answer.
func (l *lab) tunnel(from, target string) *net.TCPConn {
	l.t.Helper()
	c := l.from(from)
	if status, body := ask(l.t, c, "CONNECT "+target+" HTTP/1.1\r\nHost: "+target+"\r\n\r\n"); status != 200 {
		l.t.Fatalf("CONNECT %s: %d %s", target, status, body)
	}
	return c
}

func TestHalfCloseIsKeptBothWays(t *testing.T) {
	l := startLab(t, openConfig())
	// The server answers only after the client has ended its side, and the other way round.
	late := serveOutside(t, outsideHost+":0", func(c *net.TCPConn) {
		b, _ := io.ReadAll(c)
		c.Write(bytes.ToUpper(b))
	})
	c := l.tunnel("10.77.0.2", late.String())
	io.WriteString(c, "question")
	c.CloseWrite()
	if b, err := io.ReadAll(c); string(b) != "QUESTION" || err != nil {
		t.Errorf("got %q, %v", b, err)
	}
	if a := l.next(); a.Up != 8 || a.Down != 8 || a.End != Closed || a.Decision.Reason != Allowed {
		t.Errorf("logged %+v", a)
	}
	got := make(chan string, 1)
	early := serveOutside(t, outsideHost+":0", func(c *net.TCPConn) {
		io.WriteString(c, "greeting")
		c.CloseWrite()
		b, _ := io.ReadAll(c)
		got <- string(b)
	})
	c = l.tunnel("10.77.0.2", early.String())
	if b, err := io.ReadAll(c); string(b) != "greeting" || err != nil {
		t.Errorf("got %q, %v", b, err)
	}
	io.WriteString(c, "afterwards")
	c.CloseWrite()
	if s := <-got; s != "afterwards" {
		t.Errorf("the server got %q", s)
	}
}

// A long tunnel is counted while it lasts, and to the byte at its end.
func TestTrafficIsToldWhileItMoves(t *testing.T) {
	cfg := openConfig()
	cfg.Idle = 10 * time.Second // and looked at every second
	l := newLab(t, cfg)
	var up, down atomic.Int64
	l.WatchTraffic(func(user string, u, d int64) {
		if up.Add(u); user != "alice" || u < 0 || d < 0 {
			t.Errorf("%s: %d up, %d down", user, u, d)
		}
		down.Add(d)
	})
	l.run()
	at := serveOutside(t, outsideHost+":0", func(c *net.TCPConn) { io.Copy(c, c) })
	c := l.tunnel("10.77.0.2", at.String())
	for n := int64(1); n <= 2; n++ {
		io.WriteString(c, "hello")
		if _, err := io.ReadFull(c, make([]byte, 5)); err != nil {
			t.Fatal(err)
		}
		eventually(t, "what has moved so far is told", func() bool { return up.Load() == 5*n && down.Load() == 5*n })
	}
	if l.Live() != 1 {
		t.Error("it was told at the end only")
	}
	io.WriteString(c, "!")
	c.CloseWrite()
	io.Copy(io.Discard, c)
	eventually(t, "the rest is told", func() bool { return up.Load() == 11 && down.Load() == 11 })
}

func TestAResetIsNeverTurnedIntoAnEnd(t *testing.T) {
	l := startLab(t, openConfig())
	results := make(chan error, 1)
	at := serveOutside(t, outsideHost+":0", func(c *net.TCPConn) {
		b := make([]byte, 1)
		io.ReadFull(c, b)
		switch b[0] {
		case 'r': // the server resets
			io.WriteString(c, "half")
			time.Sleep(50 * time.Millisecond)
			c.SetLinger(0)
		default: // it reads on and says how that ended
			_, err := io.Copy(io.Discard, c)
			for err == nil { // an end came first; what follows it?
				if _, err = c.Write([]byte("x")); err == nil {
					time.Sleep(20 * time.Millisecond)
				}
			}
			results <- err
		}
	})
	c := l.tunnel("10.77.0.2", at.String())
	io.WriteString(c, "r")
	if b, err := io.ReadAll(c); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("server's reset: %q, %v", b, err)
	}
	if a := l.next(); a.End != ServerReset {
		t.Errorf("logged %+v", a)
	}
	c = l.tunnel("10.77.0.2", at.String())
	io.WriteString(c, "c")
	c.SetLinger(0)
	c.Close()
	if err := <-results; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("client's reset: %v", err)
	}
	if a := l.next(); a.End != ClientReset {
		t.Errorf("logged %+v", a)
	}
	// A reset after an end.
	c = l.tunnel("10.77.0.2", at.String())
	io.WriteString(c, "c")
	c.CloseWrite()
	time.Sleep(50 * time.Millisecond)
	c.SetLinger(0)
	c.Close()
	if err := <-results; !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
		t.Errorf("client's late reset: %v", err)
	}
	if a := l.next(); a.End != ClientReset && a.End != ServerReset {
		t.Errorf("logged %+v", a)
	}
}

func TestEarlyDataArrivesOnceAndFirst(t *testing.T) {
	l := startLab(t, openConfig())
	got := make(chan string, 1)
	at := serveOutside(t, outsideHost+":0", func(c *net.TCPConn) { b, _ := io.ReadAll(c); got <- string(b) })
	for _, n := range []int{1, 1000, 20000, 100000} {
		early := strings.Repeat("0123456789", n/10+1)[:n]
		c := l.from("10.77.0.2")
		if status, _ := ask(t, c, "CONNECT "+at.String()+" HTTP/1.0\r\n\r\n"+early); status != 200 {
			t.Fatal(status)
		}
		io.WriteString(c, "later")
		c.CloseWrite()
		if s := <-got; s != early+"later" {
			t.Errorf("%d early bytes: %d arrived", n, len(s))
		}
		if a := l.next(); a.Up != int64(n+5) {
			t.Errorf("counted %d up", a.Up)
		}
	}
}

func TestBulkIsWholeBothWays(t *testing.T) {
	const size = 64 << 20
	l := startLab(t, openConfig())
	sum := make(chan [32]byte, 2)
	at := serveOutside(t, outsideHost+":0", func(c *net.TCPConn) {
		go func() {
			h := sha256.New()
			io.Copy(h, c)
			sum <- [32]byte(h.Sum(nil))
		}()
		writePattern(c, size, 1)
		c.CloseWrite()
		<-time.After(30 * time.Second)
	})
	c := l.tunnel("10.77.0.2", at.String())
	want := make(chan [32]byte, 1)
	go func() {
		want <- writePattern(c, size, 2)
		c.CloseWrite()
	}()
	h := sha256.New()
	if n, err := io.Copy(h, c); n != size || err != nil {
		t.Fatalf("%d bytes, %v", n, err)
	}
	if [32]byte(h.Sum(nil)) != writePattern(io.Discard, size, 1) {
		t.Error("what came down is not what was sent")
	}
	if <-want != <-sum {
		t.Error("what went up is not what was sent")
	}
	if a := l.next(); a.Up != size || a.Down != size {
		t.Errorf("counted %d up, %d down", a.Up, a.Down)
	}
}

// writePattern writes in odd pieces, with pauses that make a relay change its ways, and returns the hash.
func writePattern(w io.Writer, size int, seed byte) [32]byte {
	h := sha256.New()
	b := make([]byte, 300001)
	for i := range b {
		b[i] = byte(i*int(seed)) ^ byte(i>>8)
	}
	for i := 0; size > 0; i++ {
		n := min(size, 1+i*7919%len(b))
		h.Write(b[:n])
		w.Write(b[:n])
		size -= n
		if i%40 == 39 && w != io.Discard {
			time.Sleep(20 * time.Millisecond)
		}
	}
	return [32]byte(h.Sum(nil))
}

func TestAStalledBulkTransferHoldsNoPipe(t *testing.T) {
	l := startLab(t, openConfig())
	at := serveOutside(t, outsideHost+":0", func(c *net.TCPConn) {
		c.Write(make([]byte, 20<<20))
		io.Copy(io.Discard, c)
	})
	runtime.GC() // Go keeps idle pipes until the second garbage collection
	runtime.GC()
	before := pipes(t)
	c := l.tunnel("10.77.0.2", at.String())
	if _, err := io.ReadFull(c, make([]byte, 20<<20)); err != nil {
		t.Fatal(err)
	}
	if pipes(t) == before {
		t.Error("nothing was spliced")
	}
	eventually(t, "no more pipes than before", func() bool {
		runtime.GC()
		return pipes(t) <= before
	})
	io.WriteString(c, "still there")
	c.CloseWrite()
	if a := l.next(); a.Down != 20<<20 || a.Up != 11 || a.End != Closed {
		t.Errorf("logged %+v", a)
	}
}

func pipes(t *testing.T) (n int) {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if to, _ := os.Readlink("/proc/self/fd/" + e.Name()); strings.HasPrefix(to, "pipe:") {
			n++
		}
	}
	return n
}

func TestSilenceAndAgeEndATunnel(t *testing.T) {
	cfg := openConfig()
	cfg.Idle, cfg.Lifetime = 400*time.Millisecond, 2*time.Second
	l := startLab(t, cfg)
	at := serveOutside(t, outsideHost+":0", func(c *net.TCPConn) { io.Copy(c, c) })
	for _, tt := range []struct {
		busy  bool
		want  Reason
		least time.Duration
	}{{false, Idle, cfg.Idle}, {true, Lifetime, cfg.Lifetime}} {
		began := time.Now()
		c := l.tunnel("10.77.0.2", at.String())
		if tt.busy {
			go func() {
				for {
					if _, err := c.Write([]byte("x")); err != nil {
						return
					}
					time.Sleep(50 * time.Millisecond)
				}
			}()
		}
		// A reset is told once, and the writer may have heard of it first.
		if _, err := io.Copy(io.Discard, c); !errors.Is(err, syscall.ECONNRESET) && !tt.busy {
			t.Errorf("%s: ended with %v", tt.want, err)
		}
		if d := time.Since(began); d < tt.least-50*time.Millisecond {
			t.Errorf("%s: after %v", tt.want, d)
		}
		if a := l.next(); a.End != tt.want {
			t.Errorf("logged %+v, want %s", a, tt.want)
		}
	}
}

func TestASessionsEndResetsAllOfItAtOnce(t *testing.T) {
	l := startLab(t, openConfig())
	at := serveOutside(t, outsideHost+":0", func(c *net.TCPConn) {
		go io.Copy(io.Discard, c)
		for {
			if _, err := c.Write(make([]byte, 1<<20)); err != nil {
				return
			}
		}
	})
	conns := map[string]*net.TCPConn{
		"tunnel":  l.tunnel("10.77.0.2", at.String()),
		"head":    l.from("10.77.0.2"),
		"silent":  l.from("10.77.0.2"),
		"dialing": l.from("10.77.0.2"),
		"plain":   l.from("10.77.0.2"),
	}
	io.WriteString(conns["head"], "CONNECT www")
	io.WriteString(conns["dialing"], "CONNECT "+silentHost+":443 HTTP/1.0\r\n\r\n")
	io.WriteString(conns["plain"], "GET http://"+silentHost+"/ HTTP/1.0\r\n\r\n")
	l.people.put("10.77.0.3", "bob", "operators")
	other := l.tunnel("10.77.0.3", at.String())
	eventually(t, "five connections, three of them with a request", func() bool {
		requests := 0
		for _, link := range l.links.of(l.alice.ID) {
			link.mu.Lock()
			if link.current != nil {
				requests++
			}
			link.mu.Unlock()
		}
		return l.Connections(l.alice.ID) == 5 && requests == 3
	})
	l.people.drop("10.77.0.2")
	l.SessionEvent(session.Event{Session: l.alice, Ended: session.Revoked})
	for name, c := range conns {
		if _, err := io.Copy(io.Discard, c); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%s: ended with %v, want a reset", name, err)
		}
	}
	if _, err := io.ReadFull(other, make([]byte, 5<<20)); err != nil {
		t.Errorf("another session's tunnel: %v", err)
	}
	for range 3 {
		if a := l.next(); a.End != Reason(session.Revoked) {
			t.Errorf("logged %+v", a)
		}
	}
	eventually(t, "no connection tracked", func() bool { return l.Connections(l.alice.ID) == 0 })
}

func TestAnAddressWithANewOwnerServesNoOldConnection(t *testing.T) {
	l := startLab(t, openConfig())
	at := serveOutside(t, outsideHost+":0", func(c *net.TCPConn) {})
	c := l.from("10.77.0.2")
	io.WriteString(c, "CONNECT "+at.String())
	eventually(t, "the connection known", func() bool { return l.Connections(l.alice.ID) == 1 })
	l.people.put("10.77.0.2", "mallory", "operators") // no event has come yet
	if status, _ := ask(t, c, " HTTP/1.0\r\n\r\n"); status != 403 {
		t.Errorf("status %d", status)
	}
	if a := l.next(); a.Decision.Reason != NoSession || a.User != "alice" {
		t.Errorf("logged %+v", a)
	}
}

func TestReloadResetsWhatIsNoLongerAllowed(t *testing.T) {
	cfg := openConfig()
	l := startLab(t, cfg)
	echo := func(c *net.TCPConn) { io.Copy(c, c) }
	stays := serveOutside(t, outsideHost+":0", echo)
	goes := serveOutside(t, outsideSecond+":0", echo)
	a, b := l.tunnel("10.77.0.2", stays.String()), l.tunnel("10.77.0.2", "denied.lab.test:"+strconv.Itoa(int(goes.Port())))
	bad := cfg
	bad.Rules = []Rule{{Allow: []string{"@nothing"}}}
	if err := l.Reload(bad); err == nil {
		t.Error("a bad configuration was taken")
	}
	moved := cfg
	moved.Listen = netip.MustParseAddrPort("10.77.0.1:8080")
	if err := l.Reload(moved); err == nil {
		t.Error("another port was taken")
	}
	cfg.Rules = append(cfg.Rules, Rule{Deny: []string{outsideSecond}})
	if err := l.Reload(cfg); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the denied tunnel: %v", err)
	}
	if x := l.next(); x.End != PolicyChanged {
		t.Errorf("logged %+v", x)
	}
	io.WriteString(a, "x")
	if _, err := io.ReadFull(a, make([]byte, 1)); err != nil {
		t.Errorf("the other tunnel: %v", err)
	}
}

// A tunnel whose opening nobody looked at is not TLS, as far as anybody knows.
func TestReloadThatWantsTLSCutsWhatDidNotProveIt(t *testing.T) {
	loose, strict := openConfig(), openConfig()
	strict.Rules = []Rule{strict.Rules[0]}
	strict.Rules[0].TLS = true
	l := startLab(t, strict)
	at := serveOutside(t, outsideHost+":0", func(c *net.TCPConn) { io.Copy(c, c) })
	open := func() *net.TCPConn {
		c := l.tunnel("10.77.0.2", "www.lab.test:"+strconv.Itoa(int(at.Port())))
		b := hello(t, &tls.Config{ServerName: "www.lab.test"})
		c.Write(b)
		if _, err := io.ReadFull(c, make([]byte, len(b))); err != nil {
			t.Fatal(err)
		}
		return c
	}
	proved := open()
	if err := l.Reload(loose); err != nil {
		t.Fatal(err)
	}
	unproved := open()
	if err := l.Reload(strict); err != nil {
		t.Fatal(err)
	}
	if _, err := unproved.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("opened while nobody looked: %v", err)
	}
	if a := l.next(); a.End != PolicyChanged {
		t.Errorf("logged %+v", a)
	}
	io.WriteString(proved, "x")
	if _, err := io.ReadFull(proved, make([]byte, 1)); err != nil {
		t.Errorf("opened as it should: %v", err)
	}
}

func TestAKeptConnectionAgesWhileItIsSilent(t *testing.T) {
	cfg := openConfig()
	cfg.Lifetime = time.Second
	l := startLab(t, cfg)
	host, _ := origin(t, func(http.ResponseWriter, *http.Request) {})
	c := l.from("10.77.0.2")
	if status, _ := ask(t, c, "GET http://"+host+"/ HTTP/1.1\r\nHost: "+host+"\r\n\r\n"); status != 200 {
		t.Fatal(status)
	}
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("ended with %v", err)
	}
}

func TestRunEndsWithEverythingReset(t *testing.T) {
	l := startLab(t, openConfig())
	at := serveOutside(t, outsideHost+":0", func(c *net.TCPConn) { io.Copy(c, c) })
	c, idle := l.tunnel("10.77.0.2", at.String()), l.from("10.77.0.2")
	eventually(t, "two connections", func() bool { return l.Live() == 2 })
	l.stop()
	for _, c := range []*net.TCPConn{c, idle} {
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("ended with %v", err)
		}
	}
	if a := l.next(); a.End != Shutdown {
		t.Errorf("logged %+v", a)
	}
	if _, err := net.Dial("tcp", l.addr); err == nil {
		t.Error("still accepting")
	}
}

func TestBindIsTheSource(t *testing.T) {
	cfg := openConfig()
	cfg.Bind = netip.MustParseAddr("198.18.0.9")
	l := startLab(t, cfg)
	at := serveOutside(t, outsideHost+":0", func(c *net.TCPConn) { io.WriteString(c, remote(c).Addr().String()) })
	if b, _ := io.ReadAll(l.tunnel("10.77.0.2", at.String())); string(b) != "198.18.0.9" {
		t.Errorf("came from %s", b)
	}
}

// With a source address given, each of its ports still leads to every destination, and not to one only.
func TestBindLeavesPortsToOtherDestinations(t *testing.T) {
	cfg := openConfig()
	cfg.Bind = netip.MustParseAddr("198.18.0.9")
	l := startLab(t, cfg)
	l.people.put("10.77.0.3", "bob", "operators")
	var to []string
	for _, host := range []string{outsideHost, outsideSecond} {
		to = append(to, serveOutside(t, host+":0", func(c *net.TCPConn) { io.Copy(c, c) }).String())
	}
	const ports = "/proc/sys/net/ipv4/ip_local_port_range"
	before, err := os.ReadFile(ports)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(ports, []byte("40000 40009"), 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.WriteFile(ports, before, 0) })
	d := net.Dialer{Control: func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1) })
	}}
	for i := range 16 { // eight from each client, eight to each destination, ten ports
		d.LocalAddr = &net.TCPAddr{IP: net.IPv4(10, 77, 0, byte(2+i%2))}
		c, err := d.Dial("tcp", l.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if status, body := ask(t, c.(*net.TCPConn), "CONNECT "+to[i/8]+" HTTP/1.0\r\n\r\n"); status != 200 {
			t.Fatalf("connection %d: %d %s", i+1, status, body)
		}
	}
}

func TestIPv6IsDialedOnlyWhereConfigured(t *testing.T) {
	cfg := openConfig()
	cfg.Rules[0].Allow = append(cfg.Rules[0].Allow, "2001:db8:18::/64")
	cfg.AllowPrivate = append(cfg.AllowPrivate, netip.MustParsePrefix("2001:db8:18::/64"))
	l := startLab(t, cfg)
	at := serveOutside(t, "[2001:db8:18::2]:0", func(c *net.TCPConn) { io.WriteString(c, "six") })
	if status, _ := ask(t, l.from("10.77.0.2"), "CONNECT "+at.String()+" HTTP/1.0\r\n\r\n"); status != 403 {
		t.Errorf("off: %d", status)
	}
	if a := l.next(); a.Decision.Reason != IPv6Off {
		t.Errorf("logged %+v", a)
	}
	cfg.IPv6 = true
	if err := l.Reload(cfg); err != nil {
		t.Fatal(err)
	}
	if b, _ := io.ReadAll(l.tunnel("10.77.0.2", at.String())); string(b) != "six" {
		t.Errorf("on: %q", b)
	}
	for _, own := range []string{"[2001:db8:18::1]:1", "198.18.0.1:1"} {
		if status, _ := ask(t, l.from("10.77.0.2"), "CONNECT "+own+" HTTP/1.0\r\n\r\n"); status != 403 {
			t.Errorf("%s: %d", own, status)
		}
	}
}

func TestFailuresOnTheWayAreTold(t *testing.T) {
	l := startLab(t, openConfig())
	for _, tt := range []struct {
		target string
		status int
		reason Reason
	}{
		{outsideHost + ":1", 502, ConnectRefused},
		{silentHost + ":443", 0, ""}, // 502 or 504, as the neighbour table or the clock is faster
		{"none.lab.test:443", 502, DNSNotFound},
	} {
		status, _ := ask(t, l.from("10.77.0.2"), "CONNECT "+tt.target+" HTTP/1.0\r\n\r\n")
		a := l.next()
		if tt.reason == "" {
			if status != 504 && status != 502 {
				t.Errorf("%s: %d", tt.target, status)
			}
			continue
		}
		if status != tt.status || a.Decision.Reason != tt.reason || !a.Decision.Allow {
			t.Errorf("%s: %d, %+v", tt.target, status, a)
		}
	}
}

func TestObserveRefusesOnlyWhatIsNeverAllowed(t *testing.T) {
	cfg := openConfig()
	cfg.Observe = true
	cfg.Rules = []Rule{{Deny: []string{outsideSecond}}, {Allow: []string{outsideHost}, Groups: []string{"*"}, Ports: allPorts(), TLS: true}}
	l := startLab(t, cfg)
	for _, tt := range []struct {
		host string
		want Reason
		rule int
	}{{outsideHost, NotTLS, 2}, {outsideSecond, DeniedByRule, 1}, {"denied.lab.test", DeniedByRule, 1}, {"www.lab.test", NoRule, 0}} {
		listen := outsideHost
		if tt.want == DeniedByRule {
			listen = outsideSecond
		}
		at := serveOutside(t, listen+":0", func(c *net.TCPConn) { io.Copy(c, c) })
		c := l.tunnel("10.77.0.2", net.JoinHostPort(tt.host, strconv.Itoa(int(at.Port()))))
		io.WriteString(c, "plain text")
		c.CloseWrite()
		if b, err := io.ReadAll(c); string(b) != "plain text" || err != nil {
			t.Errorf("%s: %q, %v", tt.host, b, err)
		}
		if a := l.next(); !a.Decision.Observed || a.Decision.Reason != tt.want || a.Decision.Rule != tt.rule {
			t.Errorf("%s: logged %+v", tt.host, a.Decision)
		}
	}
	for target, want := range map[string]Reason{"169.254.169.254:80": Metadata, "private.lab.test:80": Private} {
		if status, _ := ask(t, l.from("10.77.0.2"), "CONNECT "+target+" HTTP/1.0\r\n\r\n"); status != 403 {
			t.Errorf("%s: %d", target, status)
		}
		if a := l.next(); a.Decision.Reason != want || a.Decision.Allow || a.Decision.Observed {
			t.Errorf("%s: logged %+v", target, a.Decision)
		}
	}
	if !strings.Contains(l.logged(), `"decision":"observe"`) {
		t.Error("no line says observe")
	}
}

func certificate(t *testing.T, names ...string) tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: names, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func TestATunnelOpensWithAHelloForItsName(t *testing.T) {
	cfg := openConfig()
	cfg.Rules[0].TLS = true
	l := startLab(t, cfg)
	server := &tls.Config{Certificates: []tls.Certificate{certificate(t, "www.lab.test")}}
	got := make(chan int, 100)
	at := serveOutside(t, outsideHost+":0", func(c *net.TCPConn) {
		tc := tls.Server(c, server)
		if err := tc.Handshake(); err != nil {
			got <- 0
			return
		}
		n, _ := io.Copy(tc, tc)
		got <- int(n)
	})
	p := ":" + strconv.Itoa(int(at.Port()))
	for _, tt := range []struct {
		name, target, sni string
		piece             int
		want              Reason
	}{
		{"the name", "www.lab.test" + p, "www.lab.test", 0, ""},
		{"the name, in capitals", "www.lab.test" + p, "WWW.lab.TEST", 0, ""},
		{"the name, in pieces", "www.lab.test" + p, "www.lab.test", 7, ""},
		{"another name", "www.lab.test" + p, "evil.test", 0, SNIMismatch},
		{"no name", "www.lab.test" + p, "", 0, SNIMissing},
		{"an address and no name", at.String(), "", 0, ""},
		{"an address and a name", at.String(), "www.lab.test", 0, SNIMismatch},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l.t = t
			c := l.tunnel("10.77.0.2", tt.target)
			tc := tls.Client(pieces{c, tt.piece}, &tls.Config{ServerName: tt.sni, InsecureSkipVerify: true})
			err := tc.Handshake()
			if tt.want != "" {
				if !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("handshake: %v, want a reset", err)
				}
				if a := l.next(); a.Decision.Allow || a.Decision.Reason != tt.want || a.End != tt.want {
					t.Errorf("logged %+v", a)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			io.WriteString(tc, "hello")
			tc.CloseWrite()
			if b, err := io.ReadAll(tc); string(b) != "hello" || err != nil {
				t.Errorf("%q, %v", b, err)
			}
			c.Close()
			if a := l.next(); !a.Decision.Allow || a.Decision.Reason != Allowed {
				t.Errorf("logged %+v", a)
			}
		})
	}
	l.t = t
	for raw, want := range map[string]Reason{
		"GET / HTTP/1.1\r\n\r\n": NotTLS, "SSH-2.0-x\r\n": NotTLS, "\x16\x03\x01\x00\x00": NotTLS,
		"\x16\x03\x01\x40\x01": NotTLS, "\x16\x03\x01\x00\x04\x01\x00\x50\x00": NotTLS,
	} {
		c := l.tunnel("10.77.0.2", "www.lab.test"+p)
		io.WriteString(c, raw)
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%q: %v", raw, err)
		}
		if a := l.next(); a.Decision.Reason != want {
			t.Errorf("%q: logged %+v", raw, a)
		}
	}
	// Nothing at all, or only the beginning: ten seconds, and not a byte from the server before.
	c := l.tunnel("10.77.0.2", "www.lab.test"+p)
	io.WriteString(c, "\x16\x03\x01\x01\x00\x01")
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("half a hello: %v", err)
	}
	if a := l.next(); a.Decision.Reason != SNITimeout || a.Duration < 9*time.Second {
		t.Errorf("logged %+v", a)
	}
	// Plain HTTP is no way around.
	if status, _ := ask(t, l.from("10.77.0.2"), "GET http://www.lab.test"+p+"/ HTTP/1.1\r\nHost: www.lab.test"+p+"\r\n\r\n"); status != 403 {
		t.Errorf("plain: %d", status)
	}
	if a := l.next(); a.Decision.Reason != TLSRequired {
		t.Errorf("plain: %+v", a)
	}
}

// pieces writes a few bytes at a time.
type pieces struct {
	net.Conn
	size int
}

func (p pieces) Write(b []byte) (n int, err error) {
	if p.size == 0 {
		return p.Conn.Write(b)
	}
	for n < len(b) && err == nil {
		var m int
		m, err = p.Conn.Write(b[n:min(n+p.size, len(b))])
		n += m
		time.Sleep(time.Millisecond)
	}
	return n, err
}
