package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/vishvananda/netlink"
	"golang.zx2c4.com/wireguard/tun"

	"perimeterd/vpn/client"
	"perimeterd/vpn/client/clienttest"
)

// roleVariable makes the test binary play another part: in a network namespace there is one process for each.
const roleVariable = "PERIMETER_TEST_ROLE"

// binVariable says where the commands lie that TestMain built.
const binVariable = "PERIMETER_TEST_BIN"

// built runs the tests with the commands, which are built once.
type built struct{ *testing.M }

func (b built) Run() int {
	dir, err := os.MkdirTemp("", "vpn-test-")
	if err == nil {
		defer os.RemoveAll(dir)
		err = os.Chmod(dir, 0o755) // another user runs them too
	}
	if err == nil {
		build := exec.Command("go", "build", "-o", dir+"/", "perimeterd/cmd/vpn", "perimeterd/cmd/knock")
		build.Env = append(os.Environ(), "CGO_ENABLED=0") // as packaged: it starts a millisecond sooner
		build.Stderr = os.Stderr
		err = build.Run()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "building the commands:", err)
		return 1
	}
	os.Setenv(binVariable, dir)
	return b.M.Run()
}

// Addresses of the two ends.
const (
	gateOuter   = "198.18.77.1"
	clientOuter = "198.18.77.2"
)

// door lets a source in that has sent a 16-byte datagram to the tunnel's port, or three packets in order.
const door = `table inet door {
  set open { type ipv4_addr; flags dynamic,timeout; timeout 60s; }
  set one { type ipv4_addr; flags dynamic,timeout; timeout 10s; }
  set two { type ipv4_addr; flags dynamic,timeout; timeout 10s; }
  chain token { udp dport 1194 udp length 24 add @open { ip saddr } drop; }
  chain input {
    type filter hook input priority 0; policy drop;
    iif lo accept
    iifname "pvpn*" accept
    ct state established accept
    icmp type echo-request accept
    jump token
    tcp dport 7102 add @one { ip saddr } drop
    udp dport 19044 ip saddr @one add @two { ip saddr } drop
    tcp dport 33127 ip saddr @two add @open { ip saddr } drop
    ip saddr @open tcp dport 1194 accept
    ip saddr @open udp dport 1194 accept
  }
}
`

func playRole(role string) {
	if err := playGate(role); err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
}

// playGate is the gate's process: it prints profiles' ends, then obeys lines on its standard input.
func playGate(dir string) error {
	g, err := clienttest.NewGate()
	if err != nil {
		return err
	}
	p, err := g.Profile("alice", gateOuter+":1194", 1194, time.Hour, "7102", "19044/udp", "33127")
	if err != nil {
		return err
	}
	text, err := toml.Marshal(p)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "sent"), text, 0o600); err != nil {
		return err
	}
	in := bufio.NewScanner(os.Stdin)
	fmt.Println("made")
	in.Scan() // the network is there
	t, err := tun.CreateTUN("pvpn0", 1400)
	if err != nil {
		return err
	}
	link, err := netlink.LinkByName("pvpn0")
	if err != nil {
		return err
	}
	addr, err := netlink.ParseAddr("10.77.0.1/16")
	if err != nil {
		return err
	}
	if err := errors.Join(netlink.AddrAdd(link, addr), netlink.LinkSetUp(link)); err != nil {
		return err
	}
	l, err := net.Listen("tcp", ":1194")
	if err != nil {
		return err
	}
	proxy, err := net.Listen("tcp", "10.77.0.1:3128")
	if err != nil {
		return err
	}
	go http.Serve(proxy, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%s %s for %s\n", r.Method, r.URL, r.RemoteAddr)
	}))
	g.Endpoint = gateOuter + ":1194"
	ended := make(chan error, 1)
	go func() { ended <- g.Serve(context.Background(), l, t, "1194") }()
	fmt.Println("serving")
	for in.Scan() {
		g.Lock()
		switch in.Text() {
		case "counts":
			withInitiation := 0
			for _, r := range g.Requests {
				if len(r.Initiation) > 0 {
					withInitiation++
				}
			}
			fmt.Printf("requests=%d initiations=%d ended=%d connections=%d\n", len(g.Requests), withInitiation, len(g.Ended), g.Connections)
		case "forget":
			g.Forget()
			fmt.Println("ok")
		case "brief":
			g.Life = 4 * time.Second
			fmt.Println("ok")
		case "lasting":
			g.Life = time.Hour
			fmt.Println("ok")
		case "refuse":
			g.RefuseCert = true
			fmt.Println("ok")
		}
		g.Unlock()
	}
	return nil
}

// world is a client's and a gate's network namespace, gone with the processes in them.
type world struct {
	*testing.T
	gatePID, clientPID int
	ask                func(string) string
	bin, config        string
}

