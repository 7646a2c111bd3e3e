//go:build linux

package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Manager is what systemd is to a service: it hears what the daemon says of itself, and keeps descriptors for it from one start
// to the next (sd_notify(3), sd_listen_fds(3)). It restarts nobody: that is the test's to do.
type Manager struct {
	Socket string

	conn  *net.UnixConn
	ended chan struct{}

	mu      sync.Mutex
	said    []string // lines, apart from those about descriptors
	arrived chan struct{}
	kept    []*os.File // by their names
	failed  error
}

// NewManager begins to listen. The lab's end, or Close, ends it and gives up what is kept.
func (l *Lab) NewManager() (*Manager, error) {
	m := &Manager{Socket: filepath.Join(l.Dir, "notify"), ended: make(chan struct{}), arrived: make(chan struct{})}
	var err error
	if m.conn, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: m.Socket, Net: "unixgram"}); err != nil {
		return nil, err
	}
	go m.listen()
	return m, l.onClose(m.Close)
}

// Close gives up what is kept, and says what was wrong with what was heard.
func (m *Manager) Close() error {
	if err := m.conn.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	<-m.ended
	return errors.Join(m.GiveUp(), m.failed)
}

// GiveUp closes what is kept, as systemd does for a service that is stopped and not to be started again.
func (m *Manager) GiveUp() (err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, f := range m.kept {
		err = errors.Join(err, f.Close())
	}
	m.kept = nil
	return err
}

func (m *Manager) listen() {
	defer close(m.ended)
	b, oob := make([]byte, 64<<10), make([]byte, unix.CmsgSpace(4*253))
	for {
		n, on, flags, _, err := m.conn.ReadMsgUnix(b, oob)
		if err != nil {
			return
		}
		var fds []int
		if controls, e := unix.ParseSocketControlMessage(oob[:on]); e == nil {
			for _, c := range controls {
				if more, e := unix.ParseUnixRights(&c); e == nil {
					fds = append(fds, more...)
				}
			}
		}
		m.mu.Lock()
		if err := m.heardLocked(strings.Split(string(b[:n]), "\n"), fds); err != nil || flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
			m.failed = errors.Join(m.failed, fmt.Errorf("the daemon said %q with %d descriptors: %v, flags %#x", b[:n], len(fds), err, flags))
		}
		close(m.arrived)
		m.arrived = make(chan struct{})
		m.mu.Unlock()
	}
}

func (m *Manager) heardLocked(lines []string, fds []int) error {
	name := "stored"
	for _, l := range lines {
		if n, ok := strings.CutPrefix(l, "FDNAME="); ok {
			name = n
		}
	}
	switch {
	case slices.Contains(lines, "FDSTORE=1"):
		if len(fds) == 0 {
			return errors.New("nothing to store")
		}
		for _, fd := range fds {
			m.kept = append(m.kept, os.NewFile(uintptr(fd), name))
		}
	case slices.Contains(lines, "FDSTOREREMOVE=1"):
		m.kept = slices.DeleteFunc(m.kept, func(f *os.File) bool { return f.Name() == name && f.Close() == nil })
	default:
		m.said = append(m.said, lines...)
		if len(fds) > 0 {
			return errors.New("descriptors for nothing")
		}
	}
	return nil
}

// Said are the lines that the daemon has said, apart from those about descriptors.
func (m *Manager) Said() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.said)
}

// Kept are the names of the descriptors that are kept, sorted.
func (m *Manager) Kept() (names []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, f := range m.kept {
		names = append(names, f.Name())
	}
	slices.Sort(names)
	return names
}

// Await waits until the daemon has said what is wanted, counted from the first line.
func (m *Manager) Await(ctx context.Context, line string, times int) error {
	for {
		m.mu.Lock()
		next, n := m.arrived, 0
		for _, l := range m.said {
			if l == line {
				n++
			}
		}
		m.mu.Unlock()
		if n >= times {
			return nil
		}
		select {
		case <-next:
		case <-ctx.Done():
			return fmt.Errorf("the daemon said %q %d times, not %d: %w", line, n, times, ctx.Err())
		}
	}
}

// equip gives a command what systemd gives a service. What is kept is passed under LISTEN_PID, which no parent knows before it
// has a child: a shell tells it, and becomes the command.
func (m *Manager) equip(c *Cmd, environment ...string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	names := make([]string, len(m.kept))
	for i, f := range m.kept {
		names[i] = f.Name()
	}
	if c.Env == nil {
		c.Env = os.Environ()
	}
	c.Env = append(c.Env, "NOTIFY_SOCKET="+m.Socket)
	c.Env = append(c.Env, environment...)
	if len(names) > 0 {
		c.Env = append(c.Env, fmt.Sprintf("LISTEN_FDS=%d", len(names)), "LISTEN_FDNAMES="+strings.Join(names, ":"))
		c.ExtraFiles = slices.Clone(m.kept)
		c.Args = append([]string{"sh", "-c", `LISTEN_PID=$$ exec "$@"`, "sh", c.Path}, c.Args[1:]...)
		c.Path = "/bin/sh"
	}
}
