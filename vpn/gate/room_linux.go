package gate

import (
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// streamBuffer is what the kernel may hold of a stream each way, bytes: 300 Mb/s at a round trip of 50 ms.
const streamBuffer = 2 << 20

// tcpRTOMin is TCP_RTO_MIN_US of Linux 6.15, which x/sys has not got.
const (
	tcpRTOMin  = 45
	impatience = 40 * time.Millisecond // as long as Linux delays an acknowledgement
)

// impatient makes TCP send an answer that was lost again a moment after two round trips, where it else waits for 200 ms more.
// Older kernels do that.
func impatient(c *net.TCPConn) {
	if raw, err := c.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) {
			_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, tcpRTOMin, int(impatience.Microseconds()))
		})
	}
}

// roomy gives a connection a stream's buffers in the place of a request's.
func roomy(c *net.TCPConn) {
	raw, err := c.SyscallConn()
	if err != nil {
		return
	}
	raw.Control(func(fd uintptr) {
		for force, plain := range map[int]int{unix.SO_RCVBUFFORCE: unix.SO_RCVBUF, unix.SO_SNDBUFFORCE: unix.SO_SNDBUF} {
			if unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, force, streamBuffer) != nil { // without CAP_NET_ADMIN
				_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, plain, streamBuffer)
			}
		}
		// What is sealed already cannot be dropped any more: it waits in the queue before, which drops.
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, 64<<10)
	})
}
