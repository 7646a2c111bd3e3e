package main

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"perimeterd/configs"
	"perimeterd/internal/audit"
	"perimeterd/internal/control"
	"perimeterd/internal/identity"
	"perimeterd/internal/session"
	"perimeterd/knock"
	"perimeterd/vpn/client"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"perimeterd": main})
}

// The scripts read like a terminal. What differs from run to run is written DATE, KEY, PORT and $WORK.
func TestCommands(t *testing.T) {
	imds := httptest.NewServer(http.HandlerFunc(serveEC2))
	t.Cleanup(imds.Close) // the scripts run on after this function
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Setup: func(e *testscript.Env) error {
			e.Setenv("AWS_EC2_METADATA_DISABLED", "true")
			e.Setenv("EC2", imds.URL)
			e.Setenv("TZ", "UTC")
			e.Values[running{}] = new(func())
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"golden":  golden,
			"profile": checkProfile,
			"daemon":  startDaemon,
			"begin":   beginSession,
			"hold":    holdState,
			"stop":    func(ts *testscript.TestScript, _ bool, _ []string) { (*ts.Value(running{}).(*func()))() },
			"waitfor": waitForRecord,
		},
	})
}

var (
	day   = regexp.MustCompile(`\b\d{4}-\d\d-\d\d\b`)
	key   = regexp.MustCompile(`\b([0-9a-f]{64}|[0-9a-f]{16})\b`)
	port  = regexp.MustCompile(`\b[1-9]\d{3,4}\b`)
	sizes = regexp.MustCompile(`\b[0-9.]+ [kMGT]?B\b`)
)

// golden compares a command's output with a file of the script.
func golden(ts *testscript.TestScript, neg bool, args []string) {
	got := strings.ReplaceAll(ts.ReadFile(args[0]), ts.Getenv("WORK"), "$WORK")
	got = sizes.ReplaceAllString(day.ReplaceAllString(got, "DATE"), "SIZE")
	got = key.ReplaceAllString(got, "KEY")
	got = port.ReplaceAllStringFunc(got, func(s string) string {
		if s == "1194" {
			return s
		}
		return "PORT"
	})
	if want := ts.ReadFile(args[1]); got != want {
		ts.Fatalf("%s is\n%s\nwant\n%s", args[0], got, want)
	}
}

// checkProfile reads a profile as the client does, and holds it against the directory that init made.
func checkProfile(ts *testscript.TestScript, neg bool, args []string) {
	p, err := client.ParseProfile([]byte(ts.ReadFile(args[0])))
	ts.Check(err)
	dir, epoch := ts.MkAbs(args[1]), uint32(0)
	if len(args) > 2 {
		epoch = 1
	}
	master, err := identity.ReadKey(filepath.Join(dir, "pki/knock.master"))
	ts.Check(err)
	if got := base64.StdEncoding.EncodeToString(knock.Secret(master[:], p.User, epoch)); got != p.KnockSecret {
		ts.Fatalf("the knock secret is not that of epoch %d", epoch)
	}
	c, err := configs.Load(filepath.Join(dir, "perimeterd.toml"))
	ts.Check(err)
	if !slices.Equal(p.Endpoints, []string{c.Endpoint}) || p.TunnelPort != 1194 || p.KnockStep != "30s" || p.KnockWindow != "1m0s" || len(p.Sequence) != 4 ||
		p.Sequence[2] != c.Firewall.Sequences[0].Ports[2].String() {
		ts.Fatalf("endpoints %v, tunnel %d, step %s, sequence %v", p.Endpoints, p.TunnelPort, p.KnockStep, p.Sequence)
	}
	if !strings.Contains(ts.ReadFile(args[0]), "\nkey = \"\"\"\n-----BEGIN PRIVATE KEY-----\n") {
		ts.Fatalf("the key is not on lines of its own")
	}
}

// startDaemon holds the state below a directory and serves its control socket, as `perimeterd run` does, to the script's end.
func startDaemon(ts *testscript.TestScript, neg bool, args []string) {
	c, err := configs.Load(filepath.Join(ts.MkAbs(args[0]), "perimeterd.toml"))
	ts.Check(err)
	db, err := identity.OpenState(c.StateFile())
	ts.Check(err)
	sessions, err := session.OpenBolt(db, time.Now())
	ts.Check(err)
	trail := beginTrail(c, slog.New(slog.DiscardHandler))
	sessions.Watch(trail.session)
	ops := &control.Operations{Users: identity.NewUsers(db), Sessions: sessions, Now: time.Now, Log: slog.New(slog.DiscardHandler), Audit: trail.Add, AuditDir: c.AuditDir(), Feed: trail.Feed,
		Snapshot: db.Snapshot,
		Status: func() control.Status {
			return control.Status{Version: "test", Started: time.Now(), Endpoint: c.Endpoint, Egress: []string{"203.0.113.10/32"}, Limit: c.Gate.Limit}
		}}
	ctx, cancel := context.WithCancel(context.Background())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- control.Serve(ctx, c.ControlSocket(), control.Handler(ops), func() { close(ready) }) }()
	stop := sync.OnceFunc(func() {
		trail.Feed.End()
		cancel()
		err := <-done
		trail.end(err)
		if err := errors.Join(err, db.Close()); err != nil {
			panic(err)
		}
	})
	ts.Defer(stop)
	*ts.Value(running{}).(*func()) = stop
	select {
	case <-ready:
	case err := <-done:
		ts.Fatalf("control socket: %v", err)
	}
}

