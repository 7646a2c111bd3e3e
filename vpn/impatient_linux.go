package vpn

import (
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// tcpRTOMin is TCP_RTO_MIN_US of Linux 6.15 (include/uapi/linux/tcp.h), which x/sys has not got.
const (
	tcpRTOMin  = 45
	impatience = 40 * time.Millisecond // as long as Linux delays an acknowledgement
)

// Impatient makes TCP send again what was lost at the end of a short exchange a moment after two round trips, where it else waits
// for 200 ms more. Older kernels do that.
func Impatient(c syscall.RawConn) error {
	return c.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, tcpRTOMin, int(impatience.Microseconds()))
	})
}
