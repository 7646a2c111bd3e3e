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

	window int // bytes, as bound has set it; 0: the kernel's own
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
		n, err := readNow(fd, *buf)
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

// disturb ends the wait under way, or the next one.
func (s *source) disturb() { s.conn.SetReadDeadline(time.Unix(1, 0)) }

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

// ends waits, after the end of the stream, for what may still come: an error, the connection being closed here, or errHalted.
func (s *source) ends(halted *atomic.Bool) error {
	for {
		if halted.Load() {
			return errHalted
		}
		err := s.raw.Read(func(fd uintptr) bool {
			errno, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
			if s.err = err; err == nil && errno != 0 {
				s.err = unix.Errno(errno)
			}
			return s.err != nil
		})
		if err == nil {
			err = s.err
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
		if err := s.conn.SetReadDeadline(time.Time{}); err != nil {
			return err
		}
	}
}

// errDisturbed is returned by pump. errHalted is where the tunnel is to go on in another process: nothing of the stream is
// in this one any more.
var (
	errDisturbed = errors.New("disturbed")
	errHalted    = errors.New("halted")
)

// errWrite marks an error of the receiving side.
type errWrite struct{ error }

// flow is one direction of a tunnel.
type flow struct {
	tunnel   *tunnel
	src      *source
	to       *net.TCPConn
	ticket   uint64       // of the parking; 0: it has not been there
	past     bool         // the stream has ended, and the other side was told
	quiet    atomic.Bool  // parked, or past its end: not to be disturbed
	seen     atomic.Int64 // of moved, the last time that it was looked whether anything moves
	moved    atomic.Int64 // bytes that its socket has taken; in a splice they are counted piece by piece
	splicing atomic.Bool
	told     int64 // of moved, to who counts it; the link's lock's
	room     int   // bytes that its receiver had for sending before more was made, 0: as it is
	pace     pace
}

func (f *flow) untold() int64 {
	n := f.moved.Load() - f.told
	f.told += n
	return n
}

// pump copies until the end of the stream, which it leaves to be handed on. It returns errDisturbed when it waited and was disturbed, and
// may be called again.
func (f *flow) pump() error {
	src, dst := f.src, f.to
	defer src.release()
	full := 0
	for {
		if src.n == 0 && f.tunnel.halted.Load() {
			return errHalted
		}
		if err := src.wait(); err == io.EOF {
			return nil
		} else if errors.Is(err, os.ErrDeadlineExceeded) {
			if err = src.conn.SetReadDeadline(time.Time{}); err == nil {
				err = errDisturbed
			}
			return err
		} else if err != nil {
			return err
		}
		n, err := send(dst, src.bytes())
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
		began := time.Now()
		if src.window == 0 && f == &f.tunnel.down { // an origin is near, and at once far ahead
			src.bound(0, 0)
		}
		if err := src.conn.SetReadDeadline(began.Add(splicePatience)); err != nil {
			return err
		}
		if f.tunnel.halted.Load() { // before, or it is the deadline set by who halts that rules
			return errHalted
		}
		f.splicing.Store(true)
		w, err := dst.ReadFrom(&io.LimitedReader{R: src.conn, N: splicePiece})
		f.moved.Add(w)
		f.splicing.Store(false)
		if took := time.Since(began); src.window != 0 || src.lags(w, took) {
			src.bound(w, took)
		}
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
	access   *Access
	lull     time.Duration // the link's lock's: for how long nothing has been seen to move
	ended    atomic.Int32  // streams that have come to their end
	left     atomic.Int32  // directions that still run
	halted   atomic.Bool   // set under the link's lock: finish is for who set it
	still    chan struct{} // closed when a halted tunnel's directions run no more
	over     bool          // the link's lock's: finish is called, or has been
	finish   func(*tunnel)
	parking  *parking
	crew     *crew
}

func newTunnel(l *link, server *net.TCPConn) *tunnel {
	t := &tunnel{link: l, server: server}
	t.up.tunnel, t.up.to = t, server
	t.down.tunnel, t.down.to = t, l.client
	return t
}

func (t *tunnel) upward() *flow   { return &t.up }
func (t *tunnel) downward() *flow { return &t.down }

// start relays downwards; its caller runs t.up, in a goroutine that it may lose. Each direction keeps its goroutine, whose stack stays
// small, until it is silent and parks, or ends. Whichever is last calls finish.
func (t *tunnel) start(fromClient, fromServer *source) {
	t.up.src, t.down.src = fromClient, fromServer
	t.left.Store(2)
	t.crew.do(t.down.run)
}

// startParked is start for a tunnel of another process. Most are silent, and a goroutine for each direction, all at once, would leave
// Go with as many structures of goroutines for ever.
func (t *tunnel) startParked(fromClient, fromServer *source) {
	t.up.src, t.down.src = fromClient, fromServer
	t.left.Store(2)
	for _, f := range [...]*flow{&t.up, &t.down} {
		if f.past || !t.parking.enter(f) {
			go f.run()
		}
	}
}

// rest sends directions that have moved nothing since the last time to the parking, and reports how many.
func (t *tunnel) rest() (sent int) {
	if t.left.Load() == 0 {
		return 0
	}
	for _, f := range [...]*flow{&t.up, &t.down} {
		if n := f.moved.Load(); n == f.seen.Swap(n) && !f.quiet.Load() && !f.splicing.Load() {
			f.src.disturb()
			sent++
		}
	}
	return sent
}

// wake has directions that are parked find out that their sockets are closed.
func (t *tunnel) wake() {
	if t.left.Load() > 0 {
		t.parking.wakeFlow(&t.up)
		t.parking.wakeFlow(&t.down)
	}
}

func (f *flow) run() {
	t := f.tunnel
	var err error
	if !f.past {
		for err = f.pump(); err == errDisturbed; err = f.pump() {
			if t.parking.enter(f) {
				if t.halted.Load() { // by who may have looked before it was there
					t.parking.wakeFlow(f)
				}
				return
			}
		}
		if err == nil {
			f.past = true
			if t.ended.Add(1) < 2 { // closing the link hands the second end on
				if err = sendEnd(f.to); err != nil {
					err = errWrite{err}
				}
			}
		}
	}
	if err == nil {
		if t.ended.Load() == 2 {
			t.link.close()
		} else {
			// A reset may follow an end: the other side must not take what it got for whole.
			f.quiet.Store(true)
			err = f.src.ends(&t.halted)
		}
	}
	if err != nil && err != errHalted { // a link that has ended already keeps its reason
		read, write := ClientReset, ServerReset
		if f == &t.down {
			read, write = write, read
		}
		if errors.As(err, new(errWrite)) {
			read = write
		}
		t.link.end(read)
	}
	if t.left.Add(-1) == 0 {
		t.last()
	}
}

// last runs when no direction does.
func (t *tunnel) last() {
	t.link.mu.Lock()
	halted := t.halted.Load()
	t.over = !halted
	t.link.mu.Unlock()
	if halted {
		close(t.still)
	} else {
		t.finish(t)
	}
}
