package e2e

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"perimeterd/internal/lab"
)

var hangUp os.Signal = syscall.SIGHUP

// probe has strangers try the gate until stop is called, which returns what became of them.
func (s *stage) probe() (stop func() lab.Tally) {
	s.t.Helper()
	strangers, err := s.Strangers(s.ctx, 16)
	if err != nil {
		s.t.Fatal(err)
	}
	p := s.Prober(s.Client, s.Bastion.Addr, 1194, strangers...)
	ctx, cancel := context.WithCancel(s.ctx)
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	return func() lab.Tally {
		s.t.Helper()
		cancel()
		if err := <-done; err != nil {
			s.t.Error("prober: ", err)
		}
		return p.Tally()
	}
}

func TestKilledDaemonLeavesTheDoorClosedAndWindowsExpire(t *testing.T) {
	s := newStage(t, lab.Options{}, lab.Setting{Key: "window", Value: `"4s"`})
	stop := s.probe()
	s.ok(s.alice.Knock(s.ctx))
	opened := time.Now()
	s.ok(s.alice.VPN(s.ctx, "up"))
	s.ok(s.alice.VPN(s.ctx, "exec", "--", "true")) // data have passed: a client that misses an answer knocks again
	if err := s.daemon.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	s.daemon.Wait()
	windows := func() string {
		return s.ok(s.Bastion.Command(s.ctx, "nft", "list", "map", "inet", "perimeterd", "open4"))
	}
	if !strings.Contains(windows(), s.Client.Addr.String()) {
		t.Error("the window did not outlive the daemon")
	}
	for strings.Contains(windows(), s.Client.Addr.String()) {
		if time.Since(opened) > 8*time.Second {
			t.Fatal("the window of 4 s did not expire with the daemon dead")
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Logf("window gone %v after it opened", time.Since(opened).Round(10*time.Millisecond))
	if err := s.daemon.Start(s.ctx); err != nil {
		t.Fatal(err)
	}
	time.Sleep(200 * time.Millisecond)
	tally := stop()
	t.Logf("strangers before, during and after: %+v", tally)
	if tally.Accepted != 0 || tally.Refused != 0 || tally.Silent < 100 {
		t.Errorf("strangers were answered: %+v", tally)
	}
	// The operator's next knock works, and the client gets through again.
	s.ok(s.alice.VPN(s.ctx, "down"))
	s.ok(s.alice.VPN(s.ctx, "up"))
	s.ok(s.curl("https://" + cloudName + "/"))
}

func TestFlushedRulesetUnderAProber(t *testing.T) {
	s := newStage(t, lab.Options{})
	// A plain table, as on kernels before 6.9: one that another tool made stays plain. An owned one would not be flushed.
	if err := s.daemon.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	s.daemon.Wait()
	s.ok(s.Bastion.Command(s.ctx, "nft", "delete table inet perimeterd; add table inet perimeterd"))
	if err := s.daemon.Start(s.ctx); err != nil {
		t.Fatal(err)
	}
	s.ok(s.alice.VPN(s.ctx, "up"))
	s.ok(s.curl("https://" + cloudName + "/"))
	stop := s.probe()
	for range 3 {
		s.ok(s.Bastion.Command(s.ctx, "nft", "flush", "ruleset"))
		// The first flush takes the table away; what the repair makes in its place is owned, and later ones bounce off.
		if _, err := s.daemon.Await(s.ctx, "nftables table was changed by another tool and is repaired", 1); err != nil {
			t.Fatal(err)
		}
		s.ok(s.curl("https://" + cloudName + "/"))
	}
	tally := stop()
	t.Logf("strangers during three flushes: %+v", tally)
	if tally.Accepted != 0 || tally.Refused != 0 || tally.Silent < 20 {
		t.Errorf("strangers were answered: %+v", tally)
	}
	// The window came back: the gate still takes alice's connection without another knock.
	s.ok(s.Client.Command(s.ctx, "curl", append(s.files("alice"), "-sS", "--max-time", "2", "https://198.18.1.1:1194/v1/session")...))
}

func TestRevokedUserIsOutAtOnce(t *testing.T) {
	s := newStage(t, lab.Options{})
	s.ok(s.alice.VPN(s.ctx, "up"))
	download := s.curl("-o", "/dev/null", "--limit-rate", "100k", "https://"+cloudName+"/bytes/100000000")
	if err := download.Start(); err != nil {
		t.Fatal(err)
	}
	for len(s.cloud.Requests()) == 0 {
		time.Sleep(10 * time.Millisecond)
	}
	time.Sleep(100 * time.Millisecond)
	start := time.Now()
	if out, err := s.daemon.Perimeterd(s.ctx, "user", "revoke", "alice"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for !s.cloud.Requests()[0].Done {
		if time.Since(start) > time.Second {
			t.Fatal("the download goes on a second after the revocation")
		}
		time.Sleep(time.Millisecond)
	}
	t.Logf("the download was cut %v after `user revoke` began", time.Since(start).Round(time.Millisecond))
	for _, set := range []string{"admitted", "peer4"} {
		if out := s.ok(s.Bastion.Command(s.ctx, "nft", "list", "set", "inet", "perimeterd", set)); strings.Contains(out, "elements") {
			t.Errorf("left behind: %s", out)
		}
	}
	// The shared sequence, which follows the token that brings no answer, still opens a window: it hides, no more.
	s.ok(s.alice.VPN(s.ctx, "down"))
	before := len(s.daemon.Entries("window opened"))
	out := s.fails(s.alice.VPN(s.ctx, "up"))
	if !strings.Contains(out, "revoked") {
		t.Errorf("alice is told %q, which does not say that she is revoked", out)
	}
	for _, e := range s.daemon.Entries("window opened")[before:] {
		if e["sequence"] != true {
			t.Errorf("the revoked user's token opens: %v", e)
		}
	}
	if out, err := s.daemon.Perimeterd(s.ctx, "sessions"); err != nil || strings.Contains(out, "alice") {
		t.Errorf("sessions: %v %s", err, out)
	}
}

func TestBrokenConfigurationSaysWhatAndWhereAndExits2(t *testing.T) {
	s := newStage(t, lab.Options{})
	if err := s.daemon.Set(lab.Setting{Key: "window", Value: `"4 parsecs"`}, lab.Setting{Key: "mtu", Value: "90000\nspeed = 3"}); err != nil {
		t.Fatal(err)
	}
	out, err := s.daemon.Perimeterd(s.ctx, "run")
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 2 {
		t.Errorf("%v, want exit status 2", err)
	}
	for _, want := range []string{"perimeterd.toml:", "speed", "window", "4 parsecs", "mtu", "90000"} {
		if !strings.Contains(out, want) {
			t.Errorf("the error does not say %q:\n%s", want, out)
		}
	}
	t.Log(out)
	// The running daemon refuses to reload it, and goes on.
	if err := s.daemon.Signal(hangUp); err != nil {
		t.Fatal(err)
	}
	if _, err := s.daemon.Await(s.ctx, "configuration not taken up: the old one goes on", 1); err != nil {
		t.Fatal(err)
	}
	s.ok(s.alice.VPN(s.ctx, "up"))
}

func TestSequenceFollowsWhereUDPIsBlocked(t *testing.T) {
	s := newStage(t, lab.Options{})
	// The network in between drops every datagram to the tunnel's port.
	s.ok(s.Client.Command(s.ctx, "nft", "add table inet block; add chain inet block out { type filter hook output priority 0; }; add rule inet block out udp dport 1194 drop"))
	out := s.ok(s.alice.Knock(s.ctx))
	t.Log(out)
	e, err := s.daemon.Await(s.ctx, "window opened", 1)
	if err != nil || e[0]["sequence"] != true {
		t.Errorf("%v, %v", e, err)
	}
}
