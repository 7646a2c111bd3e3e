package proxy

import (
	"errors"
	"math/rand/v2"
	"net/netip"

	"golang.org/x/sys/unix"
)

// CutOrphans makes clients learn that their connections to the proxy died with an earlier process: its resets were lost,
// since the tunnel died with it, and a client that only receives would wait for ever. Each gets one segment that fits no
// connection; to its answer the kernel, which has no such connection either, says RST. A client without one is not
// disturbed, and one that has come back is passed over.
func CutOrphans(at netip.AddrPort, clients []netip.AddrPort) error {
	var errs []error
	for _, c := range clients {
		if err := provoke(at, c); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// provoke sends an acknowledgement with a sequence number out of the air: a socket under repair is connected without a
// word, says where it is when the repair ends (a window probe), and is gone without a word when it begins again (tcp(7),
// TCP_REPAIR; it takes CAP_NET_ADMIN).
func provoke(at, client netip.AddrPort) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	set := func(option, value int) {
		if err == nil {
			err = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, option, value)
		}
	}
	const receiveQueue, sendQueue = 1, 2 // linux/tcp.h
	set(unix.TCP_REPAIR, 1)
	for _, queue := range []int{receiveQueue, sendQueue} {
		set(unix.TCP_REPAIR_QUEUE, queue)
		set(unix.TCP_QUEUE_SEQ, int(rand.Uint32()))
	}
	if err != nil {
		return err
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Port: int(at.Port()), Addr: at.Addr().As4()}); err != nil {
		return err
	}
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: int(client.Port()), Addr: client.Addr().As4()}); err != nil {
		return err
	}
	set(unix.TCP_REPAIR, 0)
	set(unix.TCP_REPAIR, 1)
	return err
}
