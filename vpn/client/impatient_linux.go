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
	if info := tcpInfo(c); info != nil {
		return time.Duration(info.Rtt) * time.Microsecond
	}
	return math.MaxInt64 // unknown
}

// merelySlow tells a peer who has all that was sent to him, and has not begun to answer or is just answering, from one of whom, or
// to whom, something was lost.
func merelySlow(c net.Conn) bool {
	info := tcpInfo(c)
	return info != nil && info.Unacked == 0 &&
		(info.Data_segs_in == 0 || time.Duration(info.Last_data_recv)*time.Millisecond < hedgeMargin/2)
}

func tcpInfo(c net.Conn) (info *unix.TCPInfo) {
	t, ok := c.(*net.TCPConn)
	if !ok {
		return nil
	}
	raw, err := t.SyscallConn()
	if err != nil {
		return nil
	}
	var failed error
	if err := raw.Control(func(fd uintptr) { info, failed = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) }); err != nil || failed != nil {
		return nil
	}
	return info
}
