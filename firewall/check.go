package firewall

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"perimeterd/knock"
)

// Ability is something that the kernel must be able to do, tried by doing it.
type Ability struct {
	Name string
	Text string // what was seen, where all is well
	Err  error  // what is missing, what follows from it and the way out
}

// CheckKernel builds the table of cfg in a network namespace of its own, which nothing else is in, sends itself knocks and
// connections as if from outside, and says what the kernel made of each. It takes root and a second or two; nothing is
// left of it. What a missing ability keeps from being tried is not in the list.
func CheckKernel(ctx context.Context, cfg Config) (list []Ability) {
	if os.Geteuid() != 0 {
		return []Ability{{Name: "its part", Err: errors.New("not tried: that takes root: run it with sudo")}}
	}
	alone(func() {
		b := &bench{}
		defer b.close()
		for _, t := range b.trials() {
			text, err := t.run(ctx)
			if err != nil {
				err = fmt.Errorf("%w: %s", err, t.lacking)
			}
			list = append(list, Ability{t.name, text, err})
			if err != nil && t.needed || ctx.Err() != nil {
				return
			}
			if t.name == "network namespace" && err == nil {
				b.cfg = b.private(cfg)
			}
		}
	})
	return list
}

// alone runs fn on a thread that dies with it, so that nobody else ever finds himself in its namespace.
func alone(fn func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// The first thread never dies. While it is held here, the next attempt lands on another.
			alone(fn)
			runtime.UnlockOSThread()
			return
		}
		fn()
	}()
	<-done
}

type trial struct {
	name    string
	needed  bool // nothing behind it can be tried without
	lacking string
	run     func(context.Context) (string, error)
}

// bench is the private namespace with what the trials made in it.
type bench struct {
	cfg      Config
	plain    bool // do not own the table, for who must edit it
	netns    int
	tun      *testTUN
	fw       *Firewall
	gate     *net.TCPListener
	openings chan Opening
	stop     context.CancelFunc
	observed chan error
	conn     *tcpPeer // of a source with a window, established
}

// patience is how long a busy machine may take for what a free one does at once.
const patience = 3 * time.Second

// benchWindow is long enough for what follows an opening, and short enough to see it end.
const benchWindow = 600 * time.Millisecond

// private is cfg with what would take long, or must be known, replaced.
func (b *bench) private(cfg Config) Config {
	cfg.Window, cfg.GID, cfg.Trusted = benchWindow, 65534, nil
	seq := knock.Sequence{Name: "check", Ports: []knock.Port{{Proto: knock.TCP, Number: 7102}, {Proto: knock.UDP, Number: 19044}, {Proto: knock.TCP, Number: 33127}}, Timeout: knock.DefaultTimeout}
	if len(cfg.Sequences) > 0 {
		seq = cfg.Sequences[0]
	}
	seq.Credential = 9
	cfg.Sequences = []knock.Sequence{seq}
	return cfg
}

func (b *bench) close() {
	if b.stop != nil {
		b.stop()
		<-b.observed
	}
	if b.gate != nil {
		b.gate.Close()
	}
	if b.fw != nil {
		b.fw.mu.Lock()
		b.fw.dropLocked()
		b.fw.mu.Unlock()
	}
	if b.tun != nil {
		unix.Close(b.tun.fd)
	}
	if b.netns > 0 {
		unix.Close(b.netns)
	}
}

const noTable = "without it no knock can be judged and the daemon does not start: take a kernel of 6.1 or newer with nf_tables (Debian's has it; `modprobe nf_tables`)"

func (b *bench) trials() []trial {
	const open = "the door would not keep: do not run the daemon on this kernel, and report it"
	return []trial{
		{"network namespace", true, "the rest cannot be tried; run it as root, in a container with CAP_SYS_ADMIN and CAP_NET_ADMIN", b.enter},
		{"TUN device", true, "without it there is no tunnel: `modprobe tun`; in a container pass the device /dev/net/tun", b.openTUN},
		{"TUN offload", false, "the tunnel does not start without it: take a kernel of 6.1 or newer", b.offload},
		{"interlock", false, "the gate would be open whenever another tool flushes the ruleset: take a kernel with classic socket filters", b.interlock},
		{"nftables table", true, noTable, b.apply},
		{"log of openings", true, "windows would open with nobody told: `modprobe nfnetlink_log`, or another knock.log_group", b.observe},
		{"silence without a window", false, open, b.silent},
		{"token knock", true, noTable, b.token},
		{"replayed token", false, open, b.replay},
		{"wrong token", false, open, b.wrong},
		{"gate with a window", false, "nobody could come in: `modprobe nf_conntrack`, or take a kernel of 6.1 or newer", b.accept},
		{"knock sequence", false, noTable, b.sequence},
		{"wrong order", false, open, b.disorder},
		{"window's end", false, "windows would stay open: take a kernel of 6.1 or newer", b.expiry},
		{"established connections", false, "sessions would end with the window: `modprobe nf_conntrack`", b.established},
		{"IPv6 knock", false, "clients that come over IPv6 stay outside: enable IPv6, or publish no AAAA record for the endpoint", b.token6},
		{"ownership", false, "another tool could take the table away while the daemon believes it safe", b.ownership},
		{"IP_BIND_ADDRESS_NO_PORT", false, "with egress.bind the host runs out of ports at 28,000 connections: take a kernel of 4.2 or newer", b.bindNoPort},
	}
}

