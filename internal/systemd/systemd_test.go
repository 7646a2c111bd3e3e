package systemd

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// systemdEnd is the socket that a service manager reads.
func systemdEnd(t *testing.T) *net.UnixConn {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	return c
}

// hear is the next message, and the descriptors that came with it.
func hear(t *testing.T, c *net.UnixConn) (string, []int) {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(30 * time.Second))
	b, oob := make([]byte, 4096), make([]byte, 1024)
	n, on, _, _, err := c.ReadMsgUnix(b, oob)
	if err != nil {
		t.Fatal(err)
	}
	var fds []int
	controls, err := unix.ParseSocketControlMessage(oob[:on])
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range controls {
		more, err := unix.ParseUnixRights(&m)
		if err != nil {
			t.Fatal(err)
		}
		fds = append(fds, more...)
	}
	return string(b[:n]), fds
}

func TestManagerHearsOfReadyReloadStatusAndStop(t *testing.T) {
	end := systemdEnd(t)
	m, err := Connect()
	if err != nil {
		t.Fatal(err)
	}
	if s := os.Getenv("NOTIFY_SOCKET"); s != "" {
		t.Errorf("children would inherit NOTIFY_SOCKET=%s", s)
	}
	for _, step := range []struct {
		say  func() error
		want string
	}{
		{m.Ready, "READY=1"},
		{func() error { return m.Status("two\nlines") }, "STATUS=two lines"},
		{m.Stopping, "STOPPING=1\nSTATUS=stopping"},
	} {
		if err := step.say(); err != nil {
			t.Fatal(err)
		}
		if got, _ := hear(t, end); got != step.want {
			t.Errorf("said %q, want %q", got, step.want)
		}
	}
	var before, after unix.Timespec
	unix.ClockGettime(unix.CLOCK_MONOTONIC, &before)
	if err := m.Reloading(); err != nil {
		t.Fatal(err)
	}
	unix.ClockGettime(unix.CLOCK_MONOTONIC, &after)
	got, _ := hear(t, end)
	usec, ok := strings.CutPrefix(got, "RELOADING=1\nMONOTONIC_USEC=")
	d, err := time.ParseDuration(usec + "us")
	if !ok || err != nil || d < time.Duration(before.Nano()/1000*1000) || d > time.Duration(after.Nano()) {
		t.Errorf("said %q between %d and %d", got, before.Nano(), after.Nano())
	}
}