// running is the key of what stops the daemon that a script started.
type running struct{}

// waitForRecord waits until the audit below a directory has a record of a kind and user.
func waitForRecord(ts *testscript.TestScript, neg bool, args []string) {
	c, err := configs.Load(filepath.Join(ts.MkAbs(args[0]), "perimeterd.toml"))
	ts.Check(err)
	for range 3000 {
		found := false
		_, err := audit.Query(os.DirFS(c.AuditDir()), audit.Filter{Kinds: []audit.Kind{audit.Kind(args[1])}, User: args[2]}, func(*audit.Record) error { found = true; return nil })
		ts.Check(err)
		if found {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	ts.Fatalf("no %s of %s in half a minute", args[1], args[2])
}

// holdState keeps the state file of a directory locked to the script's end, and answers nowhere.
func holdState(ts *testscript.TestScript, neg bool, args []string) {
	c, err := configs.Load(filepath.Join(ts.MkAbs(args[0]), "perimeterd.toml"))
	ts.Check(err)
	db, err := identity.OpenState(c.StateFile())
	ts.Check(err)
	ts.Defer(func() { db.Close() })
}

// beginSession writes a session of a user into a state file that nobody holds.
func beginSession(ts *testscript.TestScript, neg bool, args []string) {
	c, err := configs.Load(filepath.Join(ts.MkAbs(args[0]), "perimeterd.toml"))
	ts.Check(err)
	db, err := identity.OpenState(c.StateFile())
	ts.Check(err)
	defer db.Close()
	sessions, err := session.OpenBolt(db, time.Now())
	ts.Check(err)
	s := session.Session{ID: session.NewID(), User: args[1], Device: args[2], Address: netip.MustParseAddr(args[3]),
		Outer: netip.MustParseAddr("198.51.100.7"), Created: time.Now(), Expires: time.Now().Add(time.Hour), PostQuantum: true}
	copy(s.PublicKey[:], s.Address.AsSlice())
	ts.Check(sessions.Put(s))
}

// serveEC2 is the instance metadata service as AWS documents version 2.
func serveEC2(w http.ResponseWriter, r *http.Request) {
	const token = "AQAEAGb"
	if r.Method == "PUT" && r.URL.Path == "/latest/api/token" && r.Header.Get("X-Aws-Ec2-Metadata-Token-Ttl-Seconds") != "" {
		fmt.Fprint(w, token)
		return
	}
	if r.Header.Get("X-Aws-Ec2-Metadata-Token") != token {
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	values := map[string]string{
		"public-ipv4":      "203.0.113.77",
		"placement/region": "eu-central-1",
		"mac":              "02:29:96:8f:6a:2d",
		"network/interfaces/macs/02:29:96:8f:6a:2d/security-group-ids": "sg-0123456789abcdef0\nsg-ffffffffffffffff0",
	}
	v, known := values[strings.TrimPrefix(r.URL.Path, "/latest/meta-data/")]
	if !known {
		w.WriteHeader(http.StatusNotFound)
	}
	fmt.Fprint(w, v)
}

func TestMetadataThatIsNotEC2sIsIgnored(t *testing.T) {
	for name, h := range map[string]http.HandlerFunc{
		"a captive portal": func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "<html>log in</html>") },
		"someone hostile":  func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "x; rm -rf /") },
		"silence":          func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
	} {
		t.Run(name, func(t *testing.T) {
			srv := httptest.NewServer(h)
			defer srv.Close()
			t.Setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", srv.URL)
			began := time.Now()
			if i := askEC2(context.Background()); i != (instance{}) {
				t.Errorf("%+v", i)
			}
			if took := time.Since(began); took > 3*time.Second {
				t.Errorf("it took %v", took)
			}
		})
	}
}

