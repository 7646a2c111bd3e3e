package proxy

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"perimeterd/internal/session"
)

// link is one connection of a client, from accept to its end, and the server's it leads to at the moment.
type link struct {
	who    identity
	source netip.AddrPort
	client *net.TCPConn
	began  time.Time
	extra  Reason // TooMany or Full: beyond a limit, told so, and closed

	mu      sync.Mutex
	cancel  context.CancelFunc // of the dial under way
	tunnel  *tunnel
	paced   uint64   // the rate that client was told by the tunnel before
	current *Request // being served
	dialed  netip.Addr
	tls     bool // the tunnel has opened as its rule wants it, or will have to
	ended   Reason
}

// identity is what a link keeps of its session, as it was at accept.
type identity struct {
	session      session.ID
	user, device string
	groups       []string
}

// serve decides the request that is served from now on. A reload comes before, or it finds and judges the request.
func (l *link) serve(q *Request, in *atomic.Pointer[state]) (Decision, *state) {
	l.mu.Lock()
	defer l.mu.Unlock()
	st := in.Load()
	d := st.policy.Decide(*q)
	l.current, l.dialed, l.tls = q, netip.Addr{}, d.TLS
	return d, st
}

// unproved notes a tunnel that did not open as TLS for its name, and goes on since rules are only observed.
func (l *link) unproved() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.tls = false
}

// allowed judges by another policy what the link serves, if it serves anything.
func (l *link) allowed(by *state) bool {
	l.mu.Lock()
	q, dialed, proved := l.current, l.dialed, l.tls
	l.mu.Unlock()
	if q == nil {
		return true
	}
	d := by.policy.Decide(*q)
	if d.TLS && !proved && !by.Observe {
		return false
	}
	if d.Allow && dialed.IsValid() {
		d = by.policy.DecideAddress(*q, dialed)
	}
	return d.Allow
}

// dialing returns the context of a dial, which the link's end cancels. Done must be called after.
func (l *link) dialing() (ctx context.Context, done func()) {
	ctx, cancel := context.WithTimeout(context.Background(), dialTimeout)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cancel = cancel; l.ended != "" {
		cancel()
	}
	return ctx, func() {
		cancel()
		l.mu.Lock()
		defer l.mu.Unlock()
		l.cancel = nil
	}
}

// attach ties the server's connection to the link. It reports false, and resets it, when the link has ended.
func (l *link) attach(t *tunnel) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended != "" {
		reset(t.server)
		return false
	}
	l.tunnel, l.dialed, t.down.pace.rate = t, remote(t.server).Addr(), l.paced
	return true
}

// detach closes the server's connection; the link may serve another request.
func (l *link) detach() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.tunnel != nil {
		finish(l.tunnel.server)
		l.paced = l.tunnel.down.pace.rate
	}
	l.tunnel, l.current = nil, nil
}

// end resets both sides. The first reason stays.
func (l *link) end(why Reason) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended != "" {
		return
	}
	if l.ended = why; l.cancel != nil {
		l.cancel()
	}
	reset(l.client)
	if l.tunnel != nil {
		reset(l.tunnel.server)
		l.tunnel.wake()
	}
}

// close closes both sides after all has been said.
func (l *link) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended != "" {
		return
	}
	l.ended = Closed
	finish(l.client)
	if l.tunnel != nil {
		finish(l.tunnel.server)
	}
}

func (l *link) why() Reason {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.ended
}

// now is the tunnel that the link has at the moment, or nil.
func (l *link) now() *tunnel {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.tunnel
}

// stale says why the link must end now: it has lived, or been silent, for too long. Passed is the time since the last look.
func (l *link) stale(now time.Time, passed, idle, lifetime time.Duration) Reason {
	if now.Sub(l.began) >= lifetime {
		return Lifetime
	}
	l.mu.Lock()
	// Reading a head and dialing have deadlines of their own. What moved may have done so at any time before the look that saw it.
	recent := l.tunnel == nil || l.tunnel.lull+passed < idle
	l.mu.Unlock()
	if recent {
		return ""
	}
	// The kernel's own clock of data to and from the client sees what a splice moves, and what leaves a full socket.
	info := tcpInfo(l.client)
	if info != nil && time.Duration(min(info.Last_data_sent, info.Last_data_recv))*time.Millisecond >= idle {
		return Idle
	}
	return ""
}

