//go:build linux

package container

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/diff"

	"perimeterd/internal/lab"
)

// cloudName is a name that the default rules allow.
const cloudName = "s3.us-east-1.amazonaws.com"

// installation is a machine in the lab's bastion, and who comes to it.
type installation struct {
	*lab.Lab
	t     *testing.T
	ctx   context.Context
	m     machine
	cloud *lab.CloudHost
	alice *lab.User
	rate  int64 // of a transfer, bytes a second: it must outlast what is done to it

	before string // what the machine has without us
}

// TestPackages goes through the life of an installation on a release of Debian that $RELEASE names, on the kernel of this host.
func TestPackages(t *testing.T) {
	i := begin(t, 15*time.Minute, 5000)
	root, err := prepareRoot(i.ctx, cache(t, "container"), release())
	if err != nil {
		t.Fatal(err)
	}
	m, err := newContainer(root, t.TempDir(), i.Bastion)
	if err != nil {
		t.Fatal(err)
	}
	i.goThrough(m, []part{
		{"installed, it lies still", (*installation).install},
		{"three commands let the first administrator in", (*installation).first},
		{"the daemon is nobody's root", (*installation).unprivileged},
		{"operators and auditors", (*installation).groups},
		{"kill -9", (*installation).kill},
		{"an upgrade", (*installation).upgrade},
		{"a client who never rests", (*installation).restarts},
		{"a reload", (*installation).reload},
		{"a daemon that hangs", (*installation).frozen},
		{"a crash", (*installation).crash},
		{"stopped for good", (*installation).stopped},
		{"other rules are loaded", (*installation).reloadRules},
		{"the power goes", (*installation).powerCut},
		{"remove keeps what purge removes", (*installation).purge},
		{"a backup brings it back", (*installation).restore},
	})
}

func release() string { return cmp.Or(os.Getenv("RELEASE"), "bookworm") }

