package firewall

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
)

// The backstop stands under the proxy's own checks: here nothing of the proxy is in the way.
func TestBackstopRefusesWhatTheDaemonsGroupMayNotReach(t *testing.T) {
	cfg := example()
	r := newRoom(t, cfg)
	cloud := r.Cloud.Addr // 198.19.1.2: reserved (RFC 2544), so refused unless allowed
	l, err := r.Cloud.Listen("tcp", ":443")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	own, err := r.Bastion.Listen("tcp", ":8080")
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	connect := func(group, to string) string {
		ap := netip.MustParseAddrPort(to)
		out, err := r.Bastion.Command(t.Context(), "setpriv", "--regid", group, "--clear-groups", "timeout", "5",
			"bash", "-c", fmt.Sprintf("exec 3<>/dev/tcp/%v/%d", ap.Addr(), ap.Port())).CombinedOutput()
		if err == nil {
			return "connected"
		}
		return string(out)
	}
	reached := func(out string) bool { return out == "connected" }
	to := netip.AddrPortFrom(cloud, 443).String()
	if out := connect("0", to); !reached(out) {
		t.Fatalf("another group is judged too: %s", out)
	}
	for _, c := range []string{to, "198.18.1.1:8080", "127.0.0.1:8080", "[::1]:8080", "[2001:db8:19:1::2]:443"} {
		if out := connect("65534", c); reached(out) || !strings.Contains(out, "refused") {
			t.Errorf("%s: %s: want it refused", c, out)
		}
	}
	cfg.AllowPrivate = []netip.Prefix{netip.MustParsePrefix("198.19.1.0/24")}
	cfg.Reach = []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:8080"), netip.MustParseAddrPort("198.19.1.9:53")}
	if _, err := r.fw.Apply(cfg); err != nil {
		t.Fatal(err)
	}
	for _, c := range []string{to, "127.0.0.1:8080"} {
		if out := connect("65534", c); !reached(out) {
			t.Errorf("%s: %s: want it allowed now", c, out)
		}
	}
	if out := connect("65534", "198.18.1.1:8080"); reached(out) {
		t.Errorf("the host's own address: %s", out)
	}
}
