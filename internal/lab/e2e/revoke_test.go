package e2e

import (
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"perimeterd/internal/identity"
	"perimeterd/internal/lab"
)

// The daemon dies between the two halves of a revocation: the record is written, the sessions are not ended.
func TestRevocationOutlivesAKillInTheMiddle(t *testing.T) {
	s := newStage(t, lab.Options{})
	s.ok(s.alice.VPN(s.ctx, "up"))
	s.ok(s.curl("https://" + cloudName + "/"))
	if err := s.daemon.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	s.daemon.Wait()
	db, err := identity.OpenState(filepath.Join(s.daemon.Dir, "state", "state.db"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := identity.NewUsers(db).Revoke("alice", "", time.Now()); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.daemon.Start(s.ctx); err != nil {
		t.Fatal(err)
	}
	if out, err := s.daemon.Perimeterd(s.ctx, "sessions"); err != nil || strings.Contains(out, "alice") {
		t.Errorf("sessions after the start: %v\n%s", err, out)
	}
	s.fails(s.curl("--max-time", "1", "https://"+cloudName+"/"))
	// The window that the table kept over the kill was hers too.
	if out := s.ok(s.Bastion.Command(s.ctx, "nft", "list", "map", "inet", "perimeterd", "open4")); strings.Contains(out, s.Client.Addr.String()) {
		t.Errorf("her window outlives the revocation: %s", out)
	}
}

func TestRevokedUsersOwnSequenceOpensNothingAndStopsNoStart(t *testing.T) {
	s := newStage(t, lab.Options{})
	if _, err := s.daemon.AddUser(s.ctx, "bob"); err != nil {
		t.Fatal(err)
	}
	if err := s.daemon.Set(lab.Setting{Key: "user", Value: `"bob"`}); err != nil {
		t.Fatal(err)
	}
	if err := s.daemon.Signal(hangUp); err != nil {
		t.Fatal(err)
	}
	if _, err := s.daemon.Await(s.ctx, "configuration reloaded", 1); err != nil {
		t.Fatal(err)
	}
	knock := func() {
		s.ok(s.Client.Command(s.ctx, "/usr/bin/knock", append([]string{"-d", "20", s.Bastion.Addr.String()}, s.sequence()...)...))
	}
	windows := func() string {
		time.Sleep(50 * time.Millisecond)
		return s.ok(s.Bastion.Command(s.ctx, "nft", "list", "map", "inet", "perimeterd", "seq4"))
	}
	knock()
	if e, err := s.daemon.Await(s.ctx, "window opened", 1); err != nil || e[0]["user"] != "bob" {
		t.Fatalf("%v %v", e, err)
	}
	if out, err := s.daemon.Perimeterd(s.ctx, "user", "revoke", "bob"); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	if w := windows(); strings.Contains(w, "elements") {
		t.Errorf("bob's window outlives him: %s", w)
	}
	knock()
	if w := windows(); strings.Contains(w, "elements") {
		t.Errorf("bob's sequence opens after he is revoked: %s", w)
	}
	if err := s.daemon.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	s.daemon.Wait()
	if err := s.daemon.Start(s.ctx); err != nil {
		t.Fatal("a revoked user's sequence stops the start: ", err)
	}
}
