package client

import (
	"math"
	"net"
	"syscall"
	"time"

	"perimeterd/vpn"

	"golang.org/x/sys/unix"
)

func impatient(_, _ string, c syscall.RawConn) error { return vpn.Impatient(c) }

// tcpRoundTrip is the kernel's estimate, which knows nothing of how long TLS computes.
func tcpRoundTrip(c net.Conn) time.Duration {
	const unknown = math.MaxInt64
	t, ok := c.(*net.TCPConn)
	if !ok {
		return unknown
	}
	raw, err := t.SyscallConn()
	if err != nil {
		return unknown
	}
	var info *unix.TCPInfo
	var failed error
	if err := raw.Control(func(fd uintptr) { info, failed = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) }); err != nil || failed != nil {
		return unknown
	}
	return time.Duration(info.Rtt) * time.Microsecond
}
