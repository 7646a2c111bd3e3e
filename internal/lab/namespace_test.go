//go:build linux

package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"
)

func TestDoRunsInsideAndLeaksNoThread(t *testing.T) {
	l := Start(t, Options{})
	threads := func() int {
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			t.Fatal(err)
		}
		return len(tasks)
	}
	home, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	before := threads()
	for range 1000 {
		err := l.Client.Do(func() error {
			at, err := os.Readlink("/proc/thread-self/ns/net")
			if at == home {
				return errors.New("fn runs outside")
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	// A thread more or less is the Go runtime's own affair.
	soon(t, "threads", func() []string {
		if now := threads(); now > before+5 {
			return []string{fmt.Sprintf("%d, before %d", now, before)}
		}
		return nil
	})
	if at, err := os.Readlink("/proc/self/ns/net"); err != nil || at != home {
		t.Errorf("the process was in %s and is in %s: %v", home, at, err)
	}
	// Only those that start processes, one for each of client, bastion, cloud and internet.
	soon(t, "threads inside", func() []string {
		if found := astray(t); len(found) != 2*4 {
			return found
		}
		return nil
	})
}

func TestDoHandsOverErrorPanicAndExit(t *testing.T) {
	l := Start(t, Options{})
	want := errors.New("as asked")
	if err := l.Client.Do(func() error { return want }); err != want {
		t.Errorf("error is %v", err)
	}
	func() {
		defer func() {
			if r := recover(); r == nil || !strings.Contains(fmt.Sprint(r), "as asked") || !strings.Contains(fmt.Sprint(r), "namespace_test.go") {
				t.Errorf("recovered %v, want the panic with its stack", r)
			}
		}()
		l.Client.Do(func() error { panic("as asked") })
	}()
	left, returned := make(chan struct{}), false
	go func() {
		defer close(left)
		l.Client.Do(func() error { runtime.Goexit(); return nil }) // which is how t.Fatal ends
		returned = true
	}()
	if <-left; returned {
		t.Error("the caller goes on after fn left its goroutine")
	}
}

func TestFirstThreadOfTheProcessStaysOutside(t *testing.T) {
	c := exec.Command("/proc/self/exe")
	c.Env = append(os.Environ(), "LAB_TEST_CHILD=threads", "GOMAXPROCS=1")
	if out, err := c.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("%v: %s", err, out)
	}
}

func TestDialWantsAnAddressNotAName(t *testing.T) {
	l := Start(t, Options{})
	if c, err := l.Client.Dial(t.Context(), "tcp", "localhost:80"); err == nil || !strings.Contains(err.Error(), "IP:PORT") {
		t.Errorf("%v, %v", c, err)
	}
}

func TestProcessesResolveNamesByTheCloudsDNS(t *testing.T) {
	l := Start(t, Options{})
	cloud, err := l.StartCloud(CloudOptions{Names: []string{"console.aws.amazon.com", "*.s3.amazonaws.com"}, IPv6: true})
	if err != nil {
		t.Fatal(err)
	}
	lookup := func(ns *Namespace, name string) (string, error) {
		c := ns.Command(t.Context(), "/proc/self/exe", name)
		c.Env = append(os.Environ(), "LAB_TEST_CHILD=lookup", "GODEBUG=netdns=go")
		out, err := c.Output()
		return strings.TrimSpace(string(out)), err
	}
	for name, want := range map[string]string{
		"console.aws.amazon.com":  "198.19.1.2 2001:db8:19:1::2",
		"bucket.s3.amazonaws.com": "198.19.1.2 2001:db8:19:1::2",
		"client.test":             "198.18.1.2", // of /etc/hosts
	} {
		if got, err := lookup(l.Bastion, name); err != nil || got != want {
			t.Errorf("%s is %q, want %q: %v", name, got, want, err)
		}
	}
	if got, err := lookup(l.Bastion, "other.example"); err == nil || !strings.Contains(got, "no such host") {
		t.Errorf("a name without record is %q, %v", got, err)
	}
	if got, err := lookup(l.Client, "console.aws.amazon.com"); err == nil {
		t.Errorf("the client, who has no way to the cloud, resolved its name to %q", got)
	}
	if out, err := l.Bastion.Command(t.Context(), "getent", "ahostsv4", "console.aws.amazon.com").Output(); err != nil ||
		!bytes.Contains(out, []byte("198.19.1.2")) {
		t.Errorf("the C library says %q, %v", out, err)
	}
	// A person in `ip netns exec` sees what the lab's processes see.
	if out, err := exec.Command("ip", "netns", "exec", l.Bastion.Name, "getent", "ahostsv4", "console.aws.amazon.com").Output(); err != nil ||
		!bytes.Contains(out, []byte("198.19.1.2")) {
		t.Errorf("inside `ip netns exec`: %q, %v", out, err)
	}
	if q := cloud.DNS.Queries(); len(q) == 0 || q[0].From.Addr() != netip.MustParseAddr("198.19.1.1") {
		t.Errorf("the DNS server was asked %v", q)
	}
	if resolv, err := os.ReadFile("/etc/resolv.conf"); err != nil || string(resolv) == etcFiles["resolv.conf"] {
		t.Errorf("the machine itself has the lab's resolv.conf: %v", err)
	}
}

func TestProcessSeesItsOwnNetworkInSys(t *testing.T) {
	l := Start(t, Options{})
	out, err := l.Bastion.Command(t.Context(), "ls", "/sys/class/net").Output()
	if err != nil || strings.Join(strings.Fields(string(out)), " ") != "egress lo outside" {
		t.Errorf("/sys/class/net holds %q, %v", out, err)
	}
}

func TestProcessOutlivesTheThreadThatAskedForIt(t *testing.T) {
	l := Start(t, Options{})
	c := l.Client.Command(t.Context(), "cat")
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	c.Stdout = &out
	if err := l.Client.Do(c.Start); err != nil {
		t.Fatal(err)
	}
	for range 100 {
		if err := l.Client.Do(func() error { return nil }); err != nil {
			t.Fatal(err)
		}
	}
	fmt.Fprint(in, "alive")
	in.Close()
	if err := c.Wait(); err != nil || out.String() != "alive" {
		t.Errorf("%q, %v", &out, err)
	}
	if err := c.Wait(); err != nil {
		t.Errorf("waited twice: %v", err)
	}
}

func TestProcessStartsInTheCallersDirectory(t *testing.T) {
	l := Start(t, Options{})
	dir := t.TempDir()
	t.Chdir(dir)
	if out, err := l.Client.Command(t.Context(), "pwd", "-P").Output(); err != nil || strings.TrimSpace(string(out)) != dir {
		t.Errorf("%q, want %q: %v", out, dir, err)
	}
}

func TestEndOfContextKillsTheWholeGroup(t *testing.T) {
	l := Start(t, Options{})
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	start := time.Now()
	// The inner sleep holds the output open: only its death lets Output return before WaitDelay.
	if _, err := l.Client.Command(ctx, "sh", "-c", "sleep 1000; true").Output(); err == nil {
		t.Error("no error")
	}
	if took := time.Since(start); took > 1500*time.Millisecond {
		t.Errorf("took %v: a child of the process lived on", took)
	}
	if pids, err := inside(l.Client.Name); err != nil || len(pids) > 0 {
		t.Errorf("processes %v live on: %v", pids, err)
	}
}

func TestErrorHoldsWhatTheCommandComplainedOf(t *testing.T) {
	l := Start(t, Options{})
	if _, err := l.Client.Command(t.Context(), "sh", "-c", "echo too bad >&2; exit 3").Output(); err == nil || err.Error() != "exit status 3: too bad" {
		t.Errorf("got %v", err)
	}
	if out, err := l.Client.Command(t.Context(), "sh", "-c", "echo out; echo err >&2").CombinedOutput(); err != nil || string(out) != "out\nerr\n" {
		t.Errorf("got %q, %v", out, err)
	}
}

func TestSysctlIsOfTheNamespaceAlone(t *testing.T) {
	l := Start(t, Options{})
	if err := l.Bastion.Sysctl("net.ipv4.ip_default_ttl", "77"); err != nil {
		t.Fatal(err)
	}
	for ns, want := range map[*Namespace]string{l.Bastion: "77", l.Client: "64"} {
		out, err := ns.Command(t.Context(), "cat", "/proc/sys/net/ipv4/ip_default_ttl").Output()
		if err != nil || strings.TrimSpace(string(out)) != want {
			t.Errorf("%s has %q, want %s: %v", ns.Name, out, want, err)
		}
	}
}
