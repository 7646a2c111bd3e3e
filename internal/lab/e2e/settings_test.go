package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"perimeterd/internal/lab"
	"perimeterd/vpn/client"
)

func (s *stage) status(u *lab.User) (st client.Status) {
	s.t.Helper()
	out, _ := u.VPN(s.ctx, "status", "--json").Output() // exit status 1: down
	if err := json.Unmarshal(out, &st); err != nil {
		s.t.Fatalf("%v: %s", err, out)
	}
	return st
}

// What an operator gives or takes acts on who is inside, and the client mends its tunnel by itself.
func TestGroupsAndAddressActAtOnce(t *testing.T) {
	s := newStage(t, lab.Options{}, lab.Setting{Key: "groups", Value: `["operators"]`})
	s.ok(s.alice.VPN(s.ctx, "up"))
	s.ok(s.curl("https://" + cloudName + "/"))
	first := s.status(s.alice)
	set := func(args ...string) {
		t.Helper()
		out, err := s.daemon.Perimeterd(s.ctx, append([]string{"user", "set", "alice"}, args...)...)
		if err != nil || !strings.Contains(out, "Sessions ended: 1.") {
			t.Fatalf("%v\n%s", err, out)
		}
		t.Log(out)
	}
	begun := func(old string) (st client.Status) {
		t.Helper()
		s.patiently("a new session", func() bool {
			s.curl("--max-time", "2", "https://"+cloudName+"/").Run() // what is sent and not answered shows that the old one is gone
			st = s.status(s.alice)
			return st.State == client.Up && st.Session != old
		})
		return st
	}
	set("--group", "")
	second := begun(first.Session)
	if out := s.fails(s.curl("https://" + cloudName + "/")); !strings.Contains(out, "403") {
		t.Errorf("without the group: %s", out)
	}
	set("--group", "operators", "--address", "10.77.7.7")
	third := begun(second.Session)
	if third.Address.Addr().String() != "10.77.7.7" {
		t.Errorf("her address is %v, want her own", third.Address)
	}
	s.ok(s.curl("https://" + cloudName + "/"))

	// Her client dies, forgets, and comes back while the gate still holds the session with her address.
	if err := syscall.Kill(third.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	s.patiently("the client's end", func() bool { return s.status(s.alice).State == "down" })
	kept, err := filepath.Glob(filepath.Join(s.alice.Home, ".config", "perimeter", "*.session"))
	if err != nil || len(kept) != 1 {
		t.Fatalf("kept: %v, %v", kept, err)
	}
	if err := os.Remove(kept[0]); err != nil {
		t.Fatal(err)
	}
	s.ok(s.alice.VPN(s.ctx, "up"))
	if got := s.status(s.alice); got.Address != third.Address || got.Session == third.Session {
		t.Errorf("then it is %v in session %s", got.Address, got.Session)
	}
	s.ok(s.curl("https://" + cloudName + "/"))
	out, err := s.daemon.Perimeterd(s.ctx, "user", "show", "alice")
	if err != nil || !strings.Contains(out, "10.77.7.7") || !strings.Contains(out, " now ") {
		t.Errorf("%v\n%s", err, out)
	}
	// The daemon stops, and knows when she was last seen.
	if err := s.daemon.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	s.daemon.Wait()
	out, err = s.daemon.Perimeterd(s.ctx, "user", "list")
	if err != nil || !regexp.MustCompile(` \d{4}-\d\d-\d\d \d\d:\d\d +active`).MatchString(out) {
		t.Errorf("%v\n%s", err, out)
	}
	t.Log(out)
}
