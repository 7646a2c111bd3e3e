package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"perimeterd/internal/lab"
)

// record is what the tests look at in a record of the audit.
type record struct {
	Seq                                                              uint64
	Kind, ID, User, Device, Session, Source, Destination, Dialed     string
	Decision, Reason, End, Action, By, Detail, Address, Method, Prev string
	Down, Count                                                      int64
}

// audit is what `perimeterd audit query` prints.
func (s *stage) audit(args ...string) (list []record) {
	s.t.Helper()
	out, err := s.daemon.Perimeterd(s.ctx, append([]string{"audit", "query", "--json"}, args...)...)
	if err != nil {
		s.t.Fatalf("audit query: %v\n%s", err, out)
	}
	for line := range strings.Lines(out) {
		var r record
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			s.t.Fatalf("%v: %s", err, line)
		}
		list = append(list, r)
	}
	return list
}

// awaitRecord waits until the audit has such a record.
func (s *stage) awaitRecord(what string, is func(record) bool, args ...string) record {
	s.t.Helper()
	for {
		for _, r := range s.audit(args...) {
			if is(r) {
				return r
			}
		}
		select {
		case <-s.ctx.Done():
			s.t.Fatalf("the audit has no %s:\n%+v", what, s.audit())
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// explains runs `perimeterd why`.
func (s *stage) explains(what, want string) {
	s.t.Helper()
	out, err := s.daemon.Perimeterd(s.ctx, "why", what)
	if err != nil || !regexp.MustCompile(want).MatchString(out) {
		s.t.Errorf("why %s: %v\n%s\nwant\n%s", what, err, out, want)
	}
}

func (s *stage) stop() {
	s.t.Helper()
	if err := s.daemon.Signal(syscall.SIGTERM); err != nil {
		s.t.Fatal(err)
	}
	s.daemon.Wait()
}

// journal is a copy of the bastion's log as the journal of a service has it, which `journalctl` reads.
func (s *stage) journal() string {
	s.t.Helper()
	var export strings.Builder
	for i, line := range strings.Split(strings.TrimSpace(s.daemon.Log()), "\n") {
		fmt.Fprintf(&export, "__REALTIME_TIMESTAMP=%d\n__MONOTONIC_TIMESTAMP=%d\n_BOOT_ID=%032x\n_SYSTEMD_UNIT=perimeterd.service\n_TRANSPORT=stdout\nMESSAGE=%s\n\n",
			time.Now().UnixMicro()+int64(i), i+1, 1, line)
	}
	// Somebody else's words, which are not the service's.
	fmt.Fprintf(&export, "__REALTIME_TIMESTAMP=%d\n__MONOTONIC_TIMESTAMP=%d\n_BOOT_ID=%032x\n_SYSTEMD_UNIT=user@1000.service\n_TRANSPORT=stdout\nMESSAGE=%s\n\n",
		time.Now().UnixMicro()+1e6, 1<<20, 1, fmt.Sprintf(`{"msg":"audit head","dir":%q,"head":"999999:%064d"}`, filepath.Join(s.daemon.Dir, "state", "audit"), 0))
	file := filepath.Join(s.Dir, "journal.export")
	if err := os.WriteFile(file, []byte(export.String()), 0o600); err != nil {
		s.t.Fatal(err)
	}
	return file
}

// verify runs `perimeterd audit verify` on a host that has a journal.
func (s *stage) verify(journal string, args ...string) (string, error) {
	s.t.Helper()
	bin, err := lab.Bin("perimeterd")
	if err != nil {
		s.t.Fatal(err)
	}
	script := `set -e
		id=$(cat /etc/machine-id)
		mount -t tmpfs none /var/log/journal && mkdir /var/log/journal/$id
		/lib/systemd/systemd-journal-remote -o /var/log/journal/$id/system.journal "$1" 2>/dev/null
		shift; exec "$@"`
	c := s.Bastion.Command(s.ctx, "unshare", append([]string{"--mount", "--propagation", "private", "sh", "-c", script, "sh", journal, bin, "--config", s.daemon.Config, "audit", "verify"}, args...)...)
	out, err := c.CombinedOutput()
	return string(out), err
}

func TestDaysLifeIsInTheAuditAndNoChangeOfItGoesUnseen(t *testing.T) {
	s := newStage(t, lab.Options{})
	source := s.Client.Addr.String()

	// Morning: a stranger guesses; alice knocks, comes in, works, and is refused where she may not go.
	c, err := s.Client.DialFrom(context.Background(), s.Stranger, "udp", netip.AddrPortFrom(s.Bastion.Addr, 1194).String())
	if err != nil {
		t.Fatal(err)
	}
	c.Write(make([]byte, 16))
	c.Close()
	s.ok(s.alice.Knock(s.ctx))
	s.ok(s.alice.VPN(s.ctx, "up"))
	s.ok(s.curl("https://" + cloudName + "/"))
	s.fails(s.curl("https://evil.example.com/"))
	began := s.awaitRecord("session", func(r record) bool { return r.Kind == "session-began" })
	page := s.fails(s.curl("-f", "-w", "%{http_code}", "http://evil.example.com/")) // curl's own words for a 403
	page = s.ok(s.curl("http://evil.example.com/")) + page
	refusal := regexp.MustCompile(`(?s)no-rule.*\bid +([A-Z2-7]{10})\b`).FindStringSubmatch(page)
	if refusal == nil {
		t.Fatalf("no id in %s", page)
	}
	s.explains(refusal[1], `(?m)^20[-0-9: ]+  at the proxy, GET evil\.example\.com:80 was refused: no-rule$
  user alice, device default
  from 10\.77\.[0-9.]+:[0-9]+, session `+began.Session+`
  No rule allows you this destination\. Ask the operator to add it\.
  .perimeterd decide alice evil\.example\.com:80. says how it stands now$`)
	s.explains(began.Session, `(?m)^session `+began.Session+` of alice, device default
  began  20[-0-9: ]+ from `+regexp.QuoteMeta(source)+`, with the tunnel address 10\.77\.[0-9.]+, until 20[-0-9: ]+ at most
  it lives
  connections through the proxy: 1, [0-9.]+ k?B up, [0-9.]+ k?B down; refused: [23]$`)
	s.explains("alice", `(?m)^alice: active, in operators
  device default: good until 20[-0-9: ]+
  session `+began.Session+`: inside since 20[-0-9: ]+, from `+regexp.QuoteMeta(source)+`, with the tunnel address 10\.77\.[0-9.]+
  refused or failed last:
    20[-0-9: ]+  [A-Z2-7]{10}  at the proxy, GET evil\.example\.com:80 was refused: no-rule
`)
	s.fails(s.curl("https://nosuch.amazonaws.com/"))
	s.explains("alice", `(?m)refused or failed last:
    20[-0-9: ]+  [A-Z2-7]{10}  at the proxy, CONNECT nosuch\.amazonaws\.com:443 was allowed \(proxy\.rule 2\), and failed: dns-not-found
`)
	for destination, want := range map[string]string{
		cloudName + ":443":             "^alice \\(in operators\\) to s3\\.us-east-1\\.amazonaws\\.com:443, as a tunnel: allowed: allowed\nproxy.rule 2: allow = \\[@aws\\], ports = \\[443\\], groups = \\[\\*\\], tls = true\n",
		"https://x.elb.amazonaws.com/": "^alice \\(in operators\\) to x\\.elb\\.amazonaws\\.com:443, as a tunnel: refused: denied-by-rule\nproxy.rule 1: deny = \\[@customer-hosted\\]\n",
		"http://evil.example.com":      "as plain HTTP: refused: no-rule\nNo rule allows you this destination",
		"169.254.169.254:80":           "refused: metadata\n",
	} {
		out, err := s.daemon.Perimeterd(s.ctx, "decide", "alice", destination)
		if (err == nil) != strings.Contains(want, "allowed: allowed") || !regexp.MustCompile(want).MatchString(out) {
			t.Errorf("decide %s: %v\n%s", destination, err, out)
		}
	}
	// Noon: she is kicked, comes back, and leaves a connection open.
	if out, err := s.daemon.Perimeterd(s.ctx, "kick", "alice"); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	s.ok(s.curl("--max-time", "15", "https://"+cloudName+"/"))
	// Evening: she is revoked. A certificate that holds no more is refused.
	if out, err := s.daemon.Perimeterd(s.ctx, "user", "revoke", "alice"); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	s.ok(s.Client.Command(s.ctx, "/usr/bin/knock", append([]string{"-d", "20", s.Bastion.Addr.String()}, s.sequence()...)...))
	s.awaitRecord("refused certificate", func(r record) bool {
		s.alice.VPN(s.ctx, "up", "--timeout", "2s").Run()
		return r.Kind == "certificate-refused"
	}, "--kind", "certificate-refused")
	s.stop()
	if out, err := s.daemon.Perimeterd(s.ctx, "user", "add", "bob", "--out", filepath.Join(s.Dir, "bob.profile")); err != nil {
		t.Fatalf("%v %s", err, out)
	}

	s.explains(began.Session, `(?m)^  ended  20[-0-9: ]+ after [0-9hms]+: kicked: an operator ended it; the user may begin another
         by root \(0\)`)
	s.explains("alice", `(?m)^alice: revoked at 20[-0-9: ]+, in operators
  device default: revoked at 20[-0-9: ]+
  the daemon is not running: nobody new comes in
  session [0-9a-f]{32}: ended at 20[-0-9: ]+: revoked: the user, the device or the certificate was revoked, or is not let in any more
  refused or failed last:
    20[-0-9: ]+  [A-Z2-7]{10}  at the gate, the certificate was refused: revoked
 {37}the user was revoked: ask the operator
`)
	if out, err := s.daemon.Perimeterd(s.ctx, "decide", "alice", cloudName+":443"); err == nil || !strings.Contains(out, "refused: no-session\nalice is revoked, and has no session to come from.\n") {
		t.Errorf("%v\n%s", err, out)
	}

	all := s.audit()
	for i, want := range []struct {
		what string
		is   func(record) bool
	}{
		{"the chain's beginning", func(r record) bool { return r.Kind == "file-began" && r.Seq == 1 }},
		{"alice's enrolment, before there was a daemon", func(r record) bool {
			return r.Kind == "operator" && r.Action == "user-add" && r.User == "alice" && r.Decision == "done" && strings.HasPrefix(r.By, "root (0)")
		}},
		{"the start", func(r record) bool { return r.Kind == "daemon-started" }},
		{"the guess", func(r record) bool { return r.Kind == "token-refused" && r.Source == s.Stranger.String() }},
		{"the knock", func(r record) bool { return r.Kind == "window-opened" && r.User == "alice" && r.Source == source }},
		{"the session", func(r record) bool {
			return r.Kind == "session-began" && r.User == "alice" && r.Source == source && strings.HasPrefix(r.Address, "10.77.") && r.Session == began.Session
		}},
		{"the connection", func(r record) bool {
			return r.Kind == "connection" && r.User == "alice" && r.Destination == cloudName+":443" && r.Dialed == "198.19.1.2:443" && r.Down > 100 && r.Session == began.Session && r.Reason == "allowed"
		}},
		{"the refusal", func(r record) bool {
			return r.Kind == "proxy-refused" && r.User == "alice" && r.Destination == "evil.example.com:443" && r.Reason == "no-rule" && strings.HasPrefix(r.Source, began.Address+":")
		}},
		{"the kick", func(r record) bool {
			return r.Kind == "operator" && r.Action == "kick" && r.User == "alice" && r.Session == began.Session && strings.HasPrefix(r.By, "root (0)")
		}},
		{"its effect", func(r record) bool {
			return r.Kind == "session-ended" && r.User == "alice" && r.Reason == "kicked" && r.Session == began.Session
		}},
		{"the session after", func(r record) bool {
			return r.Kind == "session-began" && r.User == "alice" && r.Session != began.Session
		}},
		{"the revocation", func(r record) bool {
			return r.Kind == "operator" && r.Action == "user-revoke" && r.User == "alice" && r.Decision == "done"
		}},
		{"its effect", func(r record) bool {
			return r.Kind == "session-ended" && r.User == "alice" && r.Reason == "revoked" && r.Session != began.Session
		}},
		{"the refused certificate", func(r record) bool {
			return r.Kind == "certificate-refused" && r.User == "alice" && strings.HasPrefix(r.Source, source+":") && r.Reason == "revoked"
		}},
		{"the stop", func(r record) bool { return r.Kind == "daemon-stopped" && r.Reason == "" }},
		{"bob's enrolment, after it", func(r record) bool { return r.Kind == "operator" && r.Action == "user-add" && r.User == "bob" }},
	} {
		found := false
		for _, r := range all {
			found = found || want.is(r)
		}
		if !found {
			t.Errorf("%d: %s is missing", i, want.what)
		}
	}
	if t.Failed() {
		for _, r := range all {
			t.Logf("%+v", r)
		}
	}
	if err := s.daemon.Start(s.ctx); err != nil {
		t.Fatal(err)
	}
	s.stop()

	journal := s.journal()
	out, err := s.verify(journal)
	if err != nil || !strings.Contains(out, "heads in the journal: 4, of which these records have 4\n") {
		t.Fatalf("verify: %v\n%s", err, out)
	}
	t.Log(out)
	// Every file whole, and then with one thing done to it.
	dir := filepath.Join(s.daemon.Dir, "state", "audit")
	files, err := filepath.Glob(filepath.Join(dir, "*.jsonl"))
	if err != nil || len(files) == 0 {
		t.Fatalf("%v %v", files, err)
	}
	file := files[len(files)-1]
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	lines := bytes.SplitAfter(text, []byte("\n"))
	kick := 0
	for i, l := range lines {
		if bytes.Contains(l, []byte(`"action":"kick"`)) {
			kick = i
		}
	}
	base := regexp.QuoteMeta(filepath.Base(file))
	without := func(i int) []byte {
		return bytes.Join(append(append([][]byte{}, lines[:i]...), lines[i+1:]...), nil)
	}
	end := bytes.Join(lines[:len(lines)-3], nil)
	for _, test := range []struct {
		what string
		text []byte
		want string
	}{
		{"a byte", bytes.Replace(text, []byte(`"action":"kick"`), []byte(`"action":"kink"`), 1),
			fmt.Sprintf(`(?m)^problem  %s:%d: record [0-9]+: its hash does not fit`, base, kick+1)},
		{"a record", without(kick), fmt.Sprintf(`(?m)^problem  %s:%d: record [0-9]+: record [0-9]+ is missing before it$`, base, kick+1)},
		{"the end", end, `(?m)^problem  the end is cut off: the log of [^ ]+ names record [0-9]+, and the last one there is [0-9]+`},
		{"the end, within a record", end[:len(end)-20], `(?m)^problem  the end is cut off: `},
	} {
		if err := os.WriteFile(file, test.text, 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := s.verify(journal)
		if err == nil || !regexp.MustCompile(test.want).MatchString(out) {
			t.Errorf("%s: %v\n%s", test.what, err, out)
		}
		t.Logf("%s:\n%s", test.what, out)
	}
	// A daemon that starts on what is left goes on, and its new head does not hide that the old ones are gone.
	if err := os.WriteFile(file, end, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.daemon.Start(s.ctx); err != nil {
		t.Fatal(err)
	}
	s.stop()
	if out, err := s.verify(s.journal()); err == nil || !strings.Contains(out, "the files were written anew") && !strings.Contains(out, "the end is cut off") {
		t.Errorf("after another start: %v\n%s", err, out)
	}
}

// Killed in the middle of whatever it writes, the daemon leaves an audit that holds.
func TestAuditHoldsOverKills(t *testing.T) {
	s := newStage(t, lab.Options{})
	s.ok(s.alice.VPN(s.ctx, "up"))
	for range 3 {
		s.ok(s.curl("https://" + cloudName + "/"))
		if err := s.daemon.Signal(syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		s.daemon.Wait()
		if err := s.daemon.Start(s.ctx); err != nil {
			t.Fatal(err)
		}
		s.ok(s.curl("--max-time", "30", "--retry", "10", "--retry-all-errors", "https://"+cloudName+"/"))
	}
	if out, err := s.verify(s.journal()); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	if n := len(s.audit("--kind", "daemon-started")); n != 4 {
		t.Errorf("%d starts", n)
	}
	if n := len(s.audit("--kind", "session-began")); n != 1 {
		t.Errorf("the session began %d times", n)
	}
}

func TestConnectionsThatAStopCutsOffAreInTheAudit(t *testing.T) {
	s := newStage(t, lab.Options{})
	s.ok(s.alice.VPN(s.ctx, "up"))
	c := s.curl("--max-time", "60", "--limit-rate", "10k", "-o", "/dev/null", "https://"+cloudName+"/bytes/100000000")
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	// The bytes flow when the client has the file open, at the latest; the proxy counts it live before.
	for s.ctx.Err() == nil {
		if len(s.cloud.Requests()) > 0 {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	s.stop()
	c.Wait()
	if list := s.audit("--kind", "connection"); len(list) != 1 || list[0].End != "shutdown" || list[0].User != "alice" || list[0].Down == 0 {
		t.Errorf("%+v", list)
	}
	if list := s.audit(); list[len(list)-1].Kind != "daemon-stopped" {
		t.Errorf("the last record is %+v", list[len(list)-1])
	}
}

func TestReadersSeeEverythingAndChangeNothing(t *testing.T) {
	s := newStage(t, lab.Options{})
	s.ok(s.alice.VPN(s.ctx, "up"))
	// With --dir everything lies in a directory of root's; a service has its socket in /run.
	for path, mode := range map[string]fs.FileMode{s.daemon.Dir: 0o755, filepath.Join(s.daemon.Dir, "run"): 0o755, s.daemon.Config: 0o644} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	bin, err := lab.Bin("perimeterd")
	if err != nil {
		t.Fatal(err)
	}
	copied := filepath.Join(s.Dir, "perimeterd-bin") // where anybody may run it
	data, err := os.ReadFile(bin)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(copied, data, 0o755); err != nil {
		t.Fatal(err)
	}
	as := func(groups []uint32, args ...string) *lab.Cmd {
		c := s.Bastion.Command(s.ctx, copied, append([]string{"--config", s.daemon.Config}, args...)...)
		c.Dir = "/"
		c.SysProcAttr.Credential = &syscall.Credential{Uid: 4711, Gid: 4711, Groups: groups}
		return c
	}
	reader := []uint32{lab.ReadersGroup}
	for _, args := range [][]string{{"status"}, {"sessions"}, {"user", "list"}, {"events"}, {"why", "alice"}, {"decide", "alice", cloudName + ":443"}, {"audit", "query"}, {"audit", "verify"}} {
		out := s.ok(as(reader, args...))
		if args[0] == "sessions" && !strings.Contains(out, "alice") || args[0] == "audit" && args[1] == "query" && !strings.Contains(out, "session-began") ||
			args[0] == "audit" && args[1] == "verify" && !strings.Contains(out, "\nhead ") && !strings.HasPrefix(out, "records 1 to ") {
			t.Errorf("%v: %s", args, out)
		}
		if out := s.fails(as(nil, args...)); !strings.Contains(out, "permission denied: run it as root, or join the group perimeterd, or perimeterd-audit to read only") {
			t.Errorf("a stranger's %v: %s", args, out)
		}
	}
	for _, args := range [][]string{{"kick", "alice"}, {"user", "revoke", "alice"}, {"confirm"}, {"rollback"}, {"apply"}} {
		out := s.fails(as(reader, args...))
		if !strings.Contains(out, "the group perimeterd-audit may only read: run it as root, or as a member of the group perimeterd") {
			t.Errorf("%v: %s", args, out)
		}
	}
	if out, err := s.daemon.Perimeterd(s.ctx, "sessions"); err != nil || !strings.Contains(out, "alice") {
		t.Errorf("%v %s", err, out)
	}
	tried := s.awaitRecord("reader's try", func(r record) bool {
		return r.Kind == "operator" && strings.HasPrefix(r.Action, "DELETE /v1/sessions/") && r.Decision == "failed" && strings.HasPrefix(r.By, "uid 4711")
	})
	t.Logf("%+v", tried)
	s.ok(as([]uint32{60194}, "kick", "alice"))
}

// Tools that read OpenVPN's status file read ours: jc is one.
func TestStatusFileIsReadByToolsForOpenVPN(t *testing.T) {
	s := newStage(t, lab.Options{}, lab.Setting{Key: "status_file", Value: `"openvpn-status.log"`})
	s.ok(s.alice.VPN(s.ctx, "up"))
	const sent = 3_000_000
	s.ok(s.curl("-o", "/dev/null", fmt.Sprintf("https://%s/bytes/%d", cloudName, sent)))
	file := filepath.Join(s.daemon.Dir, "state", "openvpn-status.log")
	type parsed struct {
		Clients []struct {
			CommonName    string `json:"common_name"`
			RealAddress   string `json:"real_address"`
			BytesReceived int64  `json:"bytes_received"`
			BytesSent     int64  `json:"bytes_sent"`
			Since         int64  `json:"connected_since_epoch"`
		}
		RoutingTable []struct {
			VirtualAddress string `json:"virtual_address"`
			CommonName     string `json:"common_name"`
			Last           int64  `json:"last_reference_epoch"`
		} `json:"routing_table"`
	}
	read := func() (p parsed) {
		text, err := os.ReadFile(file)
		if err != nil {
			return p
		}
		c := s.Bastion.Command(s.ctx, "jc", "--openvpn")
		c.Stdin = bytes.NewReader(text)
		if err := json.Unmarshal([]byte(s.ok(c)), &p); err != nil {
			t.Fatalf("%v\n%s", err, text)
		}
		return p
	}
	var p parsed
	for s.ctx.Err() == nil {
		if p = read(); len(p.Clients) == 1 && p.Clients[0].BytesSent > sent {
			break
		}
		time.Sleep(200 * time.Millisecond)
	}
	if len(p.Clients) != 1 || len(p.RoutingTable) != 1 {
		t.Fatalf("%+v", p)
	}
	c, r := p.Clients[0], p.RoutingTable[0]
	if c.CommonName != "alice" || c.RealAddress != s.Client.Addr.String() || c.BytesReceived == 0 || c.BytesSent > 2*sent || time.Since(time.Unix(c.Since, 0)) > 3*time.Minute ||
		r.CommonName != "alice" || r.VirtualAddress != "10.77.0.2" || r.Last < c.Since {
		t.Errorf("%+v", p)
	}
	if out, err := s.daemon.Perimeterd(s.ctx, "kick", "alice"); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	s.ok(s.alice.VPN(s.ctx, "down"))
	for s.ctx.Err() == nil && len(read().Clients) > 0 {
		time.Sleep(200 * time.Millisecond)
	}
	if p := read(); len(p.Clients) != 0 {
		t.Errorf("after the end: %+v", p)
	}
}

// The state's file system is a small one. Full, the audit stops and says so; the daemon judges on, and closed.
func TestFullDiskStopsTheAuditAndNotTheDaemon(t *testing.T) {
	s := newStage(t, lab.Options{})
	s.ok(s.alice.VPN(s.ctx, "up"))
	s.stop()
	state := filepath.Join(s.daemon.Dir, "state")
	s.ok(s.Bastion.Command(s.ctx, "sh", "-ec", `
		mkdir "$1.small"; mount -t tmpfs -o size=64m none "$1.small"; cp -a "$1/." "$1.small"; mount --move "$1.small" "$1"`, "sh", state))
	if err := s.daemon.Start(s.ctx); err != nil {
		t.Fatal(err)
	}
	s.ok(s.curl("--max-time", "30", "--retry", "10", "--retry-all-errors", "https://"+cloudName+"/"))
	problem := func() string {
		out, err := s.daemon.Perimeterd(s.ctx, "status")
		if err != nil {
			t.Fatalf("%v %s", err, out)
		}
		return out
	}
	fill := func(mb string) {
		s.Bastion.Command(s.ctx, "dd", "if=/dev/zero", "of="+filepath.Join(state, "filler"), "bs=1M", "count="+mb).Run()
	}
	const is = "the audit is not written: "
	// The last 32 MiB are the state's: sessions begin and end as ever.
	fill("40")
	for s.ctx.Err() == nil && !strings.Contains(problem(), is) {
		s.ok(s.curl("https://" + cloudName + "/"))
	}
	if out, err := s.daemon.Perimeterd(s.ctx, "kick", "alice"); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	s.ok(s.curl("--max-time", "20", "https://"+cloudName+"/"))
	// Not one byte is left: who is in stays in until she is revoked, which holds.
	fill("1000")
	s.ok(s.curl("https://" + cloudName + "/"))
	s.fails(s.curl("https://evil.example.com/"))
	s.daemon.Perimeterd(s.ctx, "user", "revoke", "alice") // it says that it could not be written
	s.fails(s.curl("--max-time", "3", "https://"+cloudName+"/"))
	s.ok(s.Bastion.Command(s.ctx, "rm", filepath.Join(state, "filler")))
	for s.ctx.Err() == nil && strings.Contains(problem(), is) {
		time.Sleep(100 * time.Millisecond)
	}
	if out, err := s.daemon.Perimeterd(s.ctx, "user", "revoke", "alice"); err != nil {
		t.Errorf("%v %s", err, out)
	}
	s.awaitRecord("revocation", func(r record) bool { return r.Kind == "operator" && r.Action == "user-revoke" && r.Decision == "done" })
	lost := s.audit("--kind", "records-lost")
	if len(lost) != 1 || lost[0].Count < 3 || !strings.Contains(lost[0].Detail, "no space left on device") {
		t.Errorf("%+v", lost)
	}
	if n := len(s.daemon.Entries("the audit cannot be written: its records are counted until it can")); n != 1 {
		t.Errorf("said %d times", n)
	}
	s.stop()
	if out, err := s.verify(s.journal()); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
