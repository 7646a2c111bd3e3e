package e2e

import (
	"errors"
	"os/exec"
	"strings"
	"testing"
	"time"

	"perimeterd/internal/lab"
)

// A second daemon on the same state must be refused before it has touched anything of the first.
func TestSecondDaemonOnOneStateIsRefusedAndChangesNothing(t *testing.T) {
	s := newStage(t, lab.Options{})
	s.ok(s.alice.VPN(s.ctx, "up"))
	s.ok(s.curl("https://" + cloudName + "/"))
	before := s.sessionLine()
	table := func() string { return s.ok(s.Bastion.Command(s.ctx, "nft", "-s", "-a", "-t", "list", "ruleset")) }
	ports := func() string { return s.ok(s.Bastion.Command(s.ctx, "ss", "-Hlntup")) }
	tableBefore, portsBefore := table(), ports()
	start := time.Now()
	out, err := s.daemon.Perimeterd(s.ctx, "run")
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(out, "state.db: another process holds it, as a rule the running daemon") {
		t.Errorf("%v\n%s", err, out)
	}
	t.Logf("refused after %v: %s", time.Since(start).Round(time.Millisecond), out)
	if after := table(); after != tableBefore {
		t.Errorf("the ruleset was\n%s\nand is\n%s", tableBefore, after)
	}
	if after := ports(); after != portsBefore {
		t.Errorf("listening were\n%s\nand are\n%s", portsBefore, after)
	}
	s.ok(s.curl("https://" + cloudName + "/"))
	if after := s.sessionLine(); after != before {
		t.Errorf("the session was %s and is %s", before, after)
	}
	// Its commands reach the first.
	if _, err := s.daemon.AddUser(s.ctx, "bob"); err != nil {
		t.Error(err)
	}
}