func newWorld(t *testing.T) *world {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("network namespaces and tunnel devices need root: run the tests as root")
	}
	w := &world{T: t, bin: os.Getenv(binVariable), config: t.TempDir()}
	start := func(cmd *exec.Cmd) int {
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
		started, ended := make(chan error), make(chan struct{})
		go func() {
			runtime.LockOSThread() // Pdeathsig is the thread's, and a test may end one
			defer runtime.UnlockOSThread()
			defer close(ended)
			err := cmd.Start()
			if started <- err; err == nil {
				cmd.Wait()
			}
		}()
		if err := <-started; err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cmd.Process.Kill(); <-ended })
		return cmd.Process.Pid
	}
	w.clientPID = start(exec.Command("sleep", "600"))
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	gate := exec.Command(self)
	gate.Env = append(os.Environ(), roleVariable+"="+w.config)
	in, _ := gate.StdinPipe()
	out, _ := gate.StdoutPipe()
	gate.Stderr = os.Stderr
	w.gatePID = start(gate)
	lines := bufio.NewScanner(out)
	read := func() string { lines.Scan(); return lines.Text() }
	w.ask = func(s string) string { io.WriteString(in, s+"\n"); return read() }
	if got := read(); got != "made" {
		t.Fatal(got)
	}
	w.must("ip", "link", "add", "gt0", "netns", fmt.Sprint(w.gatePID), "type", "veth", "peer", "name", "cl0", "netns", fmt.Sprint(w.clientPID))
	for _, end := range []struct {
		pid       int
		dev, addr string
	}{{w.gatePID, "gt0", gateOuter}, {w.clientPID, "cl0", clientOuter}} {
		w.in(end.pid, "ip", "addr", "add", end.addr+"/24", "dev", end.dev)
		w.in(end.pid, "ip", "link", "set", end.dev, "up")
		w.in(end.pid, "ip", "link", "set", "lo", "up")
	}
	nft := exec.Command("nsenter", "-t", fmt.Sprint(w.gatePID), "-n", "nft", "-f", "-")
	nft.Stdin = strings.NewReader(door)
	if out, err := nft.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if got := w.ask("network"); got != "serving" {
		t.Fatal(got)
	}
	w.vpn(0, "import", w.config+"/sent")
	t.Cleanup(func() { w.command("vpn", "down").Run() })
	return w
}

func (w *world) must(name string, args ...string) string {
	w.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		w.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return string(out)
}

func (w *world) in(pid int, args ...string) string {
	w.Helper()
	return w.must("nsenter", append([]string{"-t", fmt.Sprint(pid), "-n"}, args...)...)
}

// command is one of ours, in the client's namespace.
func (w *world) command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command("nsenter", append([]string{"-t", fmt.Sprint(w.clientPID), "-n", filepath.Join(w.bin, name)}, args...)...)
	cmd.Env = append(os.Environ(), "XDG_CONFIG_HOME="+w.config, "XDG_RUNTIME_DIR="+w.config+"/run")
	return cmd
}

// run checks the exit status and returns what was said.
func (w *world) run(status int, name string, args ...string) (stdout, stderr string) {
	w.Helper()
	cmd := w.command(name, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if got := cmd.ProcessState.ExitCode(); got != status {
		w.Fatalf("%s %v: %v, want status %d\n%s%s", name, args, err, status, out.String(), errs.String())
	}
	return out.String(), errs.String()
}

func (w *world) vpn(status int, args ...string) (stdout, stderr string) {
	w.Helper()
	return w.run(status, "vpn", args...)
}

func (w *world) status() (s client.Status) {
	w.Helper()
	cmd := w.command("vpn", "status", "--json")
	out, _ := cmd.Output()
	if err := json.Unmarshal(out, &s); err != nil {
		w.Fatalf("status: %v\n%s", err, out)
	}
	return s
}

// eventually asks until the answer is right.
func (w *world) eventually(within time.Duration, what string, ok func() bool) {
	w.Helper()
	for end := time.Now().Add(within); !ok(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			w.Fatalf("not in %v: %s\nstatus %+v", within, what, w.status())
		}
	}
}

func (w *world) log() string {
	w.Helper()
	files, _ := filepath.Glob(w.config + "/perimeter/*.log")
	if len(files) != 1 {
		w.Fatalf("logs: %v", files)
	}
	text, err := os.ReadFile(files[0])
	if err != nil {
		w.Fatal(err)
	}
	return string(text)
}

func (w *world) links() string { return w.in(w.clientPID, "ip", "-br", "link", "show") }

// throughProxy is a request that only the tunnel can answer.
func (w *world) throughProxy() (string, error) {
	out, err := exec.Command("nsenter", "-t", fmt.Sprint(w.clientPID), "-n", "curl", "-sS", "-m", "3",
		"-x", "http://10.77.0.1:3128", "http://origin.test/").CombinedOutput()
	return string(out), err
}
