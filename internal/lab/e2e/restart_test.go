package e2e

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"perimeterd/internal/lab"
)

// serviceOnBastion gives sessions a TCP service of the host, and returns what connected to it.
func (s *stage) serviceOnBastion() <-chan net.Conn {
	s.t.Helper()
	l, err := s.Bastion.Listen("tcp", "10.77.0.1:7")
	if err != nil {
		s.t.Fatal(err)
	}
	conns := make(chan net.Conn, 1)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			conns <- c
		}
	}()
	s.t.Cleanup(func() { l.Close() })
	return conns
}

// withService offers port 7 to everybody.
var withService = lab.Setting{Key: "keepalive", Value: "\"25s\"\n[[tunnel.service]]\nport = 7\ngroups = [\"*\"]"}

// await polls until holds, and says how long it took.
func (s *stage) await(what string, holds func() bool) time.Duration {
	s.t.Helper()
	start := time.Now()
	for !holds() {
		if time.Since(start) > 30*time.Second {
			s.t.Fatal("never: ", what)
		}
		time.Sleep(time.Millisecond)
	}
	return time.Since(start)
}

func TestKilledDaemonComesBackWithItsSessionsAndResetsWhatItProxied(t *testing.T) {
	s := newStage(t, lab.Options{}, withService)
	s.ok(s.alice.VPN(s.ctx, "up"))
	before := s.ok(s.alice.VPN(s.ctx, "exec", "--", "cat", "/dev/null")) + s.sessionLine()
	service := s.serviceOnBastion()
	client, err := s.Client.DialFrom(s.ctx, netip.Addr{}, "tcp", "10.77.0.1:7")
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	host := <-service
	defer host.Close()
	download := s.curl("-o", "/dev/null", "--max-time", "60", "--limit-rate", "1M", "https://"+cloudName+"/bytes/1000000000")
	var said strings.Builder
	download.Stderr = &said
	if err := download.Start(); err != nil {
		t.Fatal(err)
	}
	s.await("the download runs", func() bool { r := s.cloud.Requests(); return len(r) > 0 && r[0].Sent > 1<<20 })
	waiting := s.proxied()
	s.await("the endpoint is noted", func() bool { return strings.Contains(s.sessionsJSON(), `"endpoint"`) })

	stop := s.probe()
	if err := s.daemon.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	s.daemon.Wait()
	if err := s.daemon.Start(s.ctx); err != nil {
		t.Fatal(err)
	}
	ready := time.Now()
	// From the host to the client, who has nothing to send and so does not notice that anything happened.
	if _, err := host.Write([]byte("still here")); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 100)
	client.SetReadDeadline(time.Now().Add(20 * time.Second))
	if n, err := client.Read(b); err != nil || string(b[:n]) != "still here" {
		t.Fatalf("the host's own connection: %q, %v", b[:n], err)
	}
	t.Logf("a connection to another process of the host went on %v after ready", time.Since(ready).Round(time.Millisecond))
	if err := download.Wait(); err == nil || !strings.Contains(said.String(), "Connection reset by peer") {
		t.Errorf("the download ended with %v, %s: want a reset", err, said.String())
	}
	t.Logf("the download was reset %v after ready", time.Since(ready).Round(time.Millisecond))
	// One that only waits for an answer sends nothing that the kernel could say RST to.
	waiting.SetReadDeadline(time.Now().Add(20 * time.Second))
	if n, err := waiting.Read(b); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("who waits for an answer got %d bytes, %v: want a reset", n, err)
	}
	t.Logf("who waited was reset %v after ready", time.Since(ready).Round(time.Millisecond))
	s.ok(s.curl("https://" + cloudName + "/"))
	if after := s.sessionLine(); after != before {
		t.Errorf("the session was\n%s\nand is\n%s", before, after)
	}
	if tally := stop(); tally.Accepted != 0 || tally.Refused != 0 || tally.Silent == 0 {
		t.Errorf("strangers meanwhile: %+v", tally)
	}
}

// proxied is a TLS connection from the client through the proxy to the cloud.
func (s *stage) proxied() net.Conn {
	s.t.Helper()
	c, err := s.Client.DialFrom(s.ctx, netip.Addr{}, "tcp", "10.77.0.1:3128")
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { c.Close() })
	if _, err := fmt.Fprintf(c, "CONNECT %s:443 HTTP/1.1\r\nHost: %[1]s:443\r\n\r\n", cloudName); err != nil {
		s.t.Fatal(err)
	}
	answer := make([]byte, 4096)
	n, err := c.Read(answer)
	if err != nil || !strings.HasPrefix(string(answer[:n]), "HTTP/1.1 200 ") {
		s.t.Fatalf("CONNECT: %q, %v", answer[:n], err)
	}
	secure := tls.Client(c, &tls.Config{RootCAs: s.cloud.CAs, ServerName: cloudName})
	if err := secure.HandshakeContext(s.ctx); err != nil {
		s.t.Fatal(err)
	}
	return secure
}

func TestFrozenDaemonGoesOnWhereItWas(t *testing.T) {
	s := newStage(t, lab.Options{})
	s.ok(s.alice.VPN(s.ctx, "up"))
	s.ok(s.curl("https://" + cloudName + "/"))
	before := s.sessionLine()
	const size = 30_000_000
	download := s.curl("-o", "/dev/null", "-w", "%{size_download}", "--max-time", "60", "--limit-rate", "15M", "https://"+cloudName+"/bytes/30000000")
	var got strings.Builder
	download.Stdout = &got
	if err := download.Start(); err != nil {
		t.Fatal(err)
	}
	s.await("the download runs", func() bool { r := s.cloud.Requests(); return len(r) > 1 && r[1].Sent > 1<<20 })
	stop := s.probe()
	if err := s.daemon.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	time.Sleep(2 * time.Second)
	if err := s.daemon.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if err := download.Wait(); err != nil || got.String() != "30000000" {
		t.Errorf("the download: %v, %s of %d bytes", err, got.String(), size)
	}
	if tally := stop(); tally.Accepted != 0 || tally.Refused != 0 || tally.Silent == 0 {
		t.Errorf("strangers meanwhile: %+v", tally)
	}
	if after := s.sessionLine(); after != before {
		t.Errorf("the session was\n%s\nand is\n%s", before, after)
	}
}

// sessionLine is alice's in the operator's list: id, user, device, address.
func (s *stage) sessionLine() string {
	s.t.Helper()
	out, err := s.daemon.Perimeterd(s.ctx, "sessions")
	if err != nil {
		s.t.Fatalf("%v %s", err, out)
	}
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) > 4 && f[1] == "alice" {
			return strings.Join(f[:4], " ")
		}
	}
	s.t.Fatal("alice has no session: ", out)
	return ""
}

func (s *stage) sessionsJSON() string {
	s.t.Helper()
	out, err := s.daemon.Perimeterd(s.ctx, "sessions", "--json")
	if err != nil {
		s.t.Fatalf("%v %s", err, out)
	}
	return out
}