func TestRandomSequenceIsOpenedByNoScan(t *testing.T) {
	seen := map[string]bool{}
	for range 2000 {
		text := randomSequence(1194)
		seq := knock.Sequence{Name: "default"}
		var n []int
		for _, s := range text {
			p, err := knock.ParsePort(s)
			if err != nil || p.Proto != knock.TCP || p.Number < 1024 || slices.Contains(commonPorts, p.Number) {
				t.Fatalf("%v: %v", text, err)
			}
			for _, o := range n {
				if d := o - int(p.Number); d < 16 && d > -16 {
					t.Fatalf("%v: near each other", text)
				}
			}
			seq.Ports, n = append(seq.Ports, p), append(n, int(p.Number))
		}
		up := slices.IsSorted(n)
		slices.Reverse(n)
		if len(n) != 4 || up || slices.IsSorted(n) {
			t.Fatalf("%v is in an order", text)
		}
		if err := knock.Validate([]knock.Sequence{seq}, []knock.Port{{Proto: knock.TCP, Number: 1194}}); err != nil {
			t.Fatal(err)
		}
		seen[strings.Join(text, " ")] = true
	}
	if len(seen) != 2000 {
		t.Fatalf("%d different ones of 2000", len(seen))
	}
}

func TestInitLeavesNothingOfAFailure(t *testing.T) {
	dir := t.TempDir()
	config := filepath.Join(dir, "perimeterd.toml")
	text, err := configs.Render(map[string]any{"state_dir": filepath.Join(dir, "state"), "run_dir": filepath.Join(dir, "run")})
	if err != nil {
		t.Fatal(err)
	}
	c, err := configs.Parse(config, text)
	if err != nil {
		t.Fatal(err)
	}
	// The gate's key cannot be written: its directory is missing.
	c.Identity.Key = filepath.Join(dir, "elsewhere", "gate.key")
	if _, err := writeAll(c, config, text, time.Now()); err == nil {
		t.Fatal("no error")
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) > 0 {
		t.Fatalf("%v stays, %v", left, err)
	}
}

func TestExitStatusTellsUsageFromFailure(t *testing.T) {
	dir := t.TempDir()
	for _, test := range []struct {
		args   string
		status int
	}{
		{"nonsense", 2}, {"init extra", 2}, {"user add", 2}, {"user", 2}, {"status --nonsense", 2},
		{"check --config " + dir + "/missing.toml", 2}, {"user add x --valid soon", 2}, {"run --config " + dir + "/missing.toml", 2},
		{"kick alice --config " + dir + "/missing.toml", 2}, {"user add x --valid 0s", 2}, {"user add x --valid -1h", 2},
		{"user add x --group=", 2}, {"user add x --group ok --group A", 2}, {"user revoke", 2}, {"user revoke a b", 2}, {"kick", 2},
		{"user list x", 2}, {"init --dir " + dir + " --config " + dir + "/c.toml", 2}, {"init --endpoint h:22 --dir " + dir, 2},
	} {
		err := execute(context.Background(), strings.Fields(test.args))
		if err == nil || exitStatus(err) != test.status {
			t.Errorf("%s: %v, status %s", test.args, err, strconv.Itoa(exitStatus(err)))
		}
	}
}

func TestInitTakesNoPortThatAServiceHas(t *testing.T) {
	t.Setenv("AWS_EC2_METADATA_DISABLED", "true")
	for _, network := range []string{"tcp4", "tcp6"} {
		address := map[string]string{"tcp4": "127.0.0.1:0", "tcp6": "[::1]:0"}[network]
		ln, err := net.Listen(network, address)
		if err != nil {
			t.Fatal(err)
		}
		_, port, err := net.SplitHostPort(ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		dir := filepath.Join(t.TempDir(), "d")
		err = execute(context.Background(), []string{"init", "--dir", dir, "--endpoint", "bastion.example.com:" + port})
		if err == nil || exitStatus(err) != exitUsage || !strings.Contains(err.Error(), "port "+port+"/tcp: a service of this host listens there") {
			t.Errorf("%s: %v", network, err)
		}
		if _, err := os.Stat(dir); err == nil {
			t.Errorf("%s was made", dir)
		}
		ln.Close()
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil {
			t.Fatal(err)
		}
		if err := nobodyListens(uint16(n)); err != nil {
			t.Errorf("%s: after it is closed: %v", network, err)
		}
	}
}

func TestVersionNamesTheRevisionWhereNoneWasTagged(t *testing.T) {
	const revision = "777963b0123456789abcdef0123456789abcdef0"
	stamped := []debug.BuildSetting{{Key: "vcs", Value: "git"}, {Key: "vcs.revision", Value: revision}}
	for _, test := range []struct {
		info *debug.BuildInfo
		want string
	}{
		{&debug.BuildInfo{Main: debug.Module{Version: "v1.2.3"}, Settings: stamped}, "v1.2.3"},
		{&debug.BuildInfo{Main: debug.Module{Version: "(devel)"}, Settings: stamped}, "devel-777963b01234"},
		{&debug.BuildInfo{Settings: stamped}, "devel-777963b01234"},
		{&debug.BuildInfo{Main: debug.Module{Version: "(devel)"}}, "devel"},
		{nil, "devel"},
	} {
		if got := versionOf(test.info); got != test.want {
			t.Errorf("%+v: %s, want %s", test.info, got, test.want)
		}
	}
}
