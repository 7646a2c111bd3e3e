// Package systemd speaks with the service manager: readiness, status and watchdog (sd_notify(3)), and descriptors that it
// keeps while the daemon restarts (sd_pid_notify_with_fds(3), "FDSTORE=1"). Without a manager, who reads $NOTIFY_SOCKET,
// nothing of it happens.
package systemd

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"
)

// Manager is systemd as a service sees it. It is safe for concurrent use, apart from Listen, Take and Sweep. A nil one is nobody.
type Manager struct {
	conn     *net.UnixConn // nil: nobody listens
	watchdog time.Duration // between pings, at most; 0: none is wanted
	stored   map[string]*os.File
	twice    []*os.File // others of a name that was there before
}

// Connect reads what the manager has put into the environment, and takes it out: children are no services. It must be called
// before the first of them is started, which would inherit the stored descriptors.
func Connect() (*Manager, error) {
	m := &Manager{stored: map[string]*os.File{}}
	path, every, pid := os.Getenv("NOTIFY_SOCKET"), os.Getenv("WATCHDOG_USEC"), os.Getenv("WATCHDOG_PID")
	for _, name := range []string{"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} {
		if err := os.Unsetenv(name); err != nil {
			return nil, err
		}
	}
	// Non-blocking before they become files, so that the runtime's poller takes them.
	for fd := 3; fd < 3+passed(); fd++ {
		if err := unix.SetNonblock(fd, true); err != nil {
			return nil, fmt.Errorf("descriptor %d of $LISTEN_FDS: %w", fd, err)
		}
	}
	for _, f := range activation.Files(true) {
		if m.stored[f.Name()] != nil {
			m.twice = append(m.twice, f)
			continue
		}
		m.stored[f.Name()] = f
	}
	if path == "" {
		return m, nil
	}
	var err error
	if m.conn, err = net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"}); err != nil {
		return nil, fmt.Errorf("NOTIFY_SOCKET %q: %w", path, err)
	}
	if every != "" && (pid == "" || pid == strconv.Itoa(os.Getpid())) { // sd_watchdog_enabled(3)
		n, err := strconv.ParseInt(every, 10, 64)
		if err != nil || n <= 0 {
			return nil, fmt.Errorf("WATCHDOG_USEC %q: want a number of microseconds", every)
		}
		m.watchdog = time.Duration(n) * time.Microsecond
	}
	return m, nil
}

// passed is how many descriptors are this process's, as activation.Files counts them.
func passed() int {
	if os.Getenv("LISTEN_PID") != strconv.Itoa(os.Getpid()) {
		return 0
	}
	n, err := strconv.Atoi(os.Getenv("LISTEN_FDS"))
	if err != nil {
		return 0
	}
	return n
}

// Stores reports whether there is somebody who could keep descriptors.
func (m *Manager) Stores() bool { return m.conn != nil }

// Ready says that everything serves, at the start and after a reload.
func (m *Manager) Ready() error { return m.tell("READY=1") }

// Reloading says that the configuration is read again; Ready must follow.
func (m *Manager) Reloading() error {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return err
	}
	return m.tell("RELOADING=1", fmt.Sprintf("MONOTONIC_USEC=%d", now.Nano()/1000))
}

// Stopping says that the end has begun.
func (m *Manager) Stopping() error { return m.tell("STOPPING=1", "STATUS=stopping") }

// Status is a line for people, as systemctl status shows it.
func (m *Manager) Status(line string) error {
	return m.tell("STATUS=" + strings.ReplaceAll(line, "\n", " "))
}

func (m *Manager) tell(lines ...string) error { return m.tellWith(nil, lines...) }

func (m *Manager) tellWith(rights []byte, lines ...string) error {
	if m == nil || m.conn == nil {
		return nil
	}
	raw, err := m.conn.SyscallConn()
	if err != nil {
		return err
	}
	// Not WriteMsgUnix, which refuses a datagram socket that is connected.
	var sent error
	if err := raw.Write(func(fd uintptr) bool {
		for {
			if sent = unix.Sendmsg(int(fd), []byte(strings.Join(lines, "\n")), rights, nil, unix.MSG_NOSIGNAL); sent != unix.EINTR {
				return sent != unix.EAGAIN
			}
		}
	}); err != nil || sent != nil {
		return fmt.Errorf("service manager: %w", errors.Join(err, sent))
	}
	return nil
}

// Take is a stored descriptor of that name, the caller's from then on; nil if there is none.
func (m *Manager) Take(name string) *os.File {
	f := m.stored[name]
	delete(m.stored, name)
	return f
}

// Store has the manager keep a descriptor for the next start. The same one twice is kept once.
func (m *Manager) Store(name string, c syscall.Conn) error {
	if m.conn == nil {
		return nil
	}
	if name == "" || len(name) > 255 || strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r >= 0x7f || r == ':' }) {
		return fmt.Errorf("descriptor %q: a name of printable ASCII without colons is stored", name)
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	// Not polled: a listener with nobody behind it is no reason to drop it.
	if e := raw.Control(func(fd uintptr) { err = m.tellWith(unix.UnixRights(int(fd)), "FDSTORE=1", "FDPOLL=0", "FDNAME="+name) }); e != nil {
		return e
	}
	return err
}

// Drop has the manager forget what it keeps under that name.
func (m *Manager) Drop(name string) error { return m.tell("FDSTOREREMOVE=1", "FDNAME="+name) }

// Sweep closes what is stored and nobody took, here and there. It returns their names.
func (m *Manager) Sweep() (names []string, err error) {
	for name, f := range m.stored {
		names = append(names, name)
		err = errors.Join(err, f.Close(), m.Drop(name))
		delete(m.stored, name)
	}
	for _, f := range m.twice {
		err = errors.Join(err, f.Close())
	}
	m.twice = nil
	return names, err
}
