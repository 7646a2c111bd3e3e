package signer

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"perimeterd/internal/identity"
)

// daemonUID and strangerUID are nobody's on Debian (policy, 9.2.2).
const (
	daemonUID   = 60195
	strangerUID = 60196
	socketVar   = "SIGNER_TEST_SOCKET"
)

func TestMain(m *testing.M) {
	if socket := os.Getenv(socketVar); socket != "" {
		os.Exit(askAs(socket))
	}
	os.Exit(m.Run())
}

// askAs is a process of another user: it exits with 0 where it may do everything, 1 to renew only, 2 nothing.
func askAs(socket string) int {
	key, err := identity.NewKey()
	if err != nil {
		return 3
	}
	der, err := identity.NewRequest(key, "mallory", "mac")
	if err != nil {
		return 3
	}
	c := NewClient(socket, func(uint32) bool { return true }, func() (*exec.Cmd, error) { return nil, errors.New("nobody listens") })
	if _, err := c.Enrol(context.Background(), "mallory", "mac", false, time.Hour, der.DER); err == nil {
		return 0
	}
	var refusal *Refusal
	if err := c.Forget(context.Background(), "mallory", ""); err == nil {
		return 1
	} else if errors.As(err, &refusal) && refusal.Code == Forbidden {
		return 2
	}
	return 3
}

func TestTheKernelSaysWhoAsks(t *testing.T) {
	b := newBench(t)
	// Others may pass through: not so through t.TempDir's parent.
	open, err := os.MkdirTemp("", "signer")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(open)
	if err := os.Chmod(open, 0o711); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(open, "s")
	ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: socket, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(socket, 0o666); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- b.Serve(ctx, ln, func(uid uint32) Rights { return map[uint32]Rights{0: Everything, daemonUID: Renewals}[uid] })
	}()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	self := filepath.Join(open, "test") // where every user may run it
	text, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(self, text, 0o755); err != nil {
		t.Fatal(err)
	}
	for uid, want := range map[uint32]int{0: 0, daemonUID: 1, strangerUID: 2} {
		cmd := exec.Command(self)
		cmd.Env = append(os.Environ(), socketVar+"="+socket)
		cmd.Dir = "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		out, err := cmd.CombinedOutput()
		if got := cmd.ProcessState.ExitCode(); got != want {
			t.Errorf("user %d got %d, want %d: %v %s", uid, got, want, err, out)
		}
	}
}

func TestAStalledCallerStopsNobody(t *testing.T) {
	b := newBench(t)
	socket := b.path("s")
	ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: socket, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- b.Serve(ctx, ln, func(uint32) Rights { return Everything }) }()
	dial := func() net.Conn {
		c, err := net.Dial("unixpacket", socket)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	for range callers - 1 {
		defer dial().Close() // and says nothing
	}
	for _, packet := range [][]byte{[]byte("hello"), make([]byte, 2*maxPacket)} {
		c := dial()
		if _, err := c.Write(packet); err != nil {
			t.Fatal(err)
		}
		answer := make([]byte, maxPacket)
		c.SetReadDeadline(time.Now().Add(time.Minute))
		n, err := c.Read(answer)
		if err != nil || !strings.Contains(string(answer[:n]), `"code":"bad_request"`) {
			t.Errorf("%q %v", answer[:n], err)
		}
		c.Close()
	}
	c := NewClient(socket, func(uint32) bool { return true }, func() (*exec.Cmd, error) { return nil, errors.New("nobody listens") })
	if _, err := c.Enrol(context.Background(), "alice", "mac", false, time.Hour, csr(t, newKey(t), "alice")); err != nil {
		t.Error(err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// serveEverybody is a signer on a socket that every user of this host may connect to, until the test ends.
func serveEverybody(t *testing.T, rights func(uid uint32) Rights) (socket string) {
	t.Helper()
	b := newBench(t)
	dir, err := os.MkdirTemp("", "signer-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket = filepath.Join(dir, "s")
	ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: socket, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Chmod(dir, 0o755), os.Chmod(socket, 0o666)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- b.Serve(ctx, ln, rights) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return socket
}

func TestAnotherUsersConnectionsKeepRootFromNothing(t *testing.T) {
	socket := serveEverybody(t, func(uint32) Rights { return Everything })
	connected := make(chan struct{})
	var idle []net.Conn
	go func() {
		defer close(connected)
		runtime.LockOSThread() // and never unlocked: the thread is another user's now
		if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), 65534, ^uintptr(0)); e != 0 {
			t.Error(e)
			return
		}
		for range 2 * standing {
			if c, err := net.Dial("unixpacket", socket); err == nil {
				idle = append(idle, c)
			}
		}
	}()
	<-connected
	if len(idle) < callers {
		t.Fatalf("%d idle connections keep nobody waiting", len(idle))
	}
	c := NewClient(socket, func(uint32) bool { return true }, func() (*exec.Cmd, error) { return nil, errors.New("nobody listens") })
	if _, err := c.Enrol(context.Background(), "alice", "mac", false, time.Hour, csr(t, newKey(t), "alice")); err != nil {
		t.Error(err)
	}
	for _, c := range idle {
		c.Close()
	}
}

func TestStrangersKeepTheDaemonFromNothing(t *testing.T) {
	socket := serveEverybody(t, func(uid uint32) Rights {
		if uid == daemonUID {
			return Renewals
		}
		return Nothing
	})
	become := func(uid uintptr) {
		for _, id := range []uintptr{0, uid} { // by root, who alone may be anybody
			if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), id, ^uintptr(0)); e != 0 {
				t.Error(e)
			}
		}
	}
	asked := make(chan struct{})
	go func() {
		defer close(asked)
		runtime.LockOSThread() // and never unlocked: the thread is another user's now
		ask := func() error {
			c := NewClient(socket, func(uint32) bool { return true }, func() (*exec.Cmd, error) { return nil, errors.New("nobody listens") })
			return c.Forget(context.Background(), "alice", "")
		}
		become(strangerUID)
		wantCode(t, ask(), Forbidden)
		for i := range uintptr(2 * standing) { // each of them another
			become(100_000 + i)
			if c, err := net.Dial("unixpacket", socket); err == nil {
				defer c.Close()
			}
		}
		become(daemonUID)
		if err := ask(); err != nil {
			t.Error(err)
		}
	}()
	<-asked
}
