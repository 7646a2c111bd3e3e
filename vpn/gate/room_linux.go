package gate

import (
	"net"

	"golang.org/x/sys/unix"
)

// streamBuffer is what the kernel may hold of a stream each way, bytes: 300 Mb/s at a round trip of 50 ms.
const streamBuffer = 2 << 20

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
