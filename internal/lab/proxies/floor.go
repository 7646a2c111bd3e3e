//go:build linux

package main

import (
	"bytes"
	"errors"
	"io"
	"net/netip"
	"runtime"
	"runtime/debug"
	"unsafe"

	"golang.org/x/sys/unix"
)

const floorName = "the limit"

// floorRoom is how many descriptors the floor may have at once.
const floorRoom = 1 << 18

// floor is the least that a proxy can do here: one thread, one epoll, bare system calls. It leads every CONNECT to the origin, at the port
// that the request names, decides and logs nothing, allocates nothing while it serves, and still keeps a half-close. No product is like
// that: it shows what the kernel takes. A peer that does not read at once loses its tunnel.
type floor struct {
	poll, listening int
	egress, origin  unix.SockaddrInet4
	sides           []floorSide // by descriptor
	answer          []byte
	buffer          [32 << 10]byte
}

// floorSide is one side of a tunnel: where what it says goes.
type floorSide struct {
	peer       int32
	asking     bool // a client that has not said CONNECT
	connecting bool // a server that is on its way
	ended      bool // it has said all
}

// serveFloor returns only with an error.
func serveFloor(listening, from, to string) error {
	at, err1 := netip.ParseAddrPort(listening)
	egress, err2 := netip.ParseAddr(from)
	origin, err3 := netip.ParseAddr(to)
	if err := errors.Join(err1, err2, err3); err != nil {
		return err
	}
	runtime.GOMAXPROCS(1)
	debug.SetGCPercent(-1)
	f := &floor{egress: unix.SockaddrInet4{Addr: egress.As4()}, origin: unix.SockaddrInet4{Addr: origin.As4()}, sides: make([]floorSide, floorRoom),
		answer: []byte("HTTP/1.1 200 Connection established\r\n\r\n")}
	var err error
	if f.listening, err = listen(at); err != nil {
		return err
	}
	// Accepted sockets have what the listening one has.
	if err := errors.Join(unix.SetNonblock(f.listening, true), unix.SetsockoptInt(f.listening, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)); err != nil {
		return err
	}
	if f.poll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return err
	}
	if err := f.watch(f.listening, unix.EPOLLIN); err != nil {
		return err
	}
	var events [64]unix.EpollEvent
	for {
		// Go's runtime is not told that this waits: it would look after the thread, which would be in the figures.
		n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(f.poll), uintptr(unsafe.Pointer(&events)), uintptr(len(events)), ^uintptr(0), 0, 0)
		if errno == unix.EINTR {
			n = 0
		} else if errno != 0 {
			return errno
		}
		for _, e := range events[:n] {
			if fd := int(e.Fd); fd != f.listening {
				f.turn(fd, e.Events)
			} else if err := f.accept(); err != nil {
				return err
			}
		}
	}
}

func (f *floor) watch(fd int, events uint32) error {
	return unix.EpollCtl(f.poll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: events, Fd: int32(fd)})
}

// accept takes one client: if there are more, the poll says so again.
func (f *floor) accept() error {
	n, _, errno := unix.RawSyscall6(unix.SYS_ACCEPT4, uintptr(f.listening), 0, 0, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0, 0)
	if errno != 0 {
		if errno == unix.EAGAIN || errno == unix.ECONNABORTED {
			return nil
		}
		return errno
	}
	fd := int(n)
	f.sides[fd] = floorSide{peer: -1, asking: true}
	return f.watch(fd, unix.EPOLLIN|unix.EPOLLOUT|unix.EPOLLRDHUP|unix.EPOLLET)
}

// turn does what can be done for a side. What it cannot do ends the tunnel.
func (f *floor) turn(fd int, events uint32) {
	s := &f.sides[fd]
	if s.connecting {
		s.connecting = false
		if _, err := unix.Write(int(s.peer), f.answer); err != nil || events&unix.EPOLLERR != 0 {
			f.end(fd)
			return
		}
	}
	for events&unix.EPOLLIN != 0 && (s.asking || s.peer >= 0) {
		n, err := unix.Read(fd, f.buffer[:])
		switch {
		case err == unix.EAGAIN:
			return
		case err == nil && n == 0:
			s.ended = true
			if s.peer >= 0 && !f.sides[s.peer].ended {
				err = unix.Shutdown(int(s.peer), unix.SHUT_WR)
			} else {
				err = io.EOF
			}
		case err == nil && s.asking:
			err = f.dial(fd, f.buffer[:n])
		case err == nil:
			err = writeAll(int(s.peer), f.buffer[:n])
		}
		if err != nil {
			f.end(fd)
			return
		}
		// A short read has taken all there was, and the poll says when there is more.
		if s.ended || n < len(f.buffer) && events&unix.EPOLLRDHUP == 0 {
			return
		}
	}
}

// dial begins the connection that a request asks for. All of the request must be there.
func (f *floor) dial(client int, head []byte) error {
	line, _, _ := bytes.Cut(head, []byte(" HTTP/1."))
	port := line[bytes.LastIndexByte(line, ':')+1:]
	if !bytes.HasPrefix(head, []byte("CONNECT ")) || !bytes.HasSuffix(head, []byte("\r\n\r\n")) {
		return errors.New("no request")
	}
	f.origin.Port = 0
	for _, digit := range port {
		f.origin.Port = f.origin.Port*10 + int(digit-'0')
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	f.sides[client].peer, f.sides[client].asking = int32(fd), false
	f.sides[fd] = floorSide{peer: int32(client), connecting: true}
	if err := unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1); err != nil {
		return err
	}
	if err := unix.Bind(fd, &f.egress); err != nil {
		return err
	}
	if err := unix.Connect(fd, &f.origin); err != nil && err != unix.EINPROGRESS {
		return err
	}
	return f.watch(fd, unix.EPOLLIN|unix.EPOLLOUT|unix.EPOLLRDHUP|unix.EPOLLET)
}

// end closes both sides.
func (f *floor) end(fd int) {
	peer := f.sides[fd].peer
	unix.Close(fd)
	if peer >= 0 {
		unix.Close(int(peer))
		f.sides[peer] = floorSide{peer: -1}
	}
	f.sides[fd] = floorSide{peer: -1}
}
