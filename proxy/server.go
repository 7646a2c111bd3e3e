package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"perimeterd/internal/quota"
	"perimeterd/internal/session"
)

const (
	headTimeout = 10 * time.Second
	// excess is how many connections beyond a limit are still told so; more are reset unheard.
	excess = 64
)

// keepAlive finds dead peers in two minutes and wakes sleeping laptops once a minute at most.
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: time.Minute, Interval: 15 * time.Second, Count: 4}

// Sessions knows who holds a tunnel address. It must see an end before SessionEvent is called for it.
type Sessions interface {
	ByAddress(netip.Addr) (session.Session, bool)
}

// Server is the proxy.
type Server struct {
	sessions Sessions
	log      *slog.Logger
	lines    *quota.Quota[string] // of refusals, by user
	watchers []func(Access)
	traffic  []func(user string, up, down int64)
	state    atomic.Pointer[state]
	reload   sync.Mutex
	dialer   *dialer
	links    *registry
	arriving atomic.Int64 // connections that are no link yet
	debts    *debts
	buffers  *sync.Pool
	parking  *parking
	crew     *crew
	plain    *plain
	passage  *Passage // nil: tunnels end with the process
}

type state struct {
	Config
	policy *Policy
}

// New makes a proxy that Run will serve. It refuses a configuration that makes no sense.
func New(cfg Config, sessions Sessions, log *slog.Logger) (*Server, error) {
	st, err := compile(cfg)
	if err != nil {
		return nil, err
	}
	s := &Server{
		sessions: sessions, log: log, lines: quota.New[string](quota.Every, quota.Burst), dialer: newDialer(), links: newRegistry(), debts: &debts{users: map[string]*bucket{}},
		buffers: &sync.Pool{New: func() any { b := make([]byte, bufferSize); return &b }},
	}
	if s.parking, err = newParking(); err != nil {
		return nil, err
	}
	s.crew = newCrew()
	s.state.Store(st)
	s.plain = newPlain(s)
	return s, nil
}

func compile(cfg Config) (*state, error) {
	policy, err := Compile(cfg)
	if err := errors.Join(err, cfg.limits()); err != nil {
		return nil, err
	}
	return &state{Config: cfg, policy: policy}, nil
}

// Run serves l until ctx ends, then resets every connection that does not go on in another process and returns nil. L is closed. A Server runs once.
func (s *Server) Run(ctx context.Context, l net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	closed := make(chan struct{})
	context.AfterFunc(ctx, func() {
		defer close(closed)
		l.Close()
	})
	s.checkFiles()
	var tasks, looking sync.WaitGroup
	tasks.Go(s.parking.run)
	s.takeOver()
	looking.Go(func() { s.sweep(ctx) })
	looking.Go(func() { s.pace(ctx) })
	tasks.Go(s.plain.run)
	err := s.accept(ctx, l)
	cancel()
	<-closed
	looking.Wait()
	s.handOver()
	<-s.links.close(Shutdown)
	s.parking.close()
	s.plain.close()
	s.crew.dismiss()
	tasks.Wait()
	return err
}

// checkFiles warns where the process may not open what its connections would take. It goes on: then the kernel's limit holds.
func (s *Server) checkFiles() {
	const others = 1000 // gate, tunnel, state, name servers
	var limit unix.Rlimit
	most := s.state.Load().Connections
	if want := uint64(2*most + others); unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) == nil && limit.Cur < want {
		s.log.Warn("proxy.connections is more than the limit of open files allows: raise LimitNOFILE, or lower it",
			"connections", most, "wants", want, "limit", limit.Cur)
	}
}

func (s *Server) accept(ctx context.Context, l net.Listener) error {
	for pause := time.Duration(0); ; {
		c, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			// Out of descriptors or memory, or a connection that is gone, passes.
			if !errors.Is(err, unix.EMFILE) && !errors.Is(err, unix.ENFILE) && !errors.Is(err, unix.ENOBUFS) && !errors.Is(err, unix.ENOMEM) && !errors.Is(err, unix.ECONNABORTED) {
				return fmt.Errorf("proxy: accept: %w", err)
			}
			pause = min(max(2*pause, 5*time.Millisecond), time.Second)
			s.log.Warn("proxy: accept", "err", err, "pause", pause)
			time.Sleep(pause)
			continue
		}
		pause = 0
		tc, ok := c.(*net.TCPConn)
		if !ok {
			c.Close()
			return fmt.Errorf("proxy: the listener gives %T: only plain TCP connections can be spliced", c)
		}
		s.arriving.Add(1)
		s.crew.do(func() { s.serve(tc) })
	}
}

// serve takes a connection up to the point where a tunnel or net/http has it.
func (s *Server) serve(c *net.TCPConn) {
	l := s.admit(c)
	s.arriving.Add(-1)
	if l == nil {
		return
	}
	src, err := newSource(c, s.buffers)
	if err != nil {
		s.drop(l, ClientReset)
		return
	}
	h, n, err := s.readHead(l, src)
	if err != nil {
		heard := len(src.bytes()) > 0
		src.release()
		gone := n < 0 && !errors.Is(err, os.ErrDeadlineExceeded)
		if gone || !heard { // browsers open connections that they may never use
			s.drop(l, Closed)
			return
		}
		s.refuse(l, s.begin(l, h.method, h.target), h, reasonOf(err), err)
		return
	}
	if h.method == "CONNECT" {
		src.skip(n)
		s.connect(l, h, src)
		return
	}
	s.plain.take(l, h, src)
}

