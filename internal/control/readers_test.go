package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"perimeterd/internal/audit"
	"perimeterd/internal/identity"
	"perimeterd/vpn"
)

// reader asks as who may only read does: the control socket is shut to him.
func (f *fixture) reader(t *testing.T) *Client {
	t.Helper()
	dir := filepath.Dir(f.path)
	ctx, cancel := context.WithCancel(context.Background())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() {
		done <- serve(ctx, ReadersSocket(f.path), ReadersGroup, ReadersHandler(f.ops), func() { close(ready) })
	}()
	<-ready
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	if want := filepath.Join(dir, "audit.sock"); ReadersSocket(f.path) != want {
		t.Errorf("%s, want %s", ReadersSocket(f.path), want)
	}
	return NewClient(ReadersSocket(f.path))
}

func TestReadersReadAndDoNothingElse(t *testing.T) {
	f, ctx := start(t), context.Background()
	var acts []audit.Record
	f.ops.Refused = func(_ string, r audit.Record) { acts = append(acts, r) }
	s := f.begin(t, "alice", "mac", 1)
	c := f.reader(t)
	if st, err := c.Status(ctx); err != nil || st.Sessions != 1 {
		t.Errorf("%+v %v", st, err)
	}
	if all, err := c.Sessions(ctx); err != nil || len(all) != 1 {
		t.Errorf("%+v %v", all, err)
	}
	if _, err := c.ListUsers(ctx); err != nil {
		t.Error(err)
	}
	for _, err := range []error{
		c.Kick(ctx, s.ID),
		func() error { _, err := c.RevokeUser(ctx, "alice", ""); return err }(),
		func() error { _, err := c.AddUser(ctx, enrolment("bob", "mac", 2)); return err }(),
		c.do(ctx, "GET", "/v1/configuration/table", nil, nil), // nobody said that it is theirs
		c.do(ctx, "POST", "/v1/status", nil, nil),
		c.do(ctx, "PUT", "/v1/audit", nil, nil),
		c.do(ctx, "GET", "/v1/users/alice/revoke", nil, nil),
		c.do(ctx, "DELETE", "/v1/audit/00000001-2026-01-02.jsonl", nil, nil),
		c.do(ctx, "GET", "/", nil, nil),
	} {
		var e *vpn.APIError
		if !errors.As(err, &e) || e.Status != http.StatusForbidden || err.Error() != "the group perimeterd-audit may only read: run it as root, or as a member of the group perimeterd" {
			t.Errorf("%v", err)
		}
	}
	if _, live := f.ops.Sessions.Get(s.ID); !live {
		t.Error("a reader ended a session")
	}
	if len(acts) != 9 || acts[0].Action != "DELETE /v1/sessions/"+s.ID.String() || acts[0].Decision != "failed" || !strings.HasPrefix(acts[0].By, "root (0)") {
		t.Errorf("%+v", acts)
	}
}

// Whatever is asked of the daemon but to show is in the audit, with who asked and what came of it.
func TestEveryActLeavesARecord(t *testing.T) {
	f, ctx := start(t), context.Background()
	var acts []audit.Record
	f.ops.Audit = func(r audit.Record) { acts = append(acts, r) }
	e := enrolment("alice", "mac", 1)
	e.Groups = []string{"operators", "db"}
	f.AddUser(ctx, e)
	f.AddUser(ctx, e)
	s := f.begin(t, "alice", "mac", 1)
	f.Kick(ctx, s.ID)
	f.Kick(ctx, s.ID)
	devices := 3
	f.SetUser(ctx, "alice", identity.Change{Groups: []string{"db"}, Sessions: &devices})
	f.RevokeUser(ctx, "alice", "mac")
	f.RevokeUser(ctx, "bob", "")
	f.do(ctx, "POST", "/v1/users", "alice", nil)
	f.do(ctx, "POST", "/v1/else", nil, nil)
	f.Status(ctx)
	f.Sessions(ctx)
	var got strings.Builder
	for _, r := range acts {
		if r.Kind != audit.Operator || !strings.HasPrefix(r.By, "root (0)") {
			t.Errorf("%+v", r)
		}
		text, _, _ := strings.Cut(r.Detail, ": ")
		fmt.Fprintf(&got, "%s %s %s %v %s %s\n", r.Action, r.User, r.Device, r.Session == s.ID.String(), r.Decision, text)
	}
	want := `user-add alice mac false done groups operators,db
user-add alice mac false failed groups operators,db
kick alice mac true done ` + `
kick   true failed no such session
user-set alice  false done {"groups":["db"],"session_devices":3}
user-revoke alice mac false done ` + `
user-revoke bob  false failed user "bob" is not known here
user-add   false failed request body
POST /v1/else   false failed no such operation
`
	if got.String() != want {
		t.Errorf("got\n%swant\n%s", got.String(), want)
	}
}

