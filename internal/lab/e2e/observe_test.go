package e2e

import (
	"os"
	"strings"
	"testing"

	"perimeterd/internal/lab"
)

// Observed for a while, enforced by a reload: what would be refused is said before, and refused after.
func TestObservingSaysWhatEnforcingRefuses(t *testing.T) {
	s := newStage(t, lab.Options{})
	mode := func(from, to string) {
		t.Helper()
		text, err := os.ReadFile(s.daemon.Config)
		if err != nil || !strings.Contains(string(text), `mode    = "`+from) {
			t.Fatalf("no mode %s in\n%s", from, text)
		}
		if err := os.WriteFile(s.daemon.Config, []byte(strings.Replace(string(text), `mode    = "`+from, `mode    = "`+to, 1)), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	mode("enforce", "observe")
	s.perimeterd("apply")
	s.ok(s.alice.VPN(s.ctx, "up"))
	for range 2 {
		s.ok(s.curl("https://evil.example.com/"))
	}
	s.ok(s.curl("https://" + cloudName + "/"))
	if out := s.ok(s.curl("http://169.254.169.254/")); !strings.Contains(out, "never reachable") {
		t.Errorf("what is never allowed: %s", out)
	}
	status := ""
	for !strings.Contains(status, "would refuse  evil.example.com:443, 2 requests, of alice: no-rule\n") {
		if s.ctx.Err() != nil {
			t.Fatalf("status:\n%s", status)
		}
		status = s.perimeterd("status")
	}
	if strings.Contains(status, cloudName) || strings.Contains(status, "169.254") {
		t.Errorf("status:\n%s", status)
	}
	mode("observe", "enforce")
	s.perimeterd("apply")
	if out := s.fails(s.curl("https://evil.example.com/")); !strings.Contains(out, "403") {
		t.Errorf("enforced: %s", out)
	}
	if status := s.perimeterd("status"); strings.Contains(status, "would refuse") {
		t.Errorf("enforced, and status says\n%s", status)
	}
}
