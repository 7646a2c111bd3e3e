package proxy

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	bufferSize     = 32 << 10
	spliceAfter    = 4 // full reads in a row
	splicePiece    = 8 << 20
	splicePatience = time.Second // a splice holds a pipe, two descriptors: not for long without data
	spliceWorth    = 1 << 20     // what it must move in that time to go on
)

// source reads a connection and holds no buffer while it waits, so that ten thousand silent tunnels cost their sockets and
// stacks. The connection stays bare: wrapped, it could not be spliced.
type source struct {
	conn *net.TCPConn
	raw  syscall.RawConn
	pool *sync.Pool
	buf  *[]byte // nil while waiting
	n    int     // bytes in buf that nobody has taken
	err  error
	try  func(fd uintptr) bool
}

func newSource(c *net.TCPConn, pool *sync.Pool) (*source, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	s := &source{conn: c, raw: raw, pool: pool}
	s.try = s.read
	return s, nil
}

// read is tried by the poller: once at once, then whenever the socket turns readable. A buffer is borrowed for the attempt
// only, which saves the look ahead that would tell whether one is needed.
func (s *source) read(fd uintptr) bool {
	buf := s.pool.Get().(*[]byte)
	for {
		n, err := unix.Read(int(fd), *buf)
		switch {
		case err == unix.EINTR:
			continue
		case n > 0:
			s.buf, s.n = buf, n
			return true
		}
		s.pool.Put(buf)
		if err == unix.EAGAIN {
			return false
		}
		if s.err = err; err == nil {
			s.err = io.EOF
		}
		return true
	}
}

// wait blocks until bytes are there, or the end (io.EOF), or an error.
func (s *source) wait() error {
	if s.n > 0 {
		return nil
	}
	if err := s.raw.Read(s.try); err != nil {
		return err
	}
	return s.err
}

func (s *source) bytes() []byte {
	if s.buf == nil {
		return nil
	}
	return (*s.buf)[:s.n]
}

// more adds to bytes what comes next. There must be room.
func (s *source) more() error {
	if s.buf == nil {
		return s.wait()
	}
	n, err := s.conn.Read((*s.buf)[s.n:])
	s.n += n
	if n > 0 {
		return nil
	}
	return err
}

// skip drops the first n bytes.
func (s *source) skip(n int) {
	if s.n = copy(*s.buf, (*s.buf)[n:s.n]); s.n == 0 {
		s.release()
	}
}

func (s *source) release() {
	if s.buf != nil {
		s.pool.Put(s.buf)
		s.buf, s.n = nil, 0
	}
}

// ends waits, after the end of the stream, for what may still come: an error, or the connection being closed here.
func (s *source) ends() error {
	err := s.raw.Read(func(fd uintptr) bool {
		errno, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
		if s.err = err; err == nil && errno != 0 {
			s.err = unix.Errno(errno)
		}
		return s.err != nil
	})
	if err != nil {
		return err
	}
	return s.err
}

// errWrite marks an error of the receiving side.
type errWrite struct{ error }

// flow is one direction of a tunnel.
type flow struct {
	to       *net.TCPConn
	moved    atomic.Int64 // bytes that its socket has taken; in a splice they are counted piece by piece
	splicing atomic.Bool
	told     int64 // of moved, to who counts it; the link's lock's
	pace     pace
}

func (f *flow) untold() int64 {
	n := f.moved.Load() - f.told
	f.told += n
	return n
}

// pump copies from src until the end of the stream, and hands the end on.
func (f *flow) pump(src *source) error {
	defer src.release()
	dst := f.to
	full := 0
	for {
		if err := src.wait(); err == io.EOF {
			if err := dst.CloseWrite(); err != nil {
				return errWrite{err}
			}
			return nil
		} else if err != nil {
			return err
		}
		n, err := dst.Write(src.bytes())
		f.moved.Add(int64(n))
		full++
		if src.n < bufferSize {
			full = 0
		}
		src.release()
		if err != nil {
			return errWrite{err}
		}
		if full < spliceAfter {
			continue
		}
		if err := src.conn.SetReadDeadline(time.Now().Add(splicePatience)); err != nil {
			return err
		}
		f.splicing.Store(true)
		w, err := dst.ReadFrom(&io.LimitedReader{R: src.conn, N: splicePiece})
		f.moved.Add(w)
		f.splicing.Store(false)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			// The deadline is met only where the pipe is empty, so nothing is lost.
			if err = nil; w < spliceWorth {
				full = 0
			}
		}
		if err == nil {
			err = src.conn.SetReadDeadline(time.Time{})
		}
		if errors.Is(err, unix.EPIPE) {
			return errWrite{err}
		} else if err != nil {
			return err
		}
	}
}

// tunnel is a link that relays.
type tunnel struct {
	link     *link
	server   *net.TCPConn
	up, down flow
	ended    atomic.Int32 // streams that have come to their end
	left     atomic.Int32 // directions that still run
	finish   func(*tunnel)
}

func newTunnel(l *link, server *net.TCPConn) *tunnel {
	t := &tunnel{link: l, server: server}
	t.up.to, t.down.to = server, l.client
	return t
}

func (t *tunnel) upward() *flow   { return &t.up }
func (t *tunnel) downward() *flow { return &t.down }

// start relays in two goroutines of their own, whose stacks stay small. Whichever is last calls finish.
func (t *tunnel) start(fromClient, fromServer *source) {
	t.left.Store(2)
	go t.run(&t.up, fromClient, ClientReset, ServerReset)
	go t.run(&t.down, fromServer, ServerReset, ClientReset)
}

func (t *tunnel) run(f *flow, src *source, readFailed, writeFailed Reason) {
	err := f.pump(src)
	if err == nil {
		if t.ended.Add(1) == 2 {
			t.link.close()
		} else {
			// A reset may follow an end: the other side must not take what it got for whole.
			err = src.ends()
		}
	}
	if err != nil { // a link that has ended already keeps its reason
		why := readFailed
		if errors.As(err, new(errWrite)) {
			why = writeFailed
		}
		t.link.end(why)
	}
	if t.left.Add(-1) == 0 {
		t.finish(t)
	}
}