func (b *bench) enter(context.Context) (string, error) {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return "", fmt.Errorf("unshare: %w", err)
	}
	fd, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("/proc/thread-self/ns/net: %w", err)
	}
	b.netns = fd
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	return "a private one, so nothing here touches the host's own", err
}

// The addresses of the trials: for documentation (RFC 5737, RFC 3849), and outside every tunnel network that makes sense.
var (
	benchHost  = netip.MustParseAddr("192.0.2.1")
	benchHost6 = netip.MustParseAddr("2001:db8::1")
)

// guest is the nth source, from 2 on.
func guest(n byte) netip.Addr { return netip.AddrFrom4([4]byte{192, 0, 2, n}) }

func (b *bench) openTUN(context.Context) (string, error) {
	t, err := openTestTUN("outside")
	if err != nil {
		return "", err
	}
	b.tun = t
	link, err := netlink.LinkByName("outside")
	if err == nil {
		for _, p := range []netip.Prefix{netip.PrefixFrom(benchHost, 24), netip.PrefixFrom(benchHost6, 64)} {
			a := &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}, Flags: unix.IFA_F_NODAD}
			if err = netlink.AddrAdd(link, a); err != nil && p.Addr().Is6() {
				err = nil // no IPv6 here: its own trial says so
			}
			if err != nil {
				break
			}
		}
	}
	if err == nil {
		err = netlink.LinkSetUp(link)
	}
	return "/dev/net/tun works", err
}

func (b *bench) offload(context.Context) (string, error) {
	if err := unix.IoctlSetInt(b.tun.fd, unix.TUNSETOFFLOAD, unix.TUN_F_CSUM|unix.TUN_F_TSO4|unix.TUN_F_TSO6); err != nil {
		return "", fmt.Errorf("checksum and TCP segmentation: %w", err)
	}
	udp := "UDP too"
	if err := unix.IoctlSetInt(b.tun.fd, unix.TUNSETOFFLOAD, unix.TUN_F_CSUM|unix.TUN_F_TSO4|unix.TUN_F_TSO6|unix.TUN_F_USO4|unix.TUN_F_USO6); err != nil {
		udp = "not UDP, which kernel 6.2 and newer has"
	}
	return "checksum and TCP segmentation; " + udp, unix.IoctlSetInt(b.tun.fd, unix.TUNSETOFFLOAD, 0)
}

// interlock comes before the table: the listener must be deaf without it.
func (b *bench) interlock(ctx context.Context) (string, error) {
	l, err := Listen(ctx, fmt.Sprintf(":%d", b.cfg.GatePorts[0]))
	if err != nil {
		return "", err
	}
	b.gate = l
	if b.tun.answers(b.syn(guest(2))) {
		return "", errors.New("the gate answers without the table")
	}
	return "without the table the gate is deaf", nil
}

func (b *bench) syn(from netip.Addr) *tcpPeer {
	return &tcpPeer{tun: b.tun, from: from, to: benchHost, port: b.cfg.GatePorts[0]}
}

func (b *bench) apply(context.Context) (string, error) {
	b.fw = New(slog.New(slog.DiscardHandler), b.netns)
	b.fw.plain = b.plain
	start := time.Now()
	_, err := b.fw.Apply(b.cfg)
	return fmt.Sprintf("built in %v", time.Since(start).Round(100*time.Microsecond)), err
}

func (b *bench) observe(ctx context.Context) (string, error) {
	ctx, b.stop = context.WithCancel(ctx)
	b.openings, b.observed = make(chan Opening, 16), make(chan error, 1)
	ready := make(chan struct{})
	go func() {
		b.observed <- b.fw.Observe(ctx, b.cfg.LogGroup, ready, func(o Opening) {
			select {
			case b.openings <- o:
			default:
			}
		}, func(Refusal) {})
	}()
	select {
	case <-ready:
		return fmt.Sprintf("NFLOG group %d", b.cfg.LogGroup), nil
	case err := <-b.observed:
		b.observed <- err
		return "", err
	}
}
