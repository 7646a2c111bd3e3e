package e2e

import (
	"net/netip"
	"regexp"
	"testing"

	"perimeterd/internal/lab"
)

// The proxy's own checks are not in the way here: a program of the daemon's group dials, and meets nftables.
func TestBackstopHoldsWhereTheProxysChecksAreLeftOut(t *testing.T) {
	s := newStage(t, lab.Options{})
	chain := s.ok(s.Bastion.Command(s.ctx, "nft", "list", "chain", "inet", "perimeterd", "output"))
	m := regexp.MustCompile(`meta skgid "?([\w-]+)"?`).FindStringSubmatch(chain)
	if m == nil {
		t.Fatalf("no group in\n%s", chain)
	}
	if err := s.Bastion.AddAddress(s.ctx, "lo", netip.MustParsePrefix("169.254.169.254/32")); err != nil {
		t.Fatal(err)
	}
	s.ok(s.Bastion.Command(s.ctx, "ip", "route", "add", "192.168.50.0/24", "via", s.Cloud.Addr.String()))
	if err := s.Cloud.AddAddress(s.ctx, "eth0", netip.MustParsePrefix("192.168.50.5/32")); err != nil {
		t.Fatal(err)
	}
	for _, address := range []string{"127.0.0.1:8080", "169.254.169.254:8080", "198.18.1.1:8080", "10.77.0.1:8080"} {
		s.listen(s.Bastion, address)
	}
	s.ok(s.alice.VPN(s.ctx, "up"))
	s.ok(s.curl("https://" + cloudName + "/"))
	connect := func(group, host, port string) error {
		return s.Bastion.Command(s.ctx, "setpriv", "--regid", group, "--clear-groups", "timeout", "5", "bash", "-c", "exec 3<>/dev/tcp/"+host+"/"+port).Run()
	}
	for _, to := range []struct{ host, port string }{{"127.0.0.1", "8080"}, {"169.254.169.254", "8080"}, {"198.18.1.1", "8080"}, {"10.77.0.1", "8080"}, {"192.168.50.5", "80"}} {
		if err := connect("0", to.host, to.port); err != nil {
			t.Errorf("%v is not there to be reached: %v", to, err)
		}
		if err := connect(m[1], to.host, to.port); err == nil {
			t.Errorf("%v was reached", to)
		}
	}
	// Towards a session's own machine too, listening or not.
	client := s.listen(s.Client, "10.77.0.2:8080")
	if err := connect(m[1], "10.77.0.2", "8080"); err == nil {
		t.Error("a client was reached")
	}
	select {
	case who := <-client.came:
		t.Errorf("a client was reached from %v", who)
	default:
	}
	if err := connect(m[1], s.Cloud.Addr.String(), "443"); err != nil {
		t.Errorf("what is allowed: %v", err)
	}
}
