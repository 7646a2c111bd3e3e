package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"perimeterd/internal/lab"
)

// The private key is made on the laptop, and never leaves it.
func TestEnrolledKeyComesInAndNeverLeavesTheLaptop(t *testing.T) {
	s := newStage(t, lab.Options{})
	bob, err := s.NewHome(s.Client, "bob")
	if err != nil {
		t.Fatal(err)
	}
	request, profile := filepath.Join(s.Dir, "bob.csr"), filepath.Join(s.Dir, "bob.profile")
	t.Log(s.ok(bob.VPN(s.ctx, "enroll", "bob", "--device", "mac", "--out", request)))
	if out, err := s.daemon.Perimeterd(s.ctx, "user", "add", "bob", "--request", request, "--out", profile); err != nil {
		t.Fatalf("%v\n%s", err, out)
	} else {
		t.Log(out)
	}
	for _, file := range []string{request, profile} {
		text, err := os.ReadFile(file)
		if err != nil || strings.Contains(string(text), "PRIVATE") {
			t.Errorf("%s: %v\n%s", file, err, text)
		}
	}
	// Somebody else who reads the profile has no use for it.
	thief, err := s.NewHome(s.Client, "thief")
	if err != nil {
		t.Fatal(err)
	}
	if out := s.fails(thief.VPN(s.ctx, "import", profile)); !strings.Contains(out, "no key waits here") {
		t.Error(out)
	}
	t.Log(s.ok(bob.VPN(s.ctx, "import", profile)))
	s.ok(bob.VPN(s.ctx, "up"))
	if got := s.ok(bob.VPN(s.ctx, "exec", "--", "curl", "-sS", "--cacert", s.cloud.CAFile, "https://"+cloudName+"/")); !strings.Contains(got, "seen from "+s.Egress.String()) {
		t.Error(got)
	}
	if out, err := s.daemon.Perimeterd(s.ctx, "sessions"); err != nil || !strings.Contains(out, "bob") || !strings.Contains(out, " mac ") {
		t.Errorf("%v\n%s", err, out)
	}
}
