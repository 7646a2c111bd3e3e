package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"perimeterd/internal/identity"
	"perimeterd/internal/lab"
	"perimeterd/knock"
)

// The host is lost. What was backed up while it ran brings another one up, which is the same bastion to those who are still let in.
func TestBackupBringsTheBastionUpElsewhere(t *testing.T) {
	s := newStage(t, lab.Options{})
	bob := s.user("bob")
	s.ok(bob.VPN(s.ctx, "up"))
	s.perimeterd("user", "revoke", "bob")
	s.ok(s.alice.VPN(s.ctx, "up"))
	s.ok(s.curl("https://" + cloudName + "/"))
	file, words := filepath.Join(s.Dir, "bastion.backup"), filepath.Join(s.Dir, "words")
	if err := os.WriteFile(words, []byte("correct horse battery staple\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Log(s.perimeterd("backup", file, "--passphrase-file", words))
	carol := s.user("carol") // after the backup
	s.ok(carol.VPN(s.ctx, "up"))

	s.stop()
	before := knock.StepAt(time.Now(), 30*time.Second) + 2 // the daemon loads two steps ahead
	if err := os.RemoveAll(s.daemon.Dir); err != nil {
		t.Fatal(err)
	}
	s.ok(s.Bastion.Command(s.ctx, "nft", "delete", "table", "inet", "perimeterd"))
	s.ok(s.Bastion.Command(s.ctx, "ip", "link", "delete", "perimeter0"))

	s.daemon.Dir = filepath.Join(s.Dir, "elsewhere")
	s.daemon.Config = filepath.Join(s.daemon.Dir, "perimeterd.toml")
	bin, err := lab.Bin("perimeterd")
	if err != nil {
		t.Fatal(err)
	}
	t.Log(s.ok(s.Bastion.Command(s.ctx, bin, "restore", file, "--passphrase-file", words, "--dir", s.daemon.Dir)))
	db, err := identity.ReadState(filepath.Join(s.daemon.Dir, "state", "state.db"))
	if err != nil {
		t.Fatal(err)
	}
	// Tokens that were loaded until now may have been spent, and nobody here knows which.
	step, err := identity.NewMeta(db).TokenStep()
	if err != nil || int64(step) < before {
		t.Errorf("highest token step %d, want %d or more: %v", step, before, err)
	}
	unspent := knock.Start(int64(step), 30*time.Second) // from when on the first step that never was loaded is taken
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	opened := len(s.daemon.Entries("window opened"))
	if err := s.daemon.Start(s.ctx); err != nil {
		t.Fatal(err)
	}
	if out := s.perimeterd("sessions"); strings.Contains(out, "10.77.") {
		t.Errorf("sessions came back:\n%s", out)
	}
	s.staysOut(bob)
	s.staysOut(carol)
	s.ok(s.alice.VPN(s.ctx, "down"))
	t.Log(s.ok(s.alice.Knock(s.ctx)))
	t.Log(s.ok(s.alice.VPN(s.ctx, "up")))
	if got, want := s.ok(s.curl("https://"+cloudName+"/")), "seen from "+s.Egress.String()+"\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	later := s.daemon.Entries("window opened")[opened:]
	for _, e := range later {
		at, err := time.Parse(time.RFC3339Nano, e["time"].(string))
		if err != nil {
			t.Fatal(err)
		}
		if e["sequence"] != true && at.Before(unspent) {
			t.Errorf("a token opened, and nobody knows whether it was spent before: %v", e)
		}
	}
	if len(later) == 0 {
		t.Error("nothing opened a window")
	}
	out := s.perimeterd("user", "list")
	if !strings.Contains(out, "bob") || strings.Contains(out, "carol") {
		t.Errorf("users:\n%s", out)
	}
	s.refused("a daemon runs here", "restore", file, "--passphrase-file", words, "--force")
}

// user enters somebody and imports his profile on a host of his own.
func (s *stage) user(name string) *lab.User {
	s.t.Helper()
	profile, err := s.daemon.AddUser(s.ctx, name)
	if err != nil {
		s.t.Fatal(err)
	}
	host, err := s.AddHost(s.ctx, name)
	if err != nil {
		s.t.Fatal(err)
	}
	u, err := s.NewUser(s.ctx, host, profile)
	if err != nil {
		s.t.Fatal(err)
	}
	return u
}

// staysOut lets somebody try to come in.
func (s *stage) staysOut(u *lab.User) {
	s.t.Helper()
	u.VPN(s.ctx, "down").Run() // what he still tries by himself; it may have given up
	s.fails(u.VPN(s.ctx, "up", "--timeout", "5s"))
}

// The disk that holds the state is full: the daemon lives, nobody new is let in by it, and a revocation still ends what it should.
func TestFullDiskKeepsTheDoorClosedAndTheDaemonAlive(t *testing.T) {
	s := newStage(t, lab.Options{})
	s.stop()
	state := filepath.Join(s.daemon.Dir, "state")
	// In the mount namespace that the bastion's processes share, and that goes with them.
	s.ok(s.Bastion.Command(s.ctx, "sh", "-ec", `cp -a "$0" "$0.was"; mount -t tmpfs -o size=400k,mode=700 none "$0"; cp -a "$0.was/state.db" "$0"`, state))
	if err := s.daemon.Start(s.ctx); err != nil {
		t.Fatal(err)
	}
	bob := s.user("bob")
	s.ok(s.alice.VPN(s.ctx, "up"))
	s.ok(s.curl("https://" + cloudName + "/"))
	full := func() {
		s.fails(s.Bastion.Command(s.ctx, "dd", "if=/dev/zero", "of="+filepath.Join(state, "filler"), "bs=4k"))
	}
	full()
	s.ok(s.curl("https://" + cloudName + "/")) // who is in stays
	out, err := s.daemon.Perimeterd(s.ctx, "user", "revoke", "alice")
	t.Logf("revoke on a full disk: %v %s", err, out)
	if err != nil && !strings.Contains(out, "the revocation is not on the disk") {
		t.Errorf("%v\n%s", err, out)
	}
	s.fails(s.curl("--max-time", "1", "https://"+cloudName+"/"))
	s.staysOut(s.alice)
	if out := s.perimeterd("sessions"); strings.Contains(out, "alice") {
		t.Errorf("alice is in:\n%s", out)
	}
	if check, err := s.daemon.Perimeterd(s.ctx, "check"); err == nil || !strings.Contains(check, "problem  state: "+state+" has ") {
		t.Errorf("check: %v\n%s", err, check)
	}
	written := err == nil
	if err := s.daemon.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	s.daemon.Wait()
	if err := s.daemon.Start(s.ctx); err != nil {
		t.Fatal("with a full disk: ", err)
	}
	list := s.perimeterd("user", "list")
	for line := range strings.Lines(list) {
		if strings.HasPrefix(line, "alice") && written && !strings.Contains(line, "revoked") {
			t.Errorf("an acknowledged revocation is gone: %s", line)
		}
	}
	if !strings.Contains(list, "bob") {
		t.Errorf("bob is gone:\n%s", list)
	}
	s.ok(s.Bastion.Command(s.ctx, "rm", filepath.Join(state, "filler")))
	s.ok(bob.VPN(s.ctx, "up"))
}
