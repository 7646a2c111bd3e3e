package control

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"perimeterd/internal/audit"
	"perimeterd/internal/identity"
	"perimeterd/internal/statefile"
	"perimeterd/vpn"
)

// withState is a fixture whose state file is known.
func withState(t *testing.T) (f *fixture, state string) {
	t.Helper()
	f = start(t)
	state = filepath.Join(t.TempDir(), "state.db")
	db, err := identity.OpenState(state)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	f.ops.Users, f.ops.Snapshot = identity.NewUsers(db), db.Snapshot
	if err := f.stop(); err != nil {
		t.Fatal(err)
	}
	f.serve(t) // what there is to serve is decided at the start
	return f, state
}

func TestBackupIsTheStateAsItIs(t *testing.T) {
	f, _ := withState(t)
	ctx := context.Background()
	var acts []audit.Record
	f.ops.Audit = func(r audit.Record) { acts = append(acts, r) }
	if _, err := f.AddUser(ctx, enrolment("alice", "mac", 1)); err != nil {
		t.Fatal(err)
	}
	acts = nil
	for _, check := range []bool{true, false} {
		data, err := f.Backup(ctx, check)
		if err != nil {
			t.Fatal(err)
		}
		c, err := identity.ReadContents(bytes.NewReader(data), int64(len(data)))
		if err != nil || len(c.Users) != 1 || c.Users[0].Name != "alice" || c.Schema != statefile.Schema || c.Size != int64(len(data)) {
			t.Errorf("%+v %v", c, err)
		}
	}
	if len(acts) != 1 || acts[0].Action != "backup" || acts[0].Decision != "done" {
		t.Errorf("recorded: %+v", acts)
	}
	var e *vpn.APIError
	if _, err := f.reader(t).Backup(ctx, true); !errors.As(err, &e) || e.Status != 403 {
		t.Errorf("to one who may only read: %v", err)
	}
}

// refuseWrites makes every write to an open file of this process fail, as a disk that turned read-only does, until heal.
func refuseWrites(t *testing.T, path string) (heal func()) {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range fds {
		fd, err := strconv.Atoi(e.Name())
		if err != nil {
			t.Fatal(err)
		}
		if target, err := os.Readlink("/proc/self/fd/" + e.Name()); err != nil || target != path {
			continue
		}
		saved, err := unix.Dup(fd) // keeps the lock, too
		if err != nil {
			t.Fatal(err)
		}
		readOnly, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer readOnly.Close()
		if err := unix.Dup3(int(readOnly.Fd()), fd, 0); err != nil {
			t.Fatal(err)
		}
		return func() {
			if err := errors.Join(unix.Dup3(saved, fd, 0), unix.Close(saved)); err != nil {
				t.Fatal(err)
			}
		}
	}
	t.Fatalf("%s is not open", path)
	return nil
}

func TestRevocationThatTheDiskRefusesHoldsAndSaysSo(t *testing.T) {
	f, state := withState(t)
	ctx := context.Background()
	for i, name := range []string{"alice", "bob"} {
		if _, err := f.AddUser(ctx, enrolment(name, "mac", byte(i+1))); err != nil {
			t.Fatal(err)
		}
	}
	alice, bob := f.begin(t, "alice", "mac", 1), f.begin(t, "bob", "phone", 2)
	heal := refuseWrites(t, state)
	for name, device := range map[string]string{"alice": "", "bob": "mac"} {
		if _, err := f.RevokeUser(ctx, name, device); err == nil || !strings.Contains(err.Error(), "the revocation is not on the disk: ") {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, s := range []string{alice.ID.String(), bob.ID.String()} {
		if err := f.do(ctx, "DELETE", "/v1/sessions/"+s, nil, nil); err == nil {
			t.Errorf("session %s lived", s)
		}
	}
	all, err := f.ListUsers(ctx)
	if err != nil || len(all) != 2 || all[0].Active() || all[1].Devices[0].Revoked.IsZero() {
		t.Errorf("%+v %v", all, err)
	}
	if s, err := f.Status(ctx); err != nil || len(s.Problems) != 2 || !strings.HasPrefix(s.Problems[0], "the revocation of alice is not on the disk: it holds, but only until the daemon ends") {
		t.Errorf("%+v %v", s, err)
	}
	if _, err := f.Backup(ctx, false); err == nil {
		t.Error("a backup without them")
	}
	heal()
	data, err := f.Backup(ctx, false)
	if err != nil {
		t.Fatal(err)
	}
	c, err := identity.ReadContents(bytes.NewReader(data), int64(len(data)))
	if err != nil || c.Users[0].Active() || c.Users[1].Devices[0].Revoked.IsZero() {
		t.Errorf("%+v %v", c, err)
	}
	if s, err := f.Status(ctx); err != nil || len(s.Problems) != 0 {
		t.Errorf("%+v %v", s, err)
	}
}
