package proxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Listen opens the proxy's listener. Multipath TCP is off: such sockets cannot be spliced. What every connection is to have, the
// listening socket has: a connection takes it over from there, where asking for it would be five calls to the kernel each.
func Listen(ctx context.Context, at netip.AddrPort) (net.Listener, error) {
	lc := net.ListenConfig{KeepAlive: -1, Control: func(_, _ string, c syscall.RawConn) error { return prepare(c, at.Addr()) }}
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(ctx, "tcp", at.String())
	if err != nil {
		return nil, fmt.Errorf("proxy.port %d: %w: is the tunnel device up, and no other proxy on %v?", at.Port(), err, at.Addr())
	}
	return l, nil
}

// Adopt is Listen for a listening socket of another process, which stays the caller's to close.
func Adopt(f *os.File) (net.Listener, error) {
	l, err := net.FileListener(f)
	if err != nil {
		return nil, err
	}
	tl, ok := l.(*net.TCPListener)
	if !ok {
		l.Close()
		return nil, fmt.Errorf("proxy: %T is no TCP listener", l)
	}
	raw, err := tl.SyscallConn()
	if err == nil {
		err = prepare(raw, tl.Addr().(*net.TCPAddr).AddrPort().Addr().Unmap())
	}
	if err != nil {
		l.Close()
		return nil, fmt.Errorf("proxy listener %v of before: %w: is the tunnel device up?", tl.Addr(), err)
	}
	return adopted{tl}, nil
}

// adopted undoes what Go does to each connection of a listener that it has not made: a peer would be asked every 15 seconds.
type adopted struct{ *net.TCPListener }

func (a adopted) Accept() (net.Conn, error) {
	c, err := a.AcceptTCP()
	if err != nil {
		return nil, err
	}
	c.SetKeepAliveConfig(keepAlive)
	return c, nil
}

// prepare makes of a socket the proxy's listener at an address of this host.
func prepare(c syscall.RawConn, at netip.Addr) error {
	device, err := deviceOf(at)
	if err != nil {
		return err
	}
	cerr := c.Control(func(fd uintptr) {
		if err = hearOnly(int(fd), device); err == nil {
			err = inherit(int(fd))
		}
	})
	return errors.Join(cerr, err)
}

// deviceOf is the index of the device that has an address.
func deviceOf(at netip.Addr) (int, error) {
	devices, err := net.Interfaces()
	if err != nil {
		return 0, err
	}
	for _, d := range devices {
		addrs, err := d.Addrs()
		if err != nil {
			return 0, err
		}
		for _, a := range addrs {
			if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr() == at {
				return d.Index, nil
			}
		}
	}
	return 0, fmt.Errorf("no device has the address %v", at)
}

// loopback is the index that every network namespace gives to lo (drivers/net/loopback.c).
const loopback = 1

// hearOnly is the proxy's interlock, as the gate has its own: connections come in by the tunnel's device, or from this host. While
// another tool has flushed the firewall's table, what a neighbour sends in the name of a tunnel's address would be heard else. A
// connection that stands is not asked for its device, which is another after a restart. Classic BPF, which sees a segment from the TCP
// header on: linux/filter.h, SKF_AD_OFF + SKF_AD_IFINDEX.
func hearOnly(fd, device int) error {
	const flags, syn = 13, 2
	program := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_B | unix.BPF_ABS, K: flags},
		{Code: unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K, Jf: 3, K: syn},
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0xfffff000 + 8},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jt: 1, K: loopback},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: uint32(device)},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0xffffffff},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0},
	}
	return os.NewSyscallError("socket filter", unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER,
		&unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}))
}

// earlyQueue is how many connections may be served before their clients have answered: then requests wait for that again.
const earlyQueue = 1024

// inherit has the kernel look after a connection's peer, and reset the connection if this process dies (see cutWithUs). A request may
// come with the connection's first packet (TCP Fast Open, RFC 7413), which saves a round trip. No cookie proves that its source is no
// one else's, since WireGuard has done that: no other way leads to this listener (see hearOnly) but from this host itself, whose kernel
// lets nobody without privilege send from another's address; and the tunnel refuses copies of a packet. A client's own kernel may
// repeat a SYN, which finds the connection that it made; only if that is gone already, and no answer got through, is the request served
// twice. Our client so sends a CONNECT, with a ClientHello behind it at most. The kernel takes part where net.ipv4.tcp_fastopen has bit 2; else requests come
// a round trip later, as they do in the place of those beyond earlyQueue.
func inherit(fd int) error {
	seconds := func(d time.Duration) int { return int(d / time.Second) }
	for _, o := range []struct{ level, option, value int }{
		{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, seconds(keepAlive.Idle)},
		{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, seconds(keepAlive.Interval)},
		{unix.IPPROTO_TCP, unix.TCP_KEEPCNT, keepAlive.Count},
		{unix.IPPROTO_TCP, unix.TCP_FASTOPEN_NO_COOKIE, 1},
		{unix.IPPROTO_TCP, unix.TCP_FASTOPEN, earlyQueue},
	} {
		if err := unix.SetsockoptInt(fd, o.level, o.option, o.value); err != nil {
			return os.NewSyscallError("setsockopt", err)
		}
	}
	return os.NewSyscallError("setsockopt", unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}))
}
