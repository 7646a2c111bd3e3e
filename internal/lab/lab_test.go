//go:build linux

package lab

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The test binary is also the child of some tests: a process that resolves a name, or one with a lab that ends badly.
func TestMain(m *testing.M) {
	switch mode := os.Getenv("LAB_TEST_CHILD"); mode {
	case "":
		os.Exit(m.Run())
	case "lookup":
		addrs, err := net.LookupHost(os.Args[1])
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		slices.Sort(addrs)
		fmt.Println(strings.Join(addrs, " "))
	case "threads":
		// With one processor, what the first goroutine starts runs on the first thread.
		for range 100 {
			onOwnThread(func() error {
				if unix.Gettid() == unix.Getpid() {
					fmt.Println("on the first thread")
				}
				return nil
			})
		}
	default:
		endings := map[string]func(testing.TB, *Lab){
			"hold":  func(testing.TB, *Lab) { select {} },
			"fatal": func(t testing.TB, l *Lab) { l.Client.Do(func() error { t.Fatal("as asked"); return nil }) },
			"panic": func(t testing.TB, l *Lab) { l.Client.Do(func() error { panic("as asked") }) },
		}
		// A benchmark is the one kind of test that runs by a call.
		testing.Benchmark(func(b *testing.B) {
			l := Start(b, Options{LongLink: true})
			occupy(b, l)
			fmt.Println(l.Name)
			endings[mode](b, l)
		})
	}
}

// occupy leaves processes in the lab that know how to hide: one in its own session, orphaned.
func occupy(t testing.TB, l *Lab) {
	t.Helper()
	for _, ns := range []*Namespace{l.Client, l.Bastion} {
		c := ns.Command(context.Background(), "sh", "-c", "setsid sh -c 'sleep 1000 & sleep 1000' & echo up; exec sleep 1000")
		c.Env = append(os.Environ(), "OF_LAB="+l.Name)
		out, err := c.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "up\n" {
			t.Fatalf("process in %s says %q: %v", ns.Name, line, err)
		}
	}
}

// left lists what of a lab is still there.
func left(t *testing.T, name string) []string {
	t.Helper()
	var found []string
	for _, dir := range []string{namedSpaces, ownEtc, ownRun} {
		paths, err := filepath.Glob(filepath.Join(dir, name+"*"))
		if err != nil {
			t.Fatal(err)
		}
		found = append(found, paths...)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, name+"-") {
			found = append(found, "mount "+line)
		}
	}
	environs, err := filepath.Glob("/proc/[0-9]*/environ")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range environs {
		env, _ := os.ReadFile(path) // of a process that may have ended
		if slices.Contains(strings.Split(string(env), "\x00"), "OF_LAB="+name) {
			found = append(found, "process "+path)
		}
	}
	listed, err := exec.Command("ip", "netns", "list").Output()
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(listed, []byte(name+"-")) {
		found = append(found, "ip netns list")
	}
	interfaces, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range interfaces {
		if slices.Contains([]string{"outside", "egress", "bridge", "client", "bastion", "attacker"}, i.Name) {
			found = append(found, "interface "+i.Name+" outside the lab")
		}
	}
	return found
}

// astray lists the threads of this process that are in another network or mount namespace.
func astray(t *testing.T) []string {
	t.Helper()
	var found []string
	for _, kind := range []string{"net", "mnt"} {
		home, err := os.Readlink("/proc/self/ns/" + kind)
		if err != nil {
			t.Fatal(err)
		}
		threads, err := filepath.Glob("/proc/self/task/*/ns/" + kind)
		if err != nil || len(threads) == 0 {
			t.Fatalf("threads of this process: %v %v", threads, err)
		}
		for _, path := range threads {
			if at, err := os.Readlink(path); err == nil && at != home {
				found = append(found, path+" "+at)
			}
		}
	}
	return found
}