// admit ties a connection to the session that holds its address. It returns nil when there is none.
func (s *Server) admit(c *net.TCPConn) *link {
	l := &link{source: remote(c), client: c, began: time.Now()}
	holder, ok := s.sessions.ByAddress(l.source.Addr())
	if !ok {
		a := s.begin(l, "", "")
		a.Decision.Reason = NoSession
		reset(c)
		s.done(a)
		return nil
	}
	l.who = identity{session: holder.ID, user: holder.User, device: holder.Device, groups: holder.Groups}
	users, all := s.links.add(l)
	// The session may have ended before the link was there to be found by its end.
	if !s.alive(l) {
		a := s.begin(l, "", "")
		a.Decision.Reason = NoSession
		s.done(a)
		s.drop(l, NoSession)
		return nil
	}
	st := s.state.Load()
	beyond := users - st.PerUserConnections
	if l.extra = TooMany; beyond <= 0 {
		l.extra, beyond = Full, all-st.Connections
	}
	switch {
	case beyond <= 0:
		l.extra = ""
	case beyond > excess:
		a := s.begin(l, "", "")
		a.Decision.Reason = l.extra
		s.done(a)
		s.drop(l, l.extra)
		return nil
	}
	return l
}

// alive reports whether the address still belongs to the session that the link began with.
func (s *Server) alive(l *link) bool {
	now, ok := s.sessions.ByAddress(l.source.Addr())
	return ok && now.ID == l.who.session
}

// readHead collects and parses the head, which is the first n bytes of src. N is negative when the client went away.
func (s *Server) readHead(l *link, src *source) (h head, n int, err error) {
	l.client.SetReadDeadline(l.began.Add(headTimeout))
	defer l.client.SetReadDeadline(time.Time{})
	for seen := 0; n == 0; {
		if err := src.more(); err != nil {
			return h, -1, err
		}
		if n, err = headEnd(src.bytes(), seen); err != nil {
			return h, 0, err
		}
		seen = len(src.bytes())
	}
	h, err = parseHead(src.bytes()[:n])
	return h, n, err
}

// drop ends a link that serves nothing.
func (s *Server) drop(l *link, why Reason) {
	if why == Closed {
		l.close()
	} else {
		l.end(why)
	}
	s.links.remove(l)
}

// SessionEvent resets every connection of a session that has ended, before it returns.
func (s *Server) SessionEvent(e session.Event) {
	if e.Ended == "" {
		return
	}
	for _, l := range s.links.of(e.Session.ID) {
		l.end(Reason(e.Ended))
	}
}

// Connections counts a session's live connections. Its address must not be given away before there are none.
func (s *Server) Connections(id session.ID) int { return len(s.links.of(id)) }

// Live counts all live connections of clients.
func (s *Server) Live() int { return s.links.count() }

// Policy is the one in force.
func (s *Server) Policy() *Policy { return s.state.Load().policy }

// Reload puts another configuration in force, or leaves everything as it was and says why. Live connections that it does
// not allow are reset before it returns.
func (s *Server) Reload(cfg Config) error {
	s.reload.Lock()
	defer s.reload.Unlock()
	if old := s.state.Load(); cfg.Listen != old.Listen {
		return fmt.Errorf("proxy.port: %v cannot become %v while running: restart the daemon", old.Listen, cfg.Listen)
	}
	st, err := compile(cfg)
	if err != nil {
		return err
	}
	s.state.Store(st)
	for _, l := range s.links.all() {
		if !l.allowed(st) {
			l.end(PolicyChanged)
		}
	}
	return nil
}

// sweep ends what has been silent, or has lived, for too long, counts what has moved, and parks what has not.
func (s *Server) sweep(ctx context.Context) {
	var memory reclaim
	var links []*link
	for last := time.Now(); ; {
		st := s.state.Load()
		// Often enough that a limit is exceeded by an eighth, and by five seconds at most.
		pause := min(st.Idle, st.Lifetime) / 8
		select {
		case <-ctx.Done():
			return
		case <-time.After(max(min(pause, 5*time.Second), 10*time.Millisecond)):
		}
		now := time.Now()
		links = s.links.appendAll(links[:0])
		moving := s.look(st, links, now, now.Sub(last))
		clear(links)
		last = now
		if memory.due(readMemory(), moving, now) {
			runtime.GC() // what is pooled lives through one collection
			debug.FreeOSMemory()
		}
	}
}

// look is the sweep's at a moment, passed after the one before. It reports how many directions are sent to the parking. Of ten thousand
// silent tunnels it must not make garbage each time.
func (s *Server) look(st *state, links []*link, now time.Time, passed time.Duration) (moving int) {
	for _, l := range links {
		t := l.now()
		if t != nil {
			s.account(t, passed)
		}
		if why := l.stale(now, passed, st.Idle, st.Lifetime); why != "" {
			l.end(why)
		} else if t != nil {
			moving += t.rest()
		}
	}
	return moving
}
