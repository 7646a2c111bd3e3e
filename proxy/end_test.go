package proxy

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"syscall"
	"testing"
	"time"

	"perimeterd/internal/session"
)

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
