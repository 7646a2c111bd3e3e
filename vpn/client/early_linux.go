package client

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// hasSynData is set in TCP_INFO where the answer to a SYN acknowledged its data (TCPI_OPT_SYN_DATA of linux/tcp.h).
const hasSynData = 32

// early implements earlyLink.
func (d *systemTUN) early() earliness { return earliness(d.earliest.Load()) }

// DialWith implements earlyLink: first leaves in the SYN, as far as there is room (TCP Fast Open, RFC 7413). There are no cookies:
// to the other end WireGuard has proven whose address sends. An end that takes no data in a SYN acknowledges the SYN alone, and the
// kernel sends the data again right behind the handshake, as it does where this machine does not let it out at all.
func (d *systemTUN) DialWith(ctx context.Context, network, address string, first []byte) (net.Conn, error) {
	dialer := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(d.address, 0)), Control: d.askEarly}
	conn, err := dialer.DialContext(ctx, network, address) // which sends nothing yet
	if err != nil {
		return nil, err
	}
	c := conn.(*net.TCPConn)
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	taken := false
	if _, err = c.Write(first); err == nil {
		taken, err = connected(c)
	}
	if err == nil && !stop() {
		err = ctx.Err()
	}
	if err != nil {
		c.Close()
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, &net.OpError{Op: "dial", Net: network, Addr: conn.RemoteAddr(), Err: err}
	}
	if taken {
		d.earliest.Store(int32(likely))
	} else {
		d.earliest.Store(int32(never))
	}
	return c, nil
}

// askEarly has a connection begin with its first write. A kernel that does not do that connects as ever. Of a host that the kernel does
// not know yet it believes that a segment holds 536 bytes (RFC 9293, 3.7.1), and a ClientHello would wait: what the way takes is known here.
func (d *systemTUN) askEarly(_, _ string, c syscall.RawConn) error {
	headers := 20 + 20 // of IPv4 and TCP
	if d.address.Is6() {
		headers = 40 + 20
	}
	return c.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_MAXSEG, d.mtu-headers)
		if unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_FASTOPEN_NO_COOKIE, 1) == nil {
			_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_FASTOPEN_CONNECT, 1)
		}
	})
}

const (
	tcpSynSent = 2
	tcpClosed  = 7
)

// connected returns when the other end has answered, and whether it has taken what the SYN carried.
func connected(c *net.TCPConn) (taken bool, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return false, err
	}
	var failed error
	err = raw.Write(func(fd uintptr) bool {
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		switch {
		case err != nil:
			failed = os.NewSyscallError("getsockopt", err)
		case info.State == tcpSynSent:
			return false
		case info.State == tcpClosed:
			failed = syscall.ECONNRESET
			if no, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR); err == nil && no != 0 {
				failed = os.NewSyscallError("connect", syscall.Errno(no))
			}
		default:
			taken = info.Options&hasSynData != 0
		}
		return true
	})
	return taken, errors.Join(err, failed)
}
