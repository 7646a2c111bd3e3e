package proxy

import (
	"time"

	"golang.org/x/sys/unix"
)

const (
	windowRate   = 125e6 // bytes a second that one connection may always come with
	windowQueued = 32    // of a second, so long a queue its reader may have
	windowLate   = 16    // of a second, so long a queue its reader may have that was never bound
	windowLeast  = 512 << 10
	windowMost   = 6 << 20 // bytes
)

// window is how many bytes a connection may be sent before they are read: a round trip of 1 Gb/s, or more where it is read faster (rate,
// bytes a second). Left alone, Linux lets what comes faster than it leaves grow to the last value of tcp_rmem: 6 MB, and 32 MB since Linux
// 6.17. A hundred such downloads, or fourteen on a host of 1 GB, bring all of its TCP under memory pressure (tcp(7), tcp_mem), in which
// every window shrinks to a few packets.
func window(roundTrip time.Duration, rate float64) int {
	return int(min(max(roundTrip.Seconds()*windowRate, rate/windowQueued, windowLeast), windowMost))
}

// bound sets the window for what was moved in so long a time. What the kernel counts beside the bytes gets as much room once more
// (socket(7), SO_RCVBUF). The kernel then leaves the clamp alone as well, where it was: it would stay as small as it began.
func (s *source) bound(moved int64, took time.Duration) {
	s.raw.Control(func(fd uintptr) {
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		if err != nil {
			return
		}
		w := window(time.Duration(info.Rtt)*time.Microsecond, float64(moved)/max(took.Seconds(), 1e-6))
		if w <= 2*s.window && 2*w >= s.window {
			return
		}
		if unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, w) == nil && unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_WINDOW_CLAMP, w) == nil {
			s.window = w
		}
	})
}

// lags says whether more has come than is read in some time. Who keeps up is left alone: through a tunnel a wide window makes large segments.
func (s *source) lags(moved int64, took time.Duration) bool {
	queued := 0
	s.raw.Control(func(fd uintptr) { queued, _ = unix.IoctlGetInt(int(fd), unix.SIOCINQ) })
	return queued > windowLeast && float64(queued)*windowLate > float64(moved)/max(took.Seconds(), 1e-6)
}
