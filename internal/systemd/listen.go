package systemd

import (
	"errors"
	"net"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Listen is the listener that was stored for address, or the one that open makes, which is stored then. Connections that come
// while nobody runs wait in it. Adopt makes a listener of a stored one, with what open gives a new one: another version may have
// made it; net.FileListener is one. One that cannot be used any more is closed, and opened anew.
func (m *Manager) Listen(role, address string, adopt func(*os.File) (net.Listener, error), open func() (net.Listener, error)) (net.Listener, error) {
	name := role + "=" + strings.ReplaceAll(address, ":", ";") // no part of an address has one
	if f := m.Take(name); f != nil {
		l, err := func() (net.Listener, error) {
			defer f.Close()
			raw, err := f.SyscallConn()
			if err != nil {
				return nil, err
			}
			if e := raw.Control(func(fd uintptr) {
				var listens int
				if listens, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ACCEPTCONN); err == nil && listens == 0 {
					err = errors.New("it does not listen")
				}
			}); e != nil || err != nil {
				return nil, errors.Join(e, err)
			}
			return adopt(f)
		}()
		if err == nil {
			return l, nil
		}
		if err := m.Drop(name); err != nil {
			return nil, err
		}
	}
	l, err := open()
	if err != nil {
		return nil, err
	}
	if c, ok := l.(syscall.Conn); ok {
		err = m.Store(name, c)
	}
	if err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}
