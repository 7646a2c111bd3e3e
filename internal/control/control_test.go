package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"perimeterd/internal/identity"
	"perimeterd/internal/session"
	"perimeterd/vpn"
)

type fixture struct {
	*Client
	ops     *Operations
	path    string
	changed []string
	stop    func() error
}

func start(t *testing.T) *fixture {
	t.Helper()
	dir := t.TempDir()
	db, err := identity.OpenState(filepath.Join(dir, "state.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	sessions, err := session.OpenBolt(db, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	f := &fixture{path: filepath.Join(dir, "run", "control.sock")}
	f.ops = &Operations{Users: identity.NewUsers(db), Sessions: sessions, Now: time.Now, Log: slog.New(slog.DiscardHandler),
		UserChanged: func(name string) error { f.changed = append(f.changed, name); return nil },
		Status:      func() Status { return Status{Version: "1.2", Endpoint: "bastion.example.com:1194", Limit: 5000} }}
	f.serve(t)
	f.Client = NewClient(f.path)
	return f
}

func (f *fixture) serve(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- Serve(ctx, f.path, Handler(f.ops), func() { close(ready) }) }()
	select {
	case <-ready:
	case err := <-done:
		t.Fatal(err)
	}
	stopped := false
	f.stop = func() error {
		if stopped {
			return nil
		}
		stopped = true
		cancel()
		return <-done
	}
	t.Cleanup(func() { f.stop() })
}

func enrolment(name, device string, key byte) identity.Enrolment {
	return identity.Enrolment{Name: name, Device: device, Key: identity.KeyHash{key, 1}, NotAfter: time.Now().Add(time.Hour)}
}

func (f *fixture) begin(t *testing.T, user, device string, key byte) session.Session {
	t.Helper()
	s := session.Session{ID: session.NewID(), User: user, Device: device, Certificate: identity.KeyHash{key, 1},
		Address: netip.AddrFrom4([4]byte{10, 77, 0, key}), Created: time.Now(), Expires: time.Now().Add(time.Hour)}
	s.PublicKey[0] = key
	s.PresharedKey[0] = 0xAA
	if err := f.ops.Sessions.Put(s); err != nil {
		t.Fatal(err)
	}
	return s
}

func TestRevokingAUserEndsHisSessionsAndNoOthers(t *testing.T) {
	f, ctx := start(t), context.Background()
	for i, e := range []identity.Enrolment{enrolment("alice", "mac", 1), enrolment("alice", "desk", 2), enrolment("bob", "mac", 3)} {
		if _, err := f.AddUser(ctx, e); err != nil {
			t.Fatal(i, err)
		}
	}
	mac, desk, bob := f.begin(t, "alice", "mac", 1), f.begin(t, "alice", "desk", 2), f.begin(t, "bob", "mac", 3)
	var ended []string
	f.ops.Sessions.Watch(func(e session.Event) {
		if e.Ended != "" {
			ended = append(ended, e.Session.User+" "+e.Session.Device+" "+string(e.Ended))
		}
	})
	u, err := f.RevokeUser(ctx, "alice", "mac")
	if err != nil || !u.Active() {
		t.Fatalf("%+v %v", u, err)
	}
	if _, live := f.ops.Sessions.Get(mac.ID); live {
		t.Fatal("the revoked device's session lives")
	}
	if _, live := f.ops.Sessions.Get(desk.ID); !live {
		t.Fatal("the other device's session ended")
	}
	if u, err = f.RevokeUser(ctx, "alice", ""); err != nil || u.Active() {
		t.Fatalf("%+v %v", u, err)
	}
	if _, live := f.ops.Sessions.Get(bob.ID); !live {
		t.Fatal("bob's session ended")
	}
	if got := fmt.Sprint(ended); got != "[alice mac revoked alice desk revoked]" {
		t.Fatal(got)
	}
	if got := fmt.Sprint(f.changed); got != "[alice alice bob alice alice]" {
		t.Fatal(got)
	}
	st, err := f.Status(ctx)
	if err != nil || st.Users != 1 || st.Sessions != 1 || st.Version != "1.2" || st.Limit != 5000 {
		t.Fatalf("%+v %v", st, err)
	}
}

// An external CA's list may let in names that nobody entered here: revoking one keeps it out.
func TestRevokingAUserWhomOnlyTheListKnowsEntersHimAsRevoked(t *testing.T) {
	f, ctx := start(t), context.Background()
	f.ops.Listed = func(name string) bool { return name == "alice" }
	her, bob := f.begin(t, "alice", "1a2b", 1), f.begin(t, "bob", "3c4d", 2)
	if _, err := f.RevokeUser(ctx, "bob", ""); err == nil || !strings.Contains(err.Error(), `user "bob" is not known here`) {
		t.Fatal(err)
	}
	if _, err := f.RevokeUser(ctx, "alice", "1a2b"); err == nil {
		t.Fatal("a device that is not known here was revoked")
	}
	u, err := f.RevokeUser(ctx, "alice", "")
	if err != nil || u.Active() {
		t.Fatalf("%+v %v", u, err)
	}
	if _, live := f.ops.Sessions.Get(her.ID); live {
		t.Error("her session lives")
	}
	if _, live := f.ops.Sessions.Get(bob.ID); !live {
		t.Error("bob's session ended")
	}
	all, err := f.ListUsers(ctx)
	if err != nil || len(all) != 1 || all[0].Name != "alice" || all[0].Active() || all[0].Credential == 0 {
		t.Errorf("%+v %v", all, err)
	}
	if u, err = f.AddUser(ctx, identity.Enrolment{Name: "alice", Groups: []string{"db"}}); err != nil || !u.Active() || u.Barred.IsZero() {
		t.Errorf("%+v %v", u, err)
	}
}

// A device is its certificate, whatever name its client gave the session.
func TestRevokedDeviceLosesSessionsUnderAnyName(t *testing.T) {
	f, ctx := start(t), context.Background()
	if _, err := f.AddUser(ctx, enrolment("alice", "mac", 1)); err != nil {
		t.Fatal(err)
	}
	s := f.begin(t, "alice", "something-else", 1)
	if _, err := f.RevokeUser(ctx, "alice", "mac"); err != nil {
		t.Fatal(err)
	}
	if _, live := f.ops.Sessions.Get(s.ID); live {
		t.Fatal("it lives")
	}
}

func TestListsCarryNoKeys(t *testing.T) {
	f, ctx := start(t), context.Background()
	f.begin(t, "alice", "mac", 1)
	all, err := f.Sessions(ctx)
	if err != nil || len(all) != 1 || all[0].User != "alice" {
		t.Fatalf("%+v %v", all, err)
	}
	text, err := json.Marshal(all)
	if err != nil || strings.Contains(strings.ToLower(string(text)), "key") {
		t.Fatalf("%s %v", text, err)
	}
	if err := f.Kick(ctx, all[0].ID); err != nil {
		t.Fatal(err)
	}
	if err := f.Kick(ctx, all[0].ID); err == nil || err.Error() != "no such session" {
		t.Fatalf("a second kick: %v", err)
	}
}

func TestErrorsKeepTheirSentenceAndStatus(t *testing.T) {
	f, ctx := start(t), context.Background()
	if _, err := f.AddUser(ctx, enrolment("alice", "mac", 1)); err != nil {
		t.Fatal(err)
	}
	_, exists := f.AddUser(ctx, enrolment("alice", "mac", 2))
	_, name := f.AddUser(ctx, enrolment("Alice", "mac", 2))
	_, unknown := f.RevokeUser(ctx, "bob/../alice", "")
	for _, test := range []struct {
		err    error
		status int
		text   string
	}{
		{exists, 409, `user "alice": device "mac" exists already`},
		{name, 400, `user "Alice": not a name`},
		{unknown, 404, `user "bob/../alice" is not known here`},
		{f.do(ctx, "GET", "/v2/status", nil, nil), 404, "no such operation: GET /v2/status"},
		{f.do(ctx, "POST", "/v1/users", map[string]int{"admin": 1}, nil), 400, `unknown field "admin"`},
		{f.do(ctx, "DELETE", "/v1/sessions/1", nil, nil), 400, "want 32 hexadecimal digits"},
		{f.do(ctx, "POST", "/v1/users", strings.Repeat("x", 2*maxBody), nil), 400, "too large"},
	} {
		var e *vpn.APIError
		if !errors.As(test.err, &e) || e.Status != test.status || !strings.Contains(e.Message, test.text) {
			t.Errorf("got %v, want %d %s", test.err, test.status, test.text)
		}
	}
}

func TestSocketIsNotForEverybody(t *testing.T) {
	f := start(t)
	st, err := os.Lstat(f.path)
	if err != nil {
		t.Fatal(err)
	}
	if m := st.Mode(); m&fs.ModeSocket == 0 || m.Perm()&0o007 != 0 {
		t.Fatalf("mode %v", m)
	}
	left, err := filepath.Glob(filepath.Join(filepath.Dir(f.path), ".control.*"))
	if err != nil || len(left) > 0 {
		t.Fatalf("%v %v", left, err)
	}
}

func TestSocketOfADeadDaemonIsReplaced(t *testing.T) {
	f := start(t)
	if err := f.stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(f.path); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("the socket stays: %v", err)
	}
	if _, err := f.Status(context.Background()); !errors.Is(err, ErrNotRunning) {
		t.Fatalf("stopped: %v", err)
	}
	// As a killed process leaves it.
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: f.path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	ln.Close()
	if _, err := f.Status(context.Background()); !errors.Is(err, ErrNotRunning) {
		t.Fatalf("killed: %v", err)
	}
	f.serve(t)
	if _, err := f.Status(context.Background()); err != nil {
		t.Fatal(err)
	}
}

func TestOperationsNeedAMethodThatFits(t *testing.T) {
	f := start(t)
	req, err := http.NewRequest("DELETE", "http://perimeterd/v1/users", nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := f.http.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	if res.StatusCode != 404 {
		t.Fatal(res.Status)
	}
}