// soon waits until nothing is found: threads and processes take a moment to end.
func soon(t *testing.T, what string, find func() []string) {
	t.Helper()
	var found []string
	for range 100 {
		if found = find(); len(found) == 0 {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Errorf("%s: %q", what, found)
}

func descriptors(t *testing.T) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(fds)
}

func TestTwoLabsAtOnceDoNotMeet(t *testing.T) {
	a, b := Start(t, Options{}), Start(t, Options{LongLink: true})
	if a.Name == b.Name {
		t.Fatalf("both are called %s", a.Name)
	}
	for i, l := range []*Lab{a, b} {
		listener, err := l.Bastion.Listen("tcp", "198.18.1.1:7000")
		if err != nil {
			t.Fatal(err)
		}
		defer listener.Close()
		go func() {
			for {
				c, err := listener.Accept()
				if err != nil {
					return
				}
				fmt.Fprintf(c, "lab %d", i)
				c.Close()
			}
		}()
	}
	for i, l := range []*Lab{a, b} {
		c, err := l.Client.Dial(t.Context(), "tcp", "198.18.1.1:7000")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		got := make([]byte, 5)
		if _, err := c.Read(got); err != nil || string(got) != fmt.Sprintf("lab %d", i) {
			t.Errorf("client of lab %d was answered %q, %v", i, got, err)
		}
	}
}

func TestCloseLeavesNothing(t *testing.T) {
	before := descriptors(t)
	l, err := New(t.Context(), Options{Delay: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := l.StartCloud(CloudOptions{Names: []string{"console.aws.amazon.com"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := l.AddHost(t.Context(), "attacker"); err != nil {
		t.Fatal(err)
	}
	occupy(t, l)
	kinds := strings.Join(left(t, l.Name), "\n")
	for _, kind := range []string{namedSpaces, ownEtc, ownRun + "/p", "mount ", "process ", "ip netns list"} {
		if !strings.Contains(kinds, kind) {
			t.Errorf("while the lab runs, no %q is found of it in:\n%s", kind, kinds)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if found := left(t, l.Name); len(found) > 0 {
		t.Errorf("left: %q", found)
	}
	soon(t, "threads inside", func() []string { return astray(t) })
	soon(t, "descriptors", func() []string {
		if now := descriptors(t); now > before {
			return []string{fmt.Sprintf("%d, before %d", now, before)}
		}
		return nil
	})
	if err := l.Close(); err != nil {
		t.Errorf("closed twice: %v", err)
	}
	if err := l.Client.Command(t.Context(), "true").Run(); err == nil {
		t.Error("a command started in a closed lab")
	}
	if _, err := l.AddHost(t.Context(), "late"); err == nil {
		t.Error("a host was added to a closed lab")
	}
}

func TestEndOfContextClosesTheLab(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	l, err := New(ctx, Options{})
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	soon(t, "left", func() []string { return left(t, l.Name) })
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if _, err := New(ctx, Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("with a context that has ended, New says %v", err)
	}
	soon(t, "left by the failed New", func() []string { return left(t, fmt.Sprintf("perimeter-lab-%d-", os.Getpid())) })
}

// child starts the test binary with a lab and returns when that lab is up.
func child(t *testing.T, mode string) (*exec.Cmd, string) {
	t.Helper()
	c := exec.Command("/proc/self/exe")
	c.Env = append(os.Environ(), "LAB_TEST_CHILD="+mode)
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Process.Kill(); c.Wait() })
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if labName.MatchString(lines.Text()) {
			return c, lines.Text()
		}
	}
	t.Fatalf("child %s ended without a lab: %v", mode, c.Wait())
	return nil, ""
}

func TestLabsThatEndBadlyLeaveNothing(t *testing.T) {
	for _, tt := range []struct {
		mode   string
		signal os.Signal
		ends   string
	}{
		{"fatal", nil, "exit status 0"},
		{"panic", nil, "exit status 2"},
		{"hold", os.Interrupt, "signal: interrupt"},
		{"hold", syscall.SIGTERM, "signal: terminated"},
	} {
		t.Run(tt.mode+", "+tt.ends, func(t *testing.T) {
			c, name := child(t, tt.mode)
			if tt.signal != nil {
				c.Process.Signal(tt.signal)
			}
			ended := "exit status 0"
			if err := c.Wait(); err != nil {
				ended = err.Error()
			}
			if ended != tt.ends {
				t.Errorf("child ended with %s, want %s", ended, tt.ends)
			}
			if found := left(t, name); len(found) > 0 {
				t.Errorf("left: %q", found)
			}
		})
	}
}

func TestKilledLabIsSweptByTheNext(t *testing.T) {
	living := Start(t, Options{})
	c, name := child(t, "hold")
	// Asked before the kill: from then on any lab that starts elsewhere sweeps as well.
	if found := left(t, name); !slices.ContainsFunc(found, func(s string) bool { return strings.HasPrefix(s, "process") }) {
		t.Fatalf("no process is there to survive the kill, so this test would prove nothing: %q", found)
	}
	if err := c.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	c.Wait()
	Start(t, Options{})
	if found := left(t, name); len(found) > 0 {
		t.Errorf("left: %q", found)
	}
	if err := living.Client.Command(t.Context(), "true").Run(); err != nil {
		t.Errorf("the sweep hurt a living lab: %v", err)
	}
}

func TestOwnerIsKnownByMoreThanItsNumber(t *testing.T) {
	name, dir, err := claim()
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if !owns(os.Getpid(), name) {
		t.Error("the owner is not recognised")
	}
	if err := os.WriteFile(filepath.Join(dir, "owner"), []byte("1"), 0o644); err != nil {
		t.Fatal(err)
	}
	if owns(os.Getpid(), name) {
		t.Error("a later process with the owner's number counts as the owner")
	}
}

func TestClientReachesTheBastionAndNothingElse(t *testing.T) {
	l := Start(t, Options{})
	cloud, err := l.StartCloud(CloudOptions{Names: []string{"console.aws.amazon.com"}})
	if err != nil {
		t.Fatal(err)
	}
	for _, to := range []string{"198.19.1.2:80", "[2001:db8:19:1::2]:80"} {
		if c, err := l.Client.Dial(t.Context(), "tcp", to); !errors.Is(err, syscall.ENETUNREACH) {
			t.Errorf("client to %s: %v, %v", to, c, err)
		}
	}
	for _, to := range []netip.Addr{l.Bastion.Addr, l.Bastion.Addr6} {
		if err := knockOn(t, l.Client, to); err != nil {
			t.Errorf("client to bastion %v: %v", to, err)
		}
	}
	if r := cloud.Requests(); len(r) > 0 {
		t.Errorf("the cloud saw %v", r)
	}
}

// knockOn tells whether a closed port answers with a reset, which proves the way there and back.
func knockOn(t *testing.T, from *Namespace, to netip.Addr) error {
	t.Helper()
	c, err := from.Dial(t.Context(), "tcp", netip.AddrPortFrom(to, 9).String())
	if errors.Is(err, syscall.ECONNREFUSED) {
		return nil
	}
	return fmt.Errorf("%v, %w", c, err)
}

func TestRouteViaBastionIsOpenUnlessSomethingRefuses(t *testing.T) {
	l := Start(t, Options{RouteViaBastion: true})
	for _, to := range []netip.Addr{l.Cloud.Addr, l.Cloud.Addr6} {
		if err := knockOn(t, l.Client, to); err != nil {
			t.Errorf("client to %v: %v", to, err)
		}
	}
}

func TestAddedHostsShareTheSegmentEachWithItsOwnMAC(t *testing.T) {
	l := Start(t, Options{LongLink: true})
	macs := map[string]string{}
	hosts := []*Namespace{l.Client, l.Bastion}
	for _, name := range []string{"attacker", "friend"} {
		h, err := l.AddHost(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		hosts = append(hosts, h)
	}
	for _, h := range hosts {
		err := h.Do(func() error {
			i, err := net.InterfaceByName("outside")
			if err == nil {
				macs[i.HardwareAddr.String()] = h.Name
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		for _, to := range hosts {
			if err := knockOn(t, h, to.Addr); err != nil {
				t.Errorf("%s to %s: %v", h.Name, to.Name, err)
			}
			if err := knockOn(t, h, to.Addr6); err != nil {
				t.Errorf("%s to %s: %v", h.Name, to.Name, err)
			}
		}
	}
	if len(macs) != len(hosts) {
		t.Errorf("%d hosts have the addresses %v", len(hosts), macs)
	}
	for _, name := range []string{"", "bridge", "client", "../x", "Upper", "averyverylongname"} {
		if h, err := l.AddHost(t.Context(), name); err == nil {
			t.Errorf("host %q was added as %s", name, h.Name)
		}
	}
}

func TestStrangersAreHeardFromTheirAddresses(t *testing.T) {
	l := Start(t, Options{})
	strangers, err := l.Strangers(t.Context(), 300)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := l.Bastion.Listen("tcp", "198.18.1.1:7000")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	for _, from := range append([]netip.Addr{l.Stranger}, strangers[0], strangers[299]) {
		c, err := l.Client.DialFrom(t.Context(), from, "tcp", "198.18.1.1:7000")
		if err != nil {
			t.Fatalf("from %v: %v", from, err)
		}
		defer c.Close()
		in, err := listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		if got := in.RemoteAddr().(*net.TCPAddr).AddrPort().Addr(); got != from {
			t.Errorf("%v is heard from %v", from, got)
		}
	}
}

func TestBinSaysHowToBuild(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "knock"), nil, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("BIN", dir)
	if path, err := Bin("knock"); err != nil || path != filepath.Join(dir, "knock") {
		t.Errorf("got %q, %v", path, err)
	}
	if _, err := Bin("vpn"); err == nil || !strings.Contains(err.Error(), "make build") {
		t.Errorf("a missing program is reported as %v", err)
	}
	t.Setenv("BIN", "")
	if root, err := moduleRoot(); err != nil || !strings.HasPrefix(mustGetwd(t), root) {
		t.Errorf("root of the module is %q, %v", root, err)
	}
}

func mustGetwd(t *testing.T) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	return dir
}
