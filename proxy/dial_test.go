package proxy

import (
	"io"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

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