func TestWithoutAManagerNothingHappens(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	m, err := Connect()
	if err != nil {
		t.Fatal(err)
	}
	opened := 0
	l, err := m.Listen("a", "127.0.0.1:0", nil, func() (net.Listener, error) { opened++; return net.Listen("tcp", "127.0.0.1:0") })
	if err != nil || opened != 1 {
		t.Fatal(opened, err)
	}
	defer l.Close()
	names, swept := m.Sweep()
	if err := errors.Join(m.Ready(), m.Reloading(), m.Status("x"), m.Stopping(), swept); err != nil || m.Stores() || len(names) > 0 {
		t.Error(err, m.Stores(), names)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := m.Watch(ctx, slog.Default(), func() string { t.Error("asked for a status"); return "" }); err != nil {
		t.Error(err)
	}
	if err := (*Manager)(nil).Ready(); err != nil {
		t.Error(err)
	}
}

func TestWrongEnvironmentIsNamed(t *testing.T) {
	systemdEnd(t)
	for _, v := range []string{"never", "-1", "0"} {
		t.Setenv("NOTIFY_SOCKET", os.Getenv("NOTIFY_SOCKET"))
		path := os.Getenv("NOTIFY_SOCKET")
		t.Setenv("WATCHDOG_USEC", v)
		if _, err := Connect(); err == nil || !strings.Contains(err.Error(), v) {
			t.Errorf("WATCHDOG_USEC=%s: %v", v, err)
		}
		os.Setenv("NOTIFY_SOCKET", path)
	}
	t.Setenv("NOTIFY_SOCKET", "/nowhere/notify")
	if _, err := Connect(); err == nil || !strings.Contains(err.Error(), "/nowhere/notify") {
		t.Errorf("no socket: %v", err)
	}
}

// The ping comes while everybody accepts, stays out while one does not, and comes again.
func TestWatchdogHearsNothingOfADaemonWithAWedgedPart(t *testing.T) {
	end := systemdEnd(t)
	t.Setenv("WATCHDOG_USEC", "400000")
	m, err := Connect()
	if err != nil {
		t.Fatal(err)
	}
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := NewAccepting(inner)
	defer l.Close()
	pause, paused := make(chan chan struct{}), make(chan struct{})
	got := make(chan net.Conn, 100)
	go func() {
		for {
			select {
			case resume := <-pause:
				paused <- struct{}{}
				<-resume
			default:
			}
			c, err := l.Accept()
			if err != nil {
				return
			}
			got <- c
		}
	}()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	var log strings.Builder
	go func() {
		ended <- m.Watch(ctx, slog.New(slog.NewTextHandler(&log, nil)), func() string { return "well" }, Part{"listener", l.Alive}, Part{"another", func(context.Context) error { return nil }})
	}()
	if got, _ := hear(t, end); got != "STATUS=well" {
		t.Errorf("first %q", got)
	}
	for range 3 {
		if got, _ := hear(t, end); got != "WATCHDOG=1" {
			t.Errorf("heard %q", got)
		}
	}
	// While it is woken again and again, nobody who connects is lost.
	connect := func() {
		c, err := net.Dial("tcp", inner.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
		(<-got).Close()
	}
	for range 50 {
		connect()
	}
	resume := make(chan struct{})
	go func() { pause <- resume }()
	for wedged := false; !wedged; {
		c, err := net.Dial("tcp", inner.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
		(<-got).Close()
		select {
		case <-paused:
			wedged = true
		case <-time.After(10 * time.Millisecond):
		}
	}
	// What was said before the wedge is heard; then there is silence for longer than the manager would wait.
	silent := func() bool {
		end.SetReadDeadline(time.Now().Add(800 * time.Millisecond))
		_, err := end.Read(make([]byte, 100))
		return errors.Is(err, os.ErrDeadlineExceeded)
	}
	for n := 0; !silent(); n++ {
		if n > 3 {
			t.Fatal("pings go on although nobody accepts")
		}
	}
	close(resume)
	if got, _ := hear(t, end); got != "WATCHDOG=1" {
		t.Errorf("heard %q", got)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if s := log.String(); !strings.Contains(s, "listener: does not answer") || strings.Contains(s, "another:") || !strings.Contains(s, "alive again") {
		t.Errorf("logged %s", s)
	}
}

// stored runs this test again as a service that was started with these descriptors; want is its output.
func stored(t *testing.T, address string, keep []*os.File, names ...string) (said string, fds []int) {
	t.Helper()
	end := systemdEnd(t)
	c := exec.Command("/bin/sh", "-c", `LISTEN_PID=$$ exec "$@"`, "sh", "/proc/self/exe", "-test.run=^TestServiceProcess$")
	c.Args[4] = must(os.Executable())
	c.Env = append(os.Environ(), "SERVICE_ADDRESS="+address, "LISTEN_FDS="+string(rune('0'+len(keep))), "LISTEN_FDNAMES="+strings.Join(names, ":"))
	c.ExtraFiles = keep
	out, err := c.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	line, _, _ := strings.Cut(string(out), "\n")
	for {
		m, more := hear(t, end)
		fds = append(fds, more...)
		line += "|" + strings.ReplaceAll(m, "\n", " ")
		if m == "READY=1" {
			return line, fds
		}
	}
}

func must(s string, err error) string {
	if err != nil {
		panic(err)
	}
	return s
}

// TestServiceProcess is the service, where it is started as one.
func TestServiceProcess(t *testing.T) {
	address := os.Getenv("SERVICE_ADDRESS")
	if address == "" {
		return // the others start it
	}
	m, err := Connect()
	if err != nil {
		t.Fatal(err)
	}
	adopted := 0
	l, err := m.Listen("door", address, func(f *os.File) (net.Listener, error) { adopted++; return net.FileListener(f) }, func() (net.Listener, error) { return net.Listen("tcp", address) })
	if err != nil {
		t.Fatal(err)
	}
	left, err := m.Sweep()
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(left)
	done := make(chan struct{})
	go func() { // a stored listener that came blocking would hang here for ever
		a := NewAccepting(l)
		go func() {
			for {
				if _, err := a.Accept(); err != nil {
					return
				}
			}
		}()
		a.Alive(context.Background())
		a.Close()
		close(done)
	}()
	<-done
	os.Stdout.WriteString("adopted " + string(rune('0'+adopted)) + " left " + strings.Join(left, ",") + " env " + os.Getenv("LISTEN_FDS") + "\n")
	if err := m.Ready(); err != nil {
		t.Fatal(err)
	}
}

func TestStoredListenerIsTakenUpAgainAndAnotherIsNot(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	name := "door=" + strings.ReplaceAll(address, ":", ";")
	said, fds := stored(t, address, nil)
	if want := "adopted 0 left  env |FDSTORE=1 FDPOLL=0 FDNAME=" + name + "|READY=1"; said != want || len(fds) != 1 {
		t.Fatalf("at first it said %q with %d descriptors, want %q", said, len(fds), want)
	}
	kept := os.NewFile(uintptr(fds[0]), "kept")
	defer kept.Close()
	// Nobody runs, and who connects waits.
	waiting, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer waiting.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	said, fds = stored(t, address, []*os.File{kept, null, null}, name, "door=of;earlier", name)
	if want := "adopted 1 left door=of;earlier env |FDSTOREREMOVE=1 FDNAME=door=of;earlier|READY=1"; said != want || len(fds) != 0 {
		t.Errorf("then it said %q with %d descriptors, want %q", said, len(fds), want)
	}
	// What is no listener is dropped, and one opened.
	kept.Close()
	said, fds = stored(t, address, []*os.File{null}, name)
	if want := "adopted 0 left  env |FDSTOREREMOVE=1 FDNAME=" + name + "|FDSTORE=1 FDPOLL=0 FDNAME=" + name + "|READY=1"; said != want || len(fds) != 1 {
		t.Errorf("without a listener it said %q with %d descriptors, want %q", said, len(fds), want)
	}
	for _, fd := range fds {
		unix.Close(fd)
	}
}

func TestNamesThatTheManagerWouldNotTake(t *testing.T) {
	systemdEnd(t)
	m, err := Connect()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"", "a:b", "a\nFDSTORE=1", "ä", strings.Repeat("a", 256)} {
		if err := m.Store(name, os.Stderr); err == nil {
			t.Errorf("%q was stored", name)
		}
	}
}
