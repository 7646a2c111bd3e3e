//go:build linux

package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	namedSpaces = "/run/netns" // where `ip netns` binds namespaces
	ownEtc      = "/etc/netns" // where `ip netns exec` finds what to bind over /etc
)

// The bastion asks the cloud's DNS server; so do the others, to whom it does not answer unless there is a route. Names in
// hosts are for people; the order in nsswitch.conf is what both glibc and Go read.
var etcFiles = map[string]string{
	"resolv.conf":   "nameserver 198.19.1.2\noptions timeout:1 attempts:2\n",
	"nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
	"hosts": "127.0.0.1 localhost\n::1 localhost\n" +
		"198.18.1.1 bastion.test\n2001:db8:18:1::1 bastion.test\n198.18.1.2 client.test\n",
}

// ownGroups are those that the package makes. The first has the number that the daemon takes without it.
const ownGroups = "perimeterd:x:60194:\nperimeterd-audit:x:60195:\n"

// ReadersGroup is the second one's number.
const ReadersGroup = 60195

// Namespace is one host of a lab.
type Namespace struct {
	Name  string     // as `ip netns` lists it
	Addr  netip.Addr // on the outside segment; the cloud's, on the bastion's egress link
	Addr6 netip.Addr

	file  *os.File
	spawn chan func()   // runs on the thread that starts processes
	quit  chan struct{} // ends that thread
	ended chan struct{}

	mu       sync.Mutex
	commands map[*Cmd]struct{} // started and not yet reaped; nil once stopped
}

func newNamespace(ctx context.Context, name string) (*Namespace, error) {
	etc := filepath.Join(ownEtc, name)
	if err := os.MkdirAll(etc, 0o755); err != nil {
		return nil, err
	}
	groups, err := os.ReadFile("/etc/group")
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(etc, "group"), append(groups, ownGroups...), 0o644); err != nil {
		return nil, err
	}
	for file, text := range etcFiles {
		if err := os.WriteFile(filepath.Join(etc, file), []byte(text), 0o644); err != nil {
			return nil, err
		}
	}
	if out, err := exec.CommandContext(ctx, "ip", "netns", "add", name).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("ip netns add %s: %w: %s", name, err, out)
	}
	file, err := os.Open(filepath.Join(namedSpaces, name))
	if err != nil {
		return nil, err
	}
	ns := &Namespace{
		Name: name, file: file, commands: map[*Cmd]struct{}{},
		spawn: make(chan func()), quit: make(chan struct{}), ended: make(chan struct{}),
	}
	err = ns.startSpawner(etc)
	if err == nil {
		// Looking for duplicates of an address, link-local ones too, would hold it back for a second or two.
		err = ns.Sysctl("net.ipv6.conf.default.accept_dad", "0")
	}
	if err == nil {
		err = ns.ip(ctx, "link set lo up")
	}
	if err != nil {
		return nil, errors.Join(err, ns.stop(), file.Close())
	}
	return ns, nil
}

// Do runs fn inside the network namespace, on a thread that does nothing else and dies with it, so that no other
// goroutine ever finds itself inside. Sockets and files that fn opens stay inside wherever they are used later. It holds for
// fn's own goroutine only: goroutines that fn starts are outside. A panic and a t.Fatal in fn reach the caller.
func (n *Namespace) Do(fn func() error) error {
	o := onOwnThread(func() error {
		if err := n.enter(); err != nil {
			return err
		}
		return fn()
	})
	switch {
	case o.panicked != "":
		panic(o.panicked)
	case o.left:
		runtime.Goexit()
	}
	return o.err
}

func (n *Namespace) enter() error {
	conn, err := n.file.SyscallConn()
	if err != nil {
		return fmt.Errorf("enter %s: %w", n.Name, err)
	}
	var setErr error
	if err := conn.Control(func(fd uintptr) { setErr = unix.Setns(int(fd), unix.CLONE_NEWNET) }); err != nil {
		return fmt.Errorf("enter %s: %w", n.Name, err)
	}
	return os.NewSyscallError("setns "+n.Name, setErr)
}

type outcome struct {
	err      error
	panicked string // with its stack, which is lost when the panic goes on in another goroutine
	left     bool   // by runtime.Goexit
}