// cache is a directory that stays for later runs.
func cache(t *testing.T, name string) string {
	t.Helper()
	dir, err := filepath.Abs("../../../.cache/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// begin makes the lab, whose bastion waits for a machine.
func begin(t *testing.T, limit time.Duration, rate int64) *installation {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	t.Cleanup(cancel)
	i := &installation{Lab: lab.Start(t, lab.Options{}), t: t, ctx: ctx, rate: rate}
	var err error
	if i.cloud, err = i.StartCloud(lab.CloudOptions{Names: []string{cloudName}}); err != nil {
		t.Fatal(err)
	}
	return i
}

type part struct {
	name string
	run  func(*installation)
}

// goThrough boots the machine and runs the parts, each of which needs those before it.
func (i *installation) goThrough(m machine, parts []part) {
	i.m = m
	t := i.t
	t.Cleanup(func() {
		if err := i.m.Remove(); err != nil {
			t.Error(err)
		}
	})
	i.boot()
	t.Cleanup(func() {
		if t.Failed() {
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			out, _ := i.m.Run(ctx, "journalctl", "--no-pager", "--lines=80", "--output=cat", "--unit=perimeterd*")
			t.Logf("%s", out)
		}
	})
	for _, p := range parts {
		if !t.Run(p.name, func(t *testing.T) { i.t = t; p.run(i) }) {
			return
		}
	}
}

func (i *installation) boot() {
	i.t.Helper()
	if err := i.m.Start(i.ctx); err != nil {
		i.t.Fatal(err)
	}
}

// ok runs a command there that must succeed, and returns what it printed.
func (i *installation) ok(name string, args ...string) string {
	i.t.Helper()
	out, err := i.m.Run(i.ctx, name, args...)
	if err != nil {
		i.t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// fails runs a command there that must not succeed, and returns what it printed.
func (i *installation) fails(name string, args ...string) string {
	i.t.Helper()
	out, err := i.m.Run(i.ctx, name, args...)
	if err == nil {
		i.t.Fatalf("%s %s succeeded, and must not:\n%s", name, strings.Join(args, " "), out)
	}
	return string(out)
}

func (i *installation) eventually(what string, try func() error) {
	i.t.Helper()
	if err := eventually(i.ctx, what, try); err != nil {
		i.t.Fatal(err)
	}
}

// show is a property of the service.
func (i *installation) show(property string) string {
	i.t.Helper()
	return strings.TrimSpace(i.ok("systemctl", "show", "--value", "--property="+property, "perimeterd.service"))
}

func (i *installation) want(text string, parts ...string) {
	i.t.Helper()
	for _, p := range parts {
		if !strings.Contains(text, p) {
			i.t.Fatalf("%q is not in\n%s", p, text)
		}
	}
}

// debs are packages that make test-container built.
func (i *installation) debs(version string) (paths []string) {
	i.t.Helper()
	for _, name := range []string{"perimeterd", "perimeter-client"} {
		path, err := filepath.Abs(fmt.Sprintf("../../../bin/deb/test/%s_%s_%s.deb", name, version, runtime.GOARCH))
		if err != nil {
			i.t.Fatal(err)
		}
		if err := i.m.Copy(i.ctx, path); err != nil {
			i.t.Fatalf("%v: make test-container builds it", err)
		}
		paths = append(paths, "./"+filepath.Base(path))
	}
	return paths
}

// Versions of the packages.
const (
	older = "0.1.0"
	newer = "0.1.0+upgrade"
)

func (i *installation) apt(args ...string) string {
	i.t.Helper()
	return i.ok("apt-get", append([]string{"--quiet", "--yes", "--option", "Dpkg::Use-Pty=false"}, args...)...)
}

// inventory is everything that a package may leave: files with owner and mode, users, tables and links. What apt, dpkg and
// the journal write about themselves is left out.
func (i *installation) inventory() string {
	i.t.Helper()
	files := i.ok("find", "/", "-xdev", "(", "-path", "/proc", "-o", "-path", "/sys", "-o", "-path", "/root", "-o", "-path", "/tmp", "-o", "-path", "/var/tmp", "-o",
		"-path", "/var/log", "-o", "-path", "/var/cache", "-o", "-path", "/var/lib/dpkg", "-o", "-path", "/var/lib/apt", "-o", "-path", "/var/lib/systemd", "-o", "-name", "*-",
		")", "-prune", "-o", "-printf", "%p %u:%g %M\n")
	lines := strings.Split(files, "\n")
	lines = append(lines, strings.Split(i.ok("find", "/run", "-name", "*perimeter*"), "\n")...)
	lines = append(lines, strings.Split(i.ok("find", "/var/lib/systemd", "/var/log", "/var/tmp", "/tmp", "-name", "*perimeter*"), "\n")...)
	lines = append(lines, strings.Split(i.ok("dpkg-divert", "--list", "*knock*"), "\n")...)
	for _, file := range []string{"/etc/passwd", "/etc/group", "/etc/shadow", "/etc/gshadow"} {
		lines = append(lines, strings.Split(i.ok("cut", "-d:", "-f1,4", file), "\n")...)
	}
	slices.Sort(lines)
	links := regexp.MustCompile(`(?m)^\d+: ([^@:]+)`).FindAllString(i.ok("ip", "-oneline", "link"), -1)
	return strings.Join(lines, "\n") + "\n" + i.ok("nft", "list", "ruleset") + strings.Join(links, "\n") + "\n"
}

func (i *installation) install() {
	i.before = i.inventory()
	said := i.apt(append([]string{"install"}, i.debs(older)...)...)
	if n := strings.Count(said, "perimeterd is installed, and nothing of it runs. Next: perimeterd init\n"); n != 1 {
		i.t.Errorf("the next command is told %d times:\n%s", n, said)
	}
	for _, unit := range []string{"perimeterd.service", "perimeterd-early.service", "perimeterd-signer.socket", "perimeterd-signer.service"} {
		if out := i.fails("systemctl", "is-active", unit); out != "inactive\n" {
			i.t.Errorf("%s is %q", unit, out)
		}
		if out, _ := i.m.Run(i.ctx, "systemctl", "is-enabled", unit); string(out) != "disabled\n" && string(out) != "static\n" {
			i.t.Errorf("%s is %q", unit, out)
		}
	}
	i.want(i.ok("knock", "--help"), "knocks as the profile says")
	i.want(i.fails("knock.knockd"), "usage: knock")
	i.want(i.fails("perimeterd", "status"), "`perimeterd init` writes it")
	if out := i.ok("nft", "list", "tables"); out != "" {
		i.t.Errorf("tables before init: %s", out)
	}
	for _, page := range []string{"man8/perimeterd.8.gz", "man8/perimeterd-user-add.8.gz", "man1/vpn-up.1.gz", "man1/knock.1.gz"} {
		i.ok("test", "-s", "/usr/share/man/"+page)
	}
	i.want(i.ok("systemd-analyze", "cat-config", "sysctl.d"), "\nnet.ipv4.tcp_fastopen = 3\n")
	const setting = "/proc/sys/net/ipv4/tcp_fastopen"
	if _, err := i.m.Run(i.ctx, "test", "-w", setting); err == nil { // a container may not set it, a machine may
		i.want(i.ok("cat", setting), "3\n")
	}
	// A shell that completes asks the program itself.
	i.want(i.ok("perimeterd", "__complete", "user", ""), "add\t", "revoke\t")
}

// instance plays EC2's metadata service, version 2 only, at its own address.
func (i *installation) instance() {
	i.t.Helper()
	const address = "169.254.169.254"
	if err := i.Bastion.AddAddress(i.ctx, "lo", netip.MustParsePrefix(address+"/32")); err != nil {
		i.t.Fatal(err)
	}
	ln, err := i.Bastion.Listen("tcp", address+":80")
	if err != nil {
		i.t.Fatal(err)
	}
	const token = "AQAEAGb"
	values := map[string]string{
		"public-ipv4": i.Bastion.Addr.String(), "placement/region": "eu-central-1", "mac": "02:29:96:8f:6a:2d",
		"network/interfaces/macs/02:29:96:8f:6a:2d/security-group-ids": "sg-0123456789abcdef0",
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		v, known := values[strings.TrimPrefix(r.URL.Path, "/latest/meta-data/")]
		switch {
		case r.Method == "PUT" && r.URL.Path == "/latest/api/token" && r.Header.Get("X-Aws-Ec2-Metadata-Token-Ttl-Seconds") != "":
			io.WriteString(w, token)
		case r.Header.Get("X-Aws-Ec2-Metadata-Token") != token:
			w.WriteHeader(http.StatusUnauthorized)
		case !known:
			w.WriteHeader(http.StatusNotFound)
		default:
			io.WriteString(w, v)
		}
	})}
	go srv.Serve(ln)
	i.t.Cleanup(func() { srv.Close() })
}

func (i *installation) first() {
	i.instance()
	began := time.Now()
	said := i.ok("perimeterd", "init")
	i.want(said, "Open these ports", "1194/tcp  the gate", "    aws ec2 authorize-security-group-ingress --group-id sg-0123456789abcdef0 --region eu-central-1 ",
		"The service runs.", "Next:\n    perimeterd user add NAME\n")
	for _, unit := range []string{"perimeterd.service", "perimeterd-early.service", "perimeterd-signer.socket"} {
		i.ok("systemctl", "is-active", unit)
		i.ok("systemctl", "is-enabled", unit)
	}
	said = i.ok("perimeterd", "user", "add", "alice", "--group", "operators")
	i.want(said, "vpn import alice.profile", "knock && vpn up")
	i.t.Logf("from init to a profile: %v", time.Since(began).Round(time.Millisecond))

	// The lab's cloud has addresses that no real one has.
	i.ok("sed", "-i", `s|^allow_private = .*|allow_private = ["198.19.1.0/24"]|; s|^per_user_connections = .*|per_user_connections = 2000|`, "/etc/perimeterd/perimeterd.toml")
	i.ok("systemctl", "reload", "perimeterd")
	profile := filepath.Join(i.Dir, "alice.profile") // hosts of the lab do not see the machine's files
	if err := os.WriteFile(profile, []byte(i.ok("cat", "alice.profile")), 0o600); err != nil {
		i.t.Fatal(err)
	}
	var err error
	if i.alice, err = i.NewUser(i.ctx, i.Client, profile); err != nil {
		i.t.Fatal(err)
	}
	i.vpn("up")
	i.fetch()
	i.checked()
	i.figures()
}

// figures are how long the daemon took to be ready, and what it and the signer hold.
func (i *installation) figures() {
	i.t.Helper()
	i.t.Logf("from exec to READY: %v", i.moment("perimeterd.service", "ActiveEnterTimestampMonotonic")-i.moment("perimeterd.service", "ExecMainStartTimestampMonotonic"))
	for _, unit := range []string{"perimeterd.service", "perimeterd-signer.service"} {
		pid := strings.TrimSpace(i.ok("systemctl", "show", "--value", "--property=MainPID", unit))
		i.t.Logf("%s at rest: %s", unit, strings.Join(strings.Fields(i.ok("grep", "-E", "^Vm(RSS|HWM)", "/proc/"+pid+"/status")), " "))
	}
}

// moment is a unit's, since the machine has its power.
func (i *installation) moment(unit, property string) time.Duration {
	i.t.Helper()
	at, err := strconv.ParseInt(strings.TrimSpace(i.ok("systemctl", "show", "--value", "--property="+property, unit)), 10, 64)
	if err != nil {
		i.t.Fatal(err)
	}
	return time.Duration(at) * time.Microsecond
}

func (i *installation) vpn(args ...string) string {
	i.t.Helper()
	out, err := i.alice.VPN(i.ctx, args...).CombinedOutput()
	if err != nil {
		i.t.Fatalf("vpn %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// fetch asks for a page of the cloud through tunnel and proxy, until it comes.
func (i *installation) fetch() {
	i.t.Helper()
	i.eventually("a page through the proxy", func() error {
		out, err := i.alice.Command(i.ctx, "curl", "-sS", "--max-time", "5", "--cacert", i.cloud.CAFile, "--proxy", "http://10.77.0.1:3128", "https://"+cloudName+"/").CombinedOutput()
		if err != nil || !strings.Contains(string(out), "seen from 198.19.1.") {
			return fmt.Errorf("%v %s", err, out)
		}
		return nil
	})
}

// checked is `perimeterd check` without a problem.
func (i *installation) checked() {
	i.t.Helper()
	if out := i.ok("perimeterd", "check"); strings.Contains(out, "\nproblem") {
		i.t.Error(out)
	}
}

func (i *installation) unprivileged() {
	status := i.ok("cat", "/proc/"+i.show("MainPID")+"/status")
	// capability(7): CAP_NET_BIND_SERVICE is bit 10, CAP_NET_ADMIN 12.
	const both = "0000000000001400"
	for _, line := range []string{"CapEff:\t" + both, "CapPrm:\t" + both, "CapBnd:\t" + both, "NoNewPrivs:\t1", "Seccomp:\t2"} {
		i.want(status, line+"\n")
	}
	if n, err := strconv.Atoi(i.show("LimitNOFILE")); err != nil || n < 21000 {
		i.t.Errorf("LimitNOFILE %d %v", n, err)
	}
	uid := strings.TrimSpace(i.ok("id", "-u", "perimeterd"))
	i.want(status, "Uid:\t"+uid+"\t"+uid)
	for path, want := range map[string]string{
		"/etc/perimeterd/perimeterd.toml":     "root:perimeterd 640",
		"/etc/perimeterd/pki":                 "root:perimeterd-signer 751",
		"/etc/perimeterd/pki/ca.key":          "perimeterd-signer:perimeterd-signer 600",
		"/etc/perimeterd/pki/renewable/alice": "perimeterd-signer:perimeterd-signer 600",
		"/etc/perimeterd/pki/gate.key":        "perimeterd:perimeterd 600",
		"/etc/perimeterd/pki/gate.crt":        "root:root 644",
		"/var/lib/perimeterd/state.db":        "perimeterd:perimeterd 600",
		"/var/lib/perimeterd":                 "perimeterd:perimeterd 700",
		"/run/perimeterd/control.sock":        "perimeterd:perimeterd 660",
		"/run/perimeterd/audit.sock":          "perimeterd:perimeterd-audit 660",
		"/run/perimeterd/signer.sock":         "root:root 666",
	} {
		if got := strings.TrimSpace(i.ok("stat", "--format=%U:%G %a", path)); got != want {
			i.t.Errorf("%s is %s, want %s", path, got, want)
		}
	}
	// What was taken over gets at no CA key, and cannot change what it is.
	pid := i.show("MainPID")
	for _, try := range [][]string{{"cat", "/etc/perimeterd/pki/ca.key"}, {"touch", "/etc/perimeterd/pki/x"}, {"touch", "/usr/bin/x"}, {"sh", "-c", "echo x >> /etc/perimeterd/perimeterd.toml"}, {"ls", "/home/x"}} {
		args := append([]string{"--target", pid, "--mount", "--setuid", uid, "--setgid", uid, "--"}, try...)
		i.fails("nsenter", args...)
	}
}

func (i *installation) groups() {
	i.ok("useradd", "--groups", "perimeterd", "olga")
	i.ok("useradd", "--groups", "perimeterd-audit", "anna")
	i.ok("useradd", "nemo")
	as := func(user string, args ...string) []string {
		return append([]string{"-u", user, "--", "perimeterd"}, args...)
	}
	for _, user := range []string{"olga", "anna"} {
		i.want(i.ok("runuser", as(user, "sessions")...), "alice")
		i.want(i.ok("runuser", as(user, "audit", "query", "--kind", "session-began")...), "alice")
	}
	i.want(i.fails("runuser", as("anna", "user", "set", "alice", "--devices", "4")...), "may only read")
	i.ok("runuser", as("olga", "user", "set", "alice", "--devices", "4")...)
	i.want(i.ok("perimeterd", "audit", "query", "--kind", "operator"), "olga (")
	i.fails("runuser", as("nemo", "status")...)
	i.fails("runuser", as("nemo", "user", "add", "mallory")...)
	for _, user := range []string{"olga", "anna", "nemo"} {
		i.ok("userdel", "--force", user)
	}
}

// session is alice's, as the daemon has it.
func (i *installation) session() string {
	i.t.Helper()
	id := ""
	i.eventually("alice is inside", func() error {
		out, err := i.m.Run(i.ctx, "perimeterd", "sessions")
		lines := strings.Split(strings.TrimSpace(string(out)), "\n")
		if err != nil || len(lines) != 2 || !strings.Contains(lines[1], "alice") {
			return fmt.Errorf("%v %s", err, out)
		}
		id = strings.Fields(lines[1])[0]
		return nil
	})
	return id
}

// download begins a file of some seconds through the proxy, and returns when data has come. Its end is all of the file, or an
// error of curl's: what was cut never looks whole.
func (i *installation) download() (end func()) {
	i.t.Helper()
	const size = 32 << 20
	file := filepath.Join(i.Dir, "download")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		i.t.Fatal(err)
	}
	came := func() int64 {
		st, err := os.Stat(file)
		if err != nil {
			i.t.Fatal(err)
		}
		return st.Size()
	}
	curl := i.alice.Command(i.ctx, "curl", "-sS", "--max-time", "120", "--limit-rate", "4M", "--cacert", i.cloud.CAFile, "--proxy", "http://10.77.0.1:3128",
		"--output", file, fmt.Sprintf("https://%s/bytes/%d", cloudName, size))
	if err := curl.Start(); err != nil {
		i.t.Fatal(err)
	}
	i.eventually("data comes", func() error {
		if came() == 0 {
			return errors.New("none yet")
		}
		return nil
	})
	return func() {
		i.t.Helper()
		err, n := curl.Wait(), came()
		i.t.Logf("of a download of %d MiB there came %d: %v", size>>20, n>>20, cmp.Or(err, errors.New("whole")))
		if err == nil && n != size {
			i.t.Errorf("%d bytes of %d look whole", n, size)
		}
	}
}

func (i *installation) kill() {
	session, pid, ended := i.session(), i.show("MainPID"), i.download()
	defer ended()
	i.ok("systemctl", "kill", "--signal=KILL", "perimeterd.service")
	i.want(i.ok("nft", "list", "table", "inet", "perimeterd"), "chain gate") // dead or alive
	i.another(pid)
	i.resumes(session)
	// What a daemon that is not root may not do, it says. A container's own limit of files is not ours.
	for line := range strings.Lines(i.ok("journalctl", "--unit=perimeterd.service", "--output=cat", "--no-pager")) {
		if (strings.Contains(line, `"level":"WARN"`) || strings.Contains(line, `"level":"ERROR"`)) && !strings.Contains(line, "LimitNOFILE") {
			i.t.Error(line)
		}
	}
}

func (i *installation) reloadRules() {
	closed := func(after string) {
		i.t.Helper()
		i.eventually("the door is closed after "+after, func() error { // systemctl waits for nftables.service alone
			out, err := i.m.Run(i.ctx, "nft", "list", "chain", "inet", "perimeterd", "gate")
			if err != nil {
				return fmt.Errorf("%w %s", err, out)
			}
			return nil
		})
	}
	i.ok("systemctl", "start", "nftables.service")
	closed("start")
	i.ok("systemctl", "stop", "perimeterd.service")
	for _, act := range []string{"reload", "restart"} {
		i.ok("systemctl", act, "nftables.service")
		closed(act)
	}
	i.ok("systemctl", "start", "perimeterd.service")
	i.fetch()
}

func (i *installation) powerCut() {
	i.powerOff()
	i.powerOn()
	i.fetch()
}

func (i *installation) powerOff() {
	i.t.Helper()
	if err := i.m.Stop(); err != nil {
		i.t.Fatal(err)
	}
}

// powerOn is over when the daemon is ready. The door was closed before there was a network.
func (i *installation) powerOn() {
	i.t.Helper()
	i.boot()
	i.active()
	closed, network := i.moment("perimeterd-early.service", "ActiveEnterTimestampMonotonic"), i.moment("network-pre.target", "ActiveEnterTimestampMonotonic")
	if closed == 0 || network == 0 || closed > network {
		i.t.Errorf("the door was closed after %v, the network came from %v on", closed, network)
	}
	if out := i.ok("systemctl", "show", "--value", "--property=Result", "perimeterd-early.service"); out != "success\n" {
		i.t.Errorf("early unit: %s", out)
	}
}

// active waits until the daemon is ready.
func (i *installation) active() {
	i.t.Helper()
	i.eventually("the daemon runs", func() error {
		if s := i.show("ActiveState"); s != "active" {
			return fmt.Errorf("it is %s", s)
		}
		return nil
	})
}

func (i *installation) purge() {
	i.ok("sh", "-c", "echo correct horse battery staple > words && perimeterd backup --passphrase-file words bastion.backup")
	i.vpn("down")
	i.apt("remove", "perimeterd", "perimeter-client")
	i.fails("pgrep", "-u", "perimeterd,perimeterd-signer")
	i.ok("test", "-s", "/etc/perimeterd/pki/ca.key")
	i.ok("test", "-s", "/var/lib/perimeterd/state.db")
	i.want(i.fails("knock"), "usage: knock") // knockd's

	said := i.apt(append([]string{"install"}, i.debs(newer)...)...)
	i.want(said, "with the keys and users of before. Next: systemctl enable --now perimeterd")
	i.ok("systemctl", "enable", "--now", "perimeterd")
	i.vpn("up")
	i.fetch()
	i.vpn("down")

	i.purged()
}

// restore is another host that takes over.
func (i *installation) restore() {
	i.apt(append([]string{"install"}, i.debs(newer)...)...)
	said := i.ok("perimeterd", "restore", "--passphrase-file", "words", "bastion.backup")
	i.want(said, "Next:\n    perimeterd check\n    systemctl enable --now perimeterd.service\n")
	i.ok("systemctl", "enable", "--now", "perimeterd.service")
	i.checked()
	i.vpn("up") // with the profile of then
	i.fetch()
	i.vpn("down")
	i.purged()
}

func (i *installation) purged() {
	i.t.Helper()
	i.apt("purge", "perimeterd", "perimeter-client")
	i.ok("systemctl", "stop", "nftables.service")
	if after := i.inventory(); after != i.before {
		i.t.Errorf("%s", diff.Diff("before", []byte(i.before), "after", []byte(after)))
	}
}
