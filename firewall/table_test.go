package firewall

import (
	"bytes"
	"go/parser"
	gotoken "go/token"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// private moves the calling test into a network namespace of its own and returns its descriptor. The thread dies with
// the test's goroutine, since it is never unlocked.
func private(t *testing.T) int {
	t.Helper()
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal("unshare: ", err)
	}
	fd, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func run(t *testing.T, stdin string, name string, args ...string) string {
	t.Helper()
	c := exec.Command(name, args...)
	c.Stdin = strings.NewReader(stdin)
	out, err := c.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func example() Config {
	return Config{
		Mode: Guard, GatePorts: []uint16{1194}, TunnelPort: 1194, Interface: "perimeter0",
		Network: netip.MustParsePrefix("10.77.0.0/16"), InnerPorts: []uint16{80, 3128},
		Window: time.Minute, Step: 30 * time.Second, LogGroup: 1194, GID: 65534,
	}
}

func testLog(t testing.TB) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), nil))
}

// applied makes a plain table: nft lists one with an owner by another head, and may not change it.
func applied(t *testing.T, cfg Config) *Firewall {
	t.Helper()
	f := New(testLog(t), private(t))
	f.plain = true
	if fresh, err := f.Apply(cfg); err != nil || !fresh {
		t.Fatalf("Apply: fresh %v, %v", fresh, err)
	}
	return f
}

// documented is the table's text in doc.go.
func documented(t *testing.T) string {
	t.Helper()
	file, err := parser.ParseFile(gotoken.NewFileSet(), "doc.go", nil, parser.ParseComments|parser.PackageClauseOnly)
	if err != nil {
		t.Fatal(err)
	}
	_, text, found := strings.Cut(file.Doc.Text(), "table inet perimeterd {")
	if !found {
		t.Fatal("doc.go holds no table")
	}
	guard, _, _ := strings.Cut(text, "\n\nIn host mode")
	return "table inet perimeterd {" + guard
}

// documentedHost is the same in host mode.
func documentedHost(t *testing.T) string {
	t.Helper()
	file, err := parser.ParseFile(gotoken.NewFileSet(), "doc.go", nil, parser.ParseComments|parser.PackageClauseOnly)
	if err != nil {
		t.Fatal(err)
	}
	_, host, found := strings.Cut(file.Doc.Text(), "\tchain host {")
	if !found {
		t.Fatal("doc.go holds no chain host")
	}
	text := strings.Replace(documented(t), "hook input priority filter - 5; policy accept;", "hook input priority filter - 5; policy drop;", 1)
	text = strings.Replace(text, "\t\tmeta l4proto udp jump stray\n", "\t\tmeta l4proto udp jump stray\n\t\tgoto host\n", 1)
	return strings.Replace(text, "\tchain forward {", "\tchain host {"+host+"\n\n\tchain forward {", 1)
}

// What differs without a meaning: the number of an anonymous set, and nft's note to itself that a range has no end.
var setNumber, note = regexp.MustCompile(`__set\d+`), regexp.MustCompile(`  userdata = \{[^}]*\}`)

// span is how newer versions of nft (1.1.3) compare with both ends of a range at once.
var span = regexp.MustCompile(`\[ range eq reg (\d+) (0x[0-9a-f]+) (0x[0-9a-f]+) \]`)

func listings(t *testing.T) (text, bytecode string) {
	t.Helper()
	text = run(t, "", "nft", "-s", "list", "table", "inet", TableName)
	bytecode = run(t, "", "nft", "--debug=netlink", "list", "table", "inet", TableName)
	bytecode = span.ReplaceAllString(bytecode, "[ cmp gte reg $1 $2 ]\n  [ cmp lte reg $1 $3 ]")
	return text, note.ReplaceAllString(setNumber.ReplaceAllString(bytecode, "__set"), "")
}

func TestTableIsTheDocumentedOne(t *testing.T) {
	private(t)
	run(t, documented(t), "nft", "-f", "-")
	wantText, wantCode := listings(t)

	applied(t, example())
	gotText, gotCode := listings(t)
	diff(t, "listing", wantText, gotText)
	diff(t, "bytecode", wantCode, gotCode)
}

func TestHostModeIsTheDocumentedOne(t *testing.T) {
	private(t)
	run(t, documentedHost(t), "nft", "-f", "-")
	wantText, wantCode := listings(t)
	cfg := example()
	cfg.Mode = Host
	for _, s := range []string{"22/tcp", "8000-8010/udp from 198.51.100.0/24 on eth1", "icmp", "443/tcp from 2001:db8::/32"} {
		a, err := ParseAllow(s)
		if err != nil {
			t.Fatal(err)
		}
		cfg.Allow = append(cfg.Allow, a)
	}
	applied(t, cfg)
	gotText, gotCode := listings(t)
	diff(t, "listing", wantText, gotText)
	diff(t, "bytecode", wantCode, gotCode)
}

func TestAllowThatIsNotUnderstood(t *testing.T) {
	for _, s := range []string{"", "22", "22/sctp", "0/tcp", "9-3/tcp", "70000/udp", "22/tcp from", "22/tcp from x", "22/tcp on", "22/tcp near eth0",
		"22/tcp on abcdefghijklmnopqrst", "icmp/tcp", "22/tcp from 10.0.0.1 from 10.0.0.2"} {
		if a, err := ParseAllow(s); err == nil || !strings.Contains(err.Error(), "write it as in") {
			t.Errorf("ParseAllow(%q) = %+v, %v", s, a, err)
		}
	}
}

func diff(t *testing.T, what, want, got string) {
	t.Helper()
	if want == got {
		return
	}
	dir := t.TempDir()
	for name, text := range map[string]string{"want": want, "got": got} {
		if err := os.WriteFile(dir+"/"+name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	out, _ := exec.Command("diff", "-u", dir+"/want", dir+"/got").CombinedOutput()
	t.Errorf("%s differs:\n%s", what, out)
}

func TestApplyTwiceListsTheSame(t *testing.T) {
	f := applied(t, example())
	before, _ := listings(t)
	if fresh, err := f.Apply(example()); err != nil || fresh {
		t.Fatalf("second Apply: fresh %v, %v", fresh, err)
	}
	after, _ := listings(t)
	diff(t, "listing after the second Apply", before, after)
}

func TestApplyLeavesOtherTablesAlone(t *testing.T) {
	f := New(testLog(t), private(t))
	run(t, "table inet other { set s { type ipv4_addr; elements = { 192.0.2.1 } }\nchain c { type filter hook input priority 0; ip saddr @s drop\n}\n}", "nft", "-f", "-")
	before := run(t, "", "nft", "list", "table", "inet", "other")
	if _, err := f.Apply(example()); err != nil {
		t.Fatal(err)
	}
	diff(t, "the other table", before, run(t, "", "nft", "list", "table", "inet", "other"))
}

func TestListingLoadsAgain(t *testing.T) {
	f := applied(t, example())
	if err := f.AddTokens([]Token{{[16]byte{1, 2, 3}, 7, time.Now().Add(time.Minute)}}); err != nil {
		t.Fatal(err)
	}
	listing := run(t, "", "nft", "list", "ruleset")
	run(t, "flush ruleset\n"+listing, "nft", "-f", "-")
	if again := run(t, "", "nft", "list", "ruleset"); !bytes.Contains([]byte(again), []byte("@th,64,128")) {
		t.Errorf("the table that came back:\n%s", again)
	}
}
