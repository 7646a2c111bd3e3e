package e2e

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/net/dns/dnsmessage"

	"perimeterd/internal/lab"
)

// The bastion's resolver as an administrator may have it: a first server that is dead, a line in hosts, an answer too long
// for a datagram, which comes by TCP and passes the backstop.
func TestProxyAsksNamesAsTheHostIsConfigured(t *testing.T) {
	s := newStage(t, lab.Options{})
	if err := s.daemon.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	s.daemon.Wait()
	etc := func(file, text string) {
		t.Helper()
		// The file itself: what lies over /etc is this one, whatever its name leads to.
		if err := os.WriteFile(filepath.Join("/etc/netns", s.Bastion.Name, file), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	etc("resolv.conf", "nameserver 198.19.1.99\nnameserver 198.19.1.2\noptions timeout:1 attempts:2\nsearch evil.example.com\n")
	etc("hosts", "127.0.0.1 localhost\n198.19.1.2 inhosts.example.com short\n")
	s.addRules(`
[[proxy.rule]]
allow  = ["*.example.com", "short"]
ports  = [80]
groups = ["*"]
`)
	long := []netip.Addr{s.Cloud.Addr}
	for a := netip.MustParseAddr("198.19.1.100"); len(long) < 100; a = a.Next() {
		long = append(long, a)
	}
	s.cloud.DNS.Set("long.example.com", long...)
	s.cloud.DNS.Set("short.evil.example.com", netip.MustParseAddr("198.19.1.77"))
	s.cloud.DNS.Set("once.example.com", s.Cloud.Addr)
	s.cloud.DNS.SetTTL(3600)
	if err := s.daemon.Start(s.ctx); err != nil {
		t.Fatal(err)
	}
	s.ok(s.alice.VPN(s.ctx, "up"))
	asked := func(name string) (n int) {
		for _, q := range s.cloud.DNS.Queries() {
			if q.Name == name && q.Type == dnsmessage.TypeA {
				n++
			}
		}
		return n
	}
	for name, want := range map[string]int{"once.example.com": 1, "long.example.com": 2, "inhosts.example.com": 0, "short": 0} {
		for range 3 {
			if out := s.ok(s.curl("http://" + name + "/")); out != "seen from "+s.Egress.String()+"\n" {
				t.Errorf("%s: %q", name, out)
			}
		}
		if n := asked(name); n != want {
			t.Errorf("%s: asked %d times, want %d", name, n, want)
		}
	}
	for range 3 {
		if out := s.ok(s.curl("http://none.example.com/")); !strings.Contains(out, "dns-not-found") {
			t.Errorf("a name that is not there: %q", out)
		}
	}
	if n := asked("none.example.com"); n != 1 {
		t.Errorf("a name that is not there: asked %d times", n)
	}
	if n := asked("short.evil.example.com") + asked("none.example.com.evil.example.com"); n != 0 {
		t.Errorf("names of the search list: asked %d times", n)
	}
}
