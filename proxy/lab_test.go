package proxy

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	"perimeterd/internal/session"
)

// The tests run in a network namespace of their own: this process is the bastion and its clients (10.77.0.0/16 on lo). A
// second namespace behind a veth is the outside: 198.18.0.2 and .3, a public address, a private one and a metadata
// service. So nothing here is simulated but the sessions.
const (
	outsideHost   = "198.18.0.2"
	outsideSecond = "198.18.0.3"
	silentHost    = "198.18.0.77" // nobody answers for it
	publicHost    = "11.22.33.44"
	privateHost   = "192.168.50.5"
	metadataHost  = "169.254.169.254"
	bastion       = "10.77.0.1"
)

const inLab = "PROXY_TEST_IN_NAMESPACE"

func TestMain(m *testing.M) {
	if os.Getenv(inLab) == "" {
		os.Exit(again())
	}
	if slices.Contains(os.Args, "-test.fuzzworker") { // its coordinator is in the lab already, and it needs no network
		os.Exit(m.Run())
	}
	if err := layCables(); err != nil {
		fmt.Fprintln(os.Stderr, "cannot build the test network:", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// again runs this test binary in new namespaces.
func again() int {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), inLab+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if os.Getuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
	}
	runtime.LockOSThread() // Pdeathsig is the thread's
	err := cmd.Run()
	if cmd.ProcessState != nil && cmd.ProcessState.ExitCode() >= 0 {
		return cmd.ProcessState.ExitCode()
	}
	fmt.Fprintln(os.Stderr, "cannot run the tests in a network namespace:", err)
	return 1
}

func ip(args string) error {
	out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("ip %s: %w: %s", args, err, out)
	}
	return nil
}

// outside runs fn on a thread in the outer namespace; sockets made there stay there.
var outside func(fn func())

func layCables() error {
	jobs, ready := make(chan func()), make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread dies with the goroutine
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			ready <- err
			return
		}
		ready <- nil
		for fn := range jobs {
			fn()
		}
	}()
	if err := <-ready; err != nil {
		return err
	}
	outside = func(fn func()) {
		done := make(chan struct{})
		jobs <- func() { defer close(done); fn() }
		<-done
	}
	var tid int
	outside(func() { tid = unix.Gettid() })
	var err error
	run := func(lines ...string) {
		for _, l := range lines {
			if err == nil {
				err = ip(l)
			}
		}
	}
	run("link set lo up", "addr add 10.77.0.1/16 dev lo", "addr add 10.77.0.2/16 dev lo", "addr add 10.77.0.3/16 dev lo",
		"link add inner type veth peer name outer", fmt.Sprintf("link set outer netns %d", tid),
		"link set inner up", "addr add 198.18.0.1/24 dev inner", "addr add 198.18.0.9/24 dev inner",
		"addr add 2001:db8:18::1/64 dev inner nodad")
	outside(func() {
		run("link set lo up", "link set outer up", "addr add 198.18.0.2/24 dev outer", "addr add 198.18.0.3/24 dev outer",
			"addr add 2001:db8:18::2/64 dev outer nodad",
			"addr add "+publicHost+"/32 dev outer", "addr add "+privateHost+"/32 dev outer", "addr add "+metadataHost+"/32 dev outer")
	})
	run("route add "+publicHost+" via 198.18.0.2", "route add "+privateHost+" via 198.18.0.2", "route add "+metadataHost+" via 198.18.0.2")
	return err
}