func TestAuditIsReadThroughTheDaemon(t *testing.T) {
	f, ctx := start(t), context.Background()
	f.ops.AuditDir = filepath.Join(t.TempDir(), "audit")
	r := audit.NewRecorder(f.ops.AuditDir, audit.Options{}, slog.New(slog.DiscardHandler))
	for range 5000 {
		r.Add(audit.Record{Kind: audit.Connection, User: "alice"})
	}
	ended, cancel := context.WithCancel(ctx)
	cancel()
	if err := r.Run(ended); err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string]string{"secret": "x", "00000002-2026-01-02.jsonl.gz": "x"} {
		if err := os.WriteFile(filepath.Join(f.ops.AuditDir, name), []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("/etc/hostname", filepath.Join(f.ops.AuditDir, "00000009-2026-01-02.jsonl")); err != nil {
		t.Fatal(err)
	}
	files := f.reader(t).AuditFiles(ctx)
	for _, name := range []string{"secret", "../audit/secret", "00000002-2026-01-02.jsonl.gz", "00000009-2026-01-02.jsonl", "00000003-2026-01-02.jsonl"} {
		if in, err := files.Open(name); !errors.Is(err, fs.ErrNotExist) {
			if in != nil {
				in.Close()
			}
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := os.Remove(filepath.Join(f.ops.AuditDir, "00000009-2026-01-02.jsonl")); err != nil {
		t.Fatal(err)
	}
	here, err := audit.Verify(os.DirFS(f.ops.AuditDir), nil)
	if err != nil {
		t.Fatal(err)
	}
	there, err := audit.Verify(files, nil)
	if err != nil || fmt.Sprint(here) != fmt.Sprint(there) || there.Records != 5001 {
		t.Errorf("%v %+v, want %+v", err, there, here)
	}
	n := 0
	if _, err := audit.Query(files, audit.Filter{User: "alice"}, func(*audit.Record) error { n++; return nil }); err != nil || n != 5000 {
		t.Errorf("%d, %v", n, err)
	}
	// One that changes his mind in the middle keeps no file open.
	in, err := files.Open(filepath.Base(mustGlob(t, f.ops.AuditDir)))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.CopyN(io.Discard, in, 10); err != nil {
		t.Fatal(err)
	}
	in.Close()
	for range 500 {
		if open := openFiles(t, f.ops.AuditDir); open == 0 {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Error("the daemon has the file open after five seconds")
}

func mustGlob(t *testing.T, dir string) string {
	t.Helper()
	list, err := filepath.Glob(filepath.Join(dir, "*.jsonl"))
	if err != nil || len(list) != 1 {
		t.Fatalf("%v %v", list, err)
	}
	return list[0]
}

// openFiles counts this process's open files below a directory.
func openFiles(t *testing.T, dir string) (n int) {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if to, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && strings.HasPrefix(to, dir+"/") {
			n++
		}
	}
	return n
}
