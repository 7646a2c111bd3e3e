package e2e

import (
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"perimeterd/internal/lab"
)

// cutOff makes the file one that drops the operator's own way in, and tries it.
func (s *stage) cutOff(trial string) {
	s.t.Helper()
	if err := s.daemon.Set(lab.Setting{Key: "mode", Value: `"host"`}, lab.Setting{Key: "allow", Value: `["443/tcp"]`}); err != nil {
		s.t.Fatal(err)
	}
	s.perimeterd("apply", "--confirm", trial)
}

func (s *stage) perimeterd(args ...string) string {
	s.t.Helper()
	out, err := s.daemon.Perimeterd(s.ctx, args...)
	if err != nil {
		s.t.Fatalf("perimeterd %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

func (s *stage) refused(want string, args ...string) {
	s.t.Helper()
	out, err := s.daemon.Perimeterd(s.ctx, args...)
	if err == nil || !strings.Contains(out, want) {
		s.t.Errorf("perimeterd %s: %v, want a refusal with %q:\n%s", strings.Join(args, " "), err, want, out)
	}
}

// back waits until the operator's port answers again.
func (s *stage) back(since time.Time) {
	s.t.Helper()
	for s.answer(s.Client, "", s.Bastion.Addr.String(), 22) != "open" {
		if s.ctx.Err() != nil {
			s.t.Fatal("port 22 never came back")
		}
	}
	s.t.Logf("port 22 is open again %.1f s after apply", time.Since(since).Seconds())
}

func (s *stage) port22() string {
	s.t.Helper()
	return s.answer(s.Client, "", s.Bastion.Addr.String(), 22)
}

func TestApplyOnTrialComesBackByItself(t *testing.T) {
	t.Parallel() // it waits for the trial's end
	for _, kill := range []bool{false, true} {
		t.Run(map[bool]string{false: "daemon lives", true: "daemon killed"}[kill], func(t *testing.T) {
			s := newStage(t, lab.Options{})
			s.listenOnBastion(22)
			if s.port22() != "open" {
				t.Fatal("port 22 is shut to begin with")
			}
			s.ok(s.alice.VPN(s.ctx, "up"))
			since := time.Now()
			s.cutOff("5s")
			if got := s.port22(); got != "silent" && time.Since(since) < 4*time.Second {
				t.Errorf("on trial port 22 is %s, so this test proves nothing", got)
			}
			if kill {
				if err := s.daemon.Signal(syscall.SIGKILL); err != nil {
					t.Fatal(err)
				}
				s.daemon.Wait()
			}
			s.back(since)
			if !kill {
				if _, err := s.daemon.Await(s.ctx, "configuration on trial was not confirmed in time: the last good one is back", 1); err != nil {
					t.Fatal(err)
				}
				s.refused("no configuration is on trial any more", "confirm")
				s.ok(s.curl("https://" + cloudName + "/")) // the session did not notice
			} else if err := s.daemon.Start(s.ctx); err != nil {
				t.Fatal(err)
			}
			// What nobody confirmed is not taken up by a signal or a restart either, until somebody says so.
			if err := s.daemon.Signal(syscall.SIGHUP); err != nil {
				t.Fatal(err)
			}
			if _, err := s.daemon.Await(s.ctx, "configuration not taken up: the old one goes on", 1); err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(s.perimeterd("status"), "tried and not confirmed") {
				t.Error("status does not say which configuration rules")
			}
			if err := s.daemon.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			s.daemon.Wait()
			if err := s.daemon.Start(s.ctx); err != nil {
				t.Fatal(err)
			}
			if got := s.port22(); got != "open" {
				t.Errorf("after a restart port 22 is %s", got)
			}
			s.perimeterd("apply")
			if got := s.port22(); got != "silent" {
				t.Errorf("applied for good, port 22 is %s", got)
			}
			if strings.Contains(s.perimeterd("status"), "confirmed") {
				t.Error("status still speaks of a trial")
			}
		})
	}
}

func TestWindowsOfASequenceEndWithIt(t *testing.T) {
	s := newStage(t, lab.Options{})
	s.ok(s.Client.Command(s.ctx, "/usr/bin/knock", append([]string{"-d", "20", s.Bastion.Addr.String()}, s.sequence()...)...))
	if got := s.answer(s.Client, "", s.Bastion.Addr.String(), 1194); got != "open" {
		t.Fatalf("after the sequence the gate is %s", got)
	}
	if err := s.daemon.Set(lab.Setting{Key: "name", Value: `"other"`}); err != nil {
		t.Fatal(err)
	}
	s.perimeterd("apply")
	if got := s.answer(s.Client, "", s.Bastion.Addr.String(), 1194); got != "silent" {
		t.Errorf("the sequence is gone, and the gate is %s to whom it let in", got)
	}
}

func TestTrialIsConfirmedOrRolledBack(t *testing.T) {
	s := newStage(t, lab.Options{})
	s.listenOnBastion(22)
	s.refused("--confirm 1s: want from 5s to 1h0m0s", "apply", "--confirm", "1s")
	s.refused("no configuration is on trial: `perimeterd apply --confirm 60s --config ", "confirm")
	s.cutOff("10m")
	s.refused("a configuration is on trial until", "apply")
	s.refused("a configuration is on trial until", "diff")
	// A user who comes or goes meanwhile changes nothing of it.
	if _, err := s.daemon.AddUser(s.ctx, "bob"); err != nil {
		t.Fatal(err)
	}
	if got := s.port22(); got != "silent" {
		t.Errorf("on trial port 22 is %s", got)
	}
	s.perimeterd("rollback")
	if got := s.port22(); got != "open" {
		t.Errorf("rolled back, port 22 is %s", got)
	}
	s.perimeterd("apply", "--confirm", "10m")
	s.perimeterd("confirm")
	if out := s.perimeterd("diff"); out != "" {
		t.Errorf("confirmed, and apply would still change:\n%s", out)
	}
	if err := s.daemon.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	s.daemon.Wait()
	if err := s.daemon.Start(s.ctx); err != nil {
		t.Fatal(err)
	}
	if got := s.port22(); got != "silent" {
		t.Errorf("confirmed and started again, port 22 is %s", got)
	}
}

func TestDiffSaysWhatApplyWouldChange(t *testing.T) {
	s := newStage(t, lab.Options{})
	if out := s.perimeterd("diff"); out != "" {
		t.Errorf("nothing was changed, and it prints:\n%s", out)
	}
	if err := s.daemon.Set(lab.Setting{Key: "mode", Value: `"host"`}, lab.Setting{Key: "allow", Value: `["22/tcp from 198.18.0.0/16"]`},
		lab.Setting{Key: "trusted", Value: `["198.18.9.0/24"]`}, lab.Setting{Key: "window", Value: `"45s"`}); err != nil {
		t.Fatal(err)
	}
	out := s.perimeterd("diff")
	for _, line := range []string{
		"- add chain inet perimeterd input { type filter hook input priority filter - 5; policy accept; }",
		"+ add chain inet perimeterd input { type filter hook input priority filter - 5; policy drop; }",
		"+ add rule inet perimeterd input goto host",
		"+ add rule inet perimeterd host ip saddr 198.18.0.0/16 tcp dport 22 accept",
		"+ add element inet perimeterd trusted4 { 198.18.9.0/24 }",
		"- add rule inet perimeterd open add @open4 { ip saddr : meta mark } log group 1194 queue-threshold 1 drop",
		"+ add rule inet perimeterd open add @open4 { ip saddr timeout 45s : meta mark } log group 1194 queue-threshold 1 drop",
	} {
		if !strings.Contains(out, line+"\n") {
			t.Errorf("diff lacks %q:\n%s", line, out)
		}
	}
	s.perimeterd("apply")
	if out := s.perimeterd("diff"); out != "" {
		t.Errorf("applied, and it prints:\n%s", out)
	}
	// Stopped, the commands work on the state file.
	if err := s.daemon.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	s.daemon.Wait()
	if out := s.perimeterd("diff"); out != "" {
		t.Errorf("stopped, it prints:\n%s", out)
	}
	s.refused("is not running", "apply", "--confirm", "60s")
	s.ok(s.Bastion.Command(s.ctx, "nft", "delete", "table", "inet", "perimeterd"))
	if out := s.perimeterd("diff"); !strings.HasPrefix(out, "+ add set inet perimeterd admitted ") || strings.Contains(out, "\n-") {
		t.Errorf("without the table it prints:\n%s", out)
	}
	s.perimeterd("apply")
	if out := s.perimeterd("diff"); out != "" {
		t.Errorf("applied while stopped, and it prints:\n%s", out)
	}
	if got := s.answer(s.Client, "", s.Bastion.Addr.String(), 1194); got != "silent" {
		t.Errorf("the gate's port is %s", got)
	}
	if err := s.daemon.Set(lab.Setting{Key: "window", Value: `"45 s"`}); err != nil {
		t.Fatal(err)
	}
	s.refused("window", "apply")
	if err := os.Remove(s.daemon.Config); err != nil {
		t.Fatal(err)
	}
	s.refused("no such file", "diff")
}