// listenOutside opens a listener in the outer namespace.
func listenOutside(t testing.TB, addr string) *net.TCPListener {
	t.Helper()
	var l net.Listener
	var err error
	lc := net.ListenConfig{}
	lc.SetMultipathTCP(false)
	outside(func() { l, err = lc.Listen(context.Background(), "tcp", addr) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l.(*net.TCPListener)
}

// serveOutside runs fn for each connection.
func serveOutside(t testing.TB, addr string, fn func(*net.TCPConn)) netip.AddrPort {
	l := listenOutside(t, addr)
	go func() {
		for {
			c, err := l.AcceptTCP()
			if err != nil {
				return
			}
			go func() { defer c.Close(); fn(c) }()
		}
	}()
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// people is a Sessions that tests change.
type people struct {
	mu sync.Mutex
	by map[netip.Addr]session.Session
}

func (p *people) ByAddress(a netip.Addr) (session.Session, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s, ok := p.by[a]
	return s, ok
}

func (p *people) put(addr, user string, groups ...string) session.Session {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := session.Session{ID: session.NewID(), User: user, Device: "laptop", Groups: groups, Address: netip.MustParseAddr(addr)}
	p.by[s.Address] = s
	return s
}

func (p *people) drop(addr string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.by, netip.MustParseAddr(addr))
}

// lab is a running proxy.
type lab struct {
	*Server
	t      testing.TB
	addr   string
	people *people
	alice  session.Session // 10.77.0.2, group operators
	stop   func()
	mu     sync.Mutex
	text   bytes.Buffer
	seen   chan Access
}

func (l *lab) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

func (l *lab) logged() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// zone is what the lab's name server knows. Each question for a name takes the next answer, the last stays.
var zone = map[string][][]string{
	"www.lab.test.":     {{outsideHost}},
	"mixed.lab.test.":   {{privateHost, outsideHost}},
	"private.lab.test.": {{privateHost}},
	"meta.lab.test.":    {{metadataHost}},
	"self.lab.test.":    {{"198.18.0.1"}},
	"public.lab.test.":  {{publicHost}},
	"slow.lab.test.":    {{silentHost, outsideHost}},
	"rebind.lab.test.":  {{outsideHost}, {metadataHost}},
	"denied.lab.test.":  {{outsideSecond}},
	"silent.lab.test.":  {{silentHost}},
}

// startNames answers DNS on loopback, and returns the way there.
func startNames(t testing.TB) func(ctx context.Context, network, address string) (net.Conn, error) {
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { pc.Close() })
	asked := map[string]int{}
	go func() {
		b := make([]byte, 1500)
		for {
			n, from, err := pc.ReadFrom(b)
			if err != nil {
				return
			}
			var m dnsmessage.Message
			if m.Unpack(b[:n]) != nil || len(m.Questions) != 1 {
				continue
			}
			q := m.Questions[0]
			m.Response, m.Additionals = true, nil
			m.RCode = dnsmessage.RCodeNameError
			if answers := zone[q.Name.String()]; answers != nil {
				m.RCode = dnsmessage.RCodeSuccess
				if q.Type == dnsmessage.TypeA {
					now := answers[min(asked[q.Name.String()], len(answers)-1)]
					asked[q.Name.String()]++
					for _, a := range now {
						m.Answers = append(m.Answers, dnsmessage.Resource{
							Header: dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class},
							Body:   &dnsmessage.AResource{A: netip.MustParseAddr(a).As4()},
						})
					}
				}
			}
			if out, err := m.Pack(); err == nil {
				pc.WriteTo(out, from)
			}
		}
	}()
	return func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "udp", pc.LocalAddr().String())
	}
}

// openConfig allows operators the lab's outside without a look at TLS.
func openConfig() Config {
	return Config{
		Listen: netip.MustParseAddrPort(bastion + ":3128"),
		Rules: []Rule{{
			Allow: []string{"*.lab.test", "198.18.0.0/24", publicHost, "192.168.50.0/24", "169.254.0.0/16", "10.77.0.0/16"}, Groups: []string{"operators"},
			Ports: allPorts(),
		}},
		AllowPrivate: []netip.Prefix{netip.MustParsePrefix("198.18.0.0/24")},
		Idle:         time.Minute, Lifetime: time.Hour, Connections: 4096, PerUserConnections: 512,
	}
}

func allPorts() (all []uint16) {
	for p := 1; p < 1<<16; p++ {
		all = append(all, uint16(p))
	}
	return all
}

func startLab(t testing.TB, cfg Config) *lab {
	t.Helper()
	l := newLab(t, cfg)
	l.Watch(func(a Access) {
		select {
		case l.seen <- a:
		default:
		}
	})
	l.run()
	return l
}

// newLab makes a proxy that does not run yet.
func newLab(t testing.TB, cfg Config) *lab {
	t.Helper()
	l := &lab{t: t, people: &people{by: map[netip.Addr]session.Session{}}, seen: make(chan Access, 10000)}
	l.alice = l.people.put("10.77.0.2", "alice", "operators")
	l.people.put("10.77.0.3", "bob", "readers")
	s, err := New(cfg, l.people, slog.New(slog.NewJSONHandler(l, nil)))
	if err != nil {
		t.Fatal(err)
	}
	l.Server = s
	s.dialer.names.dial = startNames(t)
	return l
}

func (l *lab) run() {
	l.t.Helper()
	t := l.t
	ln, err := Listen(context.Background(), netip.MustParseAddrPort(bastion+":0"))
	if err != nil {
		t.Fatal(err)
	}
	l.addr = ln.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx, ln) }()
	l.stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(15 * time.Second):
			t.Error("Run did not return")
		}
	})
	t.Cleanup(l.stop)
}

// from dials the proxy from a tunnel address.
func (l *lab) from(addr string) *net.TCPConn {
	l.t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(addr)}, Timeout: 5 * time.Second}
	d.SetMultipathTCP(false)
	c, err := d.Dial("tcp", l.addr)
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(20 * time.Second))
	return c.(*net.TCPConn)
}

// eventually waits for what must become true.
func eventually(t testing.TB, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(15 * time.Second); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not in 15 seconds: %s", what)
		}
	}
}

// next is the next request that was logged.
func (l *lab) next() Access {
	l.t.Helper()
	select {
	case a := <-l.seen:
		return a
	case <-time.After(15 * time.Second):
		l.t.Fatalf("nothing was logged; so far: %s", l.logged())
		return Access{}
	}
}

// lines parses the log.
func (l *lab) lines() (lines []map[string]any) {
	for line := range strings.Lines(l.logged()) {
		var m map[string]any
		if err := json.Unmarshal([]byte(line), &m); err != nil {
			l.t.Fatalf("log line %q: %v", line, err)
		}
		lines = append(lines, m)
	}
	return lines
}