func onOwnThread(fn func() error) outcome {
	done := make(chan outcome, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// The process's first thread does not die, it would show /proc/PID/ns/net of the namespace for ever. While it
			// is held here, the next attempt lands on another.
			o := onOwnThread(fn)
			runtime.UnlockOSThread()
			done <- o
			return
		}
		o := outcome{left: true}
		defer func() {
			if r := recover(); r != nil {
				o.panicked = fmt.Sprintf("%v\n\n%s", r, debug.Stack())
			}
			done <- o
		}()
		o.err = fn()
		o.left = false
	}()
	return <-done
}

// Dial connects from inside; its signature fits http.Transport.DialContext. The address holds an IP, not a name, since Go's
// resolver works in goroutines of its own, which are outside.
func (n *Namespace) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	return n.DialFrom(ctx, netip.Addr{}, network, address)
}

// DialFrom is Dial from one of the namespace's addresses; the zero Addr leaves the choice to the route.
func (n *Namespace) DialFrom(ctx context.Context, from netip.Addr, network, address string) (c net.Conn, err error) {
	to, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil, fmt.Errorf("dial %q in %s: want IP:PORT: %w", address, n.Name, err)
	}
	var d net.Dialer
	if from.IsValid() {
		if strings.HasPrefix(network, "udp") {
			d.LocalAddr = net.UDPAddrFromAddrPort(netip.AddrPortFrom(from, 0))
		} else {
			d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))
		}
	}
	err = n.Do(func() (err error) {
		c, err = d.DialContext(ctx, network, to.String())
		return err
	})
	return c, err
}

// Listen listens inside; the address holds an IP or no host.
func (n *Namespace) Listen(network, address string) (l net.Listener, err error) {
	err = n.Do(func() (err error) {
		l, err = net.Listen(network, address)
		return err
	})
	return l, err
}

// ListenPacket is Listen for UDP, and for raw IP such as "ip4:icmp".
func (n *Namespace) ListenPacket(network, address string) (c net.PacketConn, err error) {
	err = n.Do(func() (err error) {
		c, err = net.ListenPacket(network, address)
		return err
	})
	return c, err
}

// Sysctl sets a kernel parameter of this namespace, such as net.ipv4.tcp_rmem.
func (n *Namespace) Sysctl(key, value string) error {
	return n.Do(func() error {
		return os.WriteFile("/proc/sys/"+strings.ReplaceAll(key, ".", "/"), []byte(value), 0)
	})
}

// AddAddress gives one of the namespace's interfaces a further address.
func (n *Namespace) AddAddress(ctx context.Context, dev string, p netip.Prefix) error {
	return n.ip(ctx, fmt.Sprintf("addr replace %v dev %s", p, dev))
}

// ip runs a script of `ip` commands inside, one a line.
func (n *Namespace) ip(ctx context.Context, script string) error {
	cmd := exec.CommandContext(ctx, "ip", "-n", n.Name, "-batch", "-")
	cmd.Stdin = strings.NewReader(script)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("ip in %s: %w: %s(of the script:\n%s)", n.Name, err, out, script)
	}
	return nil
}

// awaitAddresses returns when no IPv6 address is tentative any more. Even with nodad the kernel takes the flag off in a
// work queue of its own, and until then nobody can bind to the address.
func (n *Namespace) awaitAddresses(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	for {
		var table []byte
		if err := n.Do(func() (err error) {
			table, err = os.ReadFile("/proc/thread-self/net/if_inet6")
			return err
		}); err != nil {
			return err
		}
		// Address, index, prefix length, scope, flags, device; link-local ones (scope 20) are the kernel's own business.
		tentative := false
		for line := range strings.Lines(string(table)) {
			if f := strings.Fields(line); len(f) == 6 && f[3] == "00" {
				flags, err := strconv.ParseUint(f[4], 16, 32)
				tentative = tentative || err != nil || flags&unix.IFA_F_TENTATIVE != 0
			}
		}
		if !tentative {
			return nil
		}
		select {
		case <-time.After(time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("namespace %s: IPv6 addresses stay tentative: %w\n%s", n.Name, ctx.Err(), table)
		}
	}
}
