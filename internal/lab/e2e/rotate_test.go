package e2e

import (
	"strings"
	"testing"

	"perimeterd/internal/lab"
	"perimeterd/vpn/client"
)

// Another CA takes over while people work: clients learn of it, and who did not is named before he is cut off.
func TestAnotherCATakesOver(t *testing.T) {
	s := newStage(t, lab.Options{})
	users := map[string]*lab.User{"alice": s.alice}
	for _, name := range []string{"bob", "carol"} {
		profile, err := s.daemon.AddUser(s.ctx, name)
		if err != nil {
			t.Fatal(err)
		}
		if users[name], err = s.NewUser(s.ctx, s.Client, profile); err != nil {
			t.Fatal(err)
		}
	}
	s.ok(s.alice.VPN(s.ctx, "up"))
	s.ok(s.curl("https://" + cloudName + "/"))
	ca := func(args ...string) (string, error) {
		out, err := s.daemon.Perimeterd(s.ctx, append([]string{"ca"}, args...)...)
		t.Logf("ca %s:\n%s", strings.Join(args, " "), out)
		return out, err
	}
	if _, err := ca("rotate"); err != nil {
		t.Fatal(err)
	}
	// Nobody notices: the tunnel, a new one, a new user.
	s.ok(s.curl("https://" + cloudName + "/"))
	s.ok(s.alice.VPN(s.ctx, "down"))
	before := s.profile(s.kept(s.alice, "alice"))
	s.ok(s.alice.VPN(s.ctx, "up"))
	session := s.status(s.alice).Session
	s.ok(s.curl("https://" + cloudName + "/"))
	s.patiently("a certificate of the new CA", func() bool { return s.profile(s.kept(s.alice, "alice")).Certificate != before.Certificate })
	if after := s.profile(s.kept(s.alice, "alice")); strings.Count(after.CA, "BEGIN") != 2 || strings.Count(before.CA, "BEGIN") != 1 {
		t.Errorf("the CAs that the client trusts now:\n%s", after.CA)
	}
	if _, err := s.daemon.Await(s.ctx, "renewed certificate used: the one before it is refused from now on", 1); err != nil {
		t.Fatal(err)
	}
	if out, err := ca("rotate", "--finish"); err == nil || !strings.Contains(out, "devices that would be cut off: bob/default, carol/default:") {
		t.Errorf("%v\n%s", err, out)
	}
	s.ok(users["bob"].VPN(s.ctx, "renew")) // long before a third is left
	if out, err := ca("rotate", "--finish", "--force"); err != nil || !strings.Contains(out, "Cut off, until they have new profiles (perimeterd user profile NAME): carol/default") {
		t.Fatalf("%v\n%s", err, out)
	}
	// Whose certificate is of the new one goes on, in the same session.
	s.ok(s.curl("https://" + cloudName + "/"))
	if got := s.status(s.alice); got.Session != session || got.State != client.Up {
		t.Errorf("alice's session became %s, %s", got.Session, got.State)
	}
	s.ok(s.alice.VPN(s.ctx, "down"))
	s.ok(users["bob"].VPN(s.ctx, "up"))
	s.ok(users["bob"].VPN(s.ctx, "down"))
	if out := s.fails(users["carol"].VPN(s.ctx, "up")); !strings.Contains(out, "its certificate is of another CA") {
		t.Errorf("carol is told\n%s", out)
	}
	if out, err := s.daemon.Perimeterd(s.ctx, "check"); !strings.Contains(out, "ok       certificates: ") {
		t.Errorf("%v\n%s", err, out)
	}
	// The audit has it all.
	out, err := s.daemon.Perimeterd(s.ctx, "audit", "query")
	for _, want := range []string{"ca-rotate", "ca-finish", "certificate-renewed"} {
		if err != nil || !strings.Contains(out, want) {
			t.Errorf("the audit does not tell of %s: %v\n%s", want, err, out)
		}
	}
}