// cutWithUs makes the kernel reset c if this process dies: with FIN, half of a file would look like the whole. It is to be
// closed by finish then, or what is queued is lost. Clients' connections are made so by Listen.
func cutWithUs(c *net.TCPConn) { c.SetLinger(0) }

// finish closes c after what is queued.
func finish(c *net.TCPConn) {
	c.SetLinger(-1)
	c.Close()
}

// tcpInfo is nil for a connection that is closed.
func tcpInfo(c *net.TCPConn) (info *unix.TCPInfo) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil
	}
	raw.Control(func(fd uintptr) { info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) })
	if err != nil {
		return nil
	}
	return info
}

// reset closes c with RST and drops what is queued: nobody may take what they have received for whole.
func reset(c *net.TCPConn) {
	c.SetLinger(0)
	c.Close()
}

func remote(c *net.TCPConn) netip.AddrPort {
	a, ok := c.RemoteAddr().(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(a.AddrPort().Addr().Unmap().WithZone(""), uint16(a.Port))
}

// registry knows every live link.
type registry struct {
	mu       sync.Mutex
	sessions map[session.ID]map[*link]struct{}
	users    map[string]int
	live     int
	closed   Reason        // once set, links end as they come
	empty    chan struct{} // closed, by once, when closed is set and no link is left
	once     sync.Once
}

func newRegistry() *registry {
	return &registry{sessions: map[session.ID]map[*link]struct{}{}, users: map[string]int{}, empty: make(chan struct{})}
}

// add returns how many links the user has now, and all users. It ends l when the registry is closed.
func (r *registry) add(l *link) (users, all int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	links := r.sessions[l.who.session]
	if links == nil {
		links = map[*link]struct{}{}
		r.sessions[l.who.session] = links
	}
	links[l] = struct{}{}
	r.users[l.who.user]++
	r.live++
	if r.closed != "" {
		l.end(r.closed)
	}
	return r.users[l.who.user], r.live
}

// remove takes out a link whose sockets are closed. Doing it twice is harmless.
func (r *registry) remove(l *link) {
	r.mu.Lock()
	defer r.mu.Unlock()
	links := r.sessions[l.who.session]
	if _, ok := links[l]; !ok {
		return
	}
	if delete(links, l); len(links) == 0 {
		delete(r.sessions, l.who.session)
	}
	r.live--
	if r.users[l.who.user]--; r.users[l.who.user] == 0 {
		delete(r.users, l.who.user)
	}
	r.settleLocked()
}

func (r *registry) settleLocked() {
	if r.closed != "" && len(r.sessions) == 0 {
		r.once.Do(func() { close(r.empty) })
	}
}

// counts is how many links the user has, and all users.
func (r *registry) counts(user string) (ofUser, all int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return max(r.users[user], 1), max(r.live, 1)
}

// of lists the links of a session.
func (r *registry) of(id session.ID) []*link {
	r.mu.Lock()
	defer r.mu.Unlock()
	links := make([]*link, 0, len(r.sessions[id]))
	for l := range r.sessions[id] {
		links = append(links, l)
	}
	return links
}

func (r *registry) all() []*link { return r.appendAll(nil) }

func (r *registry) appendAll(links []*link) []*link {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, of := range r.sessions {
		for l := range of {
			links = append(links, l)
		}
	}
	return links
}

// count is how many links there are.
func (r *registry) count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.live
}

// close ends every link, and those to come. The channel is closed when none is left.
func (r *registry) close(why Reason) <-chan struct{} {
	r.mu.Lock()
	r.closed = why
	r.settleLocked()
	r.mu.Unlock()
	for _, l := range r.all() {
		l.end(why)
	}
	return r.empty
}
