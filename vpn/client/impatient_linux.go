package client

import (
	"math"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// tcpRTOMin is TCP_RTO_MIN_US of Linux 6.15, which x/sys has not got.
const (
	tcpRTOMin  = 45
	impatience = 40 * time.Millisecond // as long as Linux delays an acknowledgement
)

// impatient makes TCP send again what was lost at the end of a short exchange a moment after two round trips, where it else waits
// for 200 ms more. Older kernels do that.
func impatient(_, _ string, c syscall.RawConn) error {
	return c.Control(func(fd uintptr) {
		_ = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, tcpRTOMin, int(impatience.Microseconds()))
	})
}

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
