package proxy

import (
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

// System calls on sockets that do not block, made without a word to Go's runtime. They take tens of microseconds where they send, since the
// thread that sends carries the packet through firewall and TCP to the other end. The runtime takes that for waiting: its monitor
// wakes up every 20 µs to see, and other threads are woken to go on meanwhile, which is dearer than many a call.

func readNow(fd uintptr, b []byte) (int, error) { return now(unix.SYS_READ, fd, b) }

func writeNow(fd uintptr, b []byte) (int, error) { return now(unix.SYS_WRITE, fd, b) }

func now(call, fd uintptr, b []byte) (int, error) {
	n, _, errno := unix.RawSyscall(call, fd, uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// endNow says FIN.
func endNow(fd uintptr) error {
	if _, _, errno := unix.RawSyscall(unix.SYS_SHUTDOWN, fd, unix.SHUT_WR, 0); errno != 0 {
		return errno
	}
	return nil
}

// connectNow begins to connect, by IPv4.
func connectNow(fd uintptr, to netip.AddrPort) error {
	a := unix.RawSockaddrInet4{Family: unix.AF_INET, Addr: to.Addr().As4()}
	binary.BigEndian.PutUint16((*[2]byte)(unsafe.Pointer(&a.Port))[:], to.Port())
	if _, _, errno := unix.RawSyscall(unix.SYS_CONNECT, fd, uintptr(unsafe.Pointer(&a)), unsafe.Sizeof(a)); errno != 0 && errno != unix.EINPROGRESS {
		return errno
	}
	return nil
}

// send is c.Write.
func send(c *net.TCPConn, b []byte) (n int, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var failed error
	err = raw.Write(func(fd uintptr) bool {
		for n < len(b) {
			m, err := writeNow(fd, b[n:])
			switch n += m; {
			case err == unix.EAGAIN:
				return false
			case err == unix.EINTR:
				continue
			case err == nil && m == 0:
				err = io.ErrUnexpectedEOF
			}
			if err != nil {
				failed = err
				return true
			}
		}
		return true
	})
	if err == nil {
		err = failed
	}
	return n, err
}

// sendEnd is c.CloseWrite.
func sendEnd(c *net.TCPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	if err := raw.Control(func(fd uintptr) { failed = endNow(fd) }); err != nil {
		return err
	}
	return failed
}
