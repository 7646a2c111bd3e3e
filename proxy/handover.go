package proxy

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Passage is a socket pair (SOCK_SEQPACKET) that outlives the process: tunnels wait in its queue, as descriptors in flight, for
// the next one. Who gives it up unread ends them with a reset, which is how their sockets are set (see cutWithUs).
type Passage struct{ in, out *os.File }

// NewPassage makes one.
func NewPassage() (*Passage, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	// More than a system's default takes. Without CAP_NET_ADMIN it is less, and what finds no room is reset.
	unix.SetsockoptInt(pair[1], unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, passageRoom)
	return &Passage{os.NewFile(uintptr(pair[0]), "passage"), os.NewFile(uintptr(pair[1]), "passage")}, nil
}

// OpenPassage takes one up again, of its Ends.
func OpenPassage(in, out *os.File) (*Passage, error) {
	for _, f := range []*os.File{in, out} {
		raw, err := f.SyscallConn()
		if err != nil {
			return nil, err
		}
		kind := 0
		if e := raw.Control(func(fd uintptr) { kind, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_TYPE) }); e != nil || err != nil || kind != unix.SOCK_SEQPACKET {
			return nil, fmt.Errorf("%s is no end of a passage: %v %v, type %d", f.Name(), e, err, kind)
		}
	}
	return &Passage{in, out}, nil
}

// Ends are what must outlive the process.
func (p *Passage) Ends() (in, out *os.File) { return p.in, p.out }

// Close gives it up.
func (p *Passage) Close() { p.in.Close(); p.out.Close() }

// Bounds of a handover. None keeps the process from ending.
const (
	passageRoom    = 64 << 20
	passageTunnels = 100       // in a message, two descriptors each: the kernel takes 253
	passageMessage = 128 << 10 // bytes
	lastRequests   = time.Second
	flushSoon      = 50 * time.Millisecond
	flushPatience  = 2 * time.Second
	flushRoom      = 4 << 20 // more than a pipe and a buffer hold
)

// handed is a tunnel on its way. Its descriptors travel beside it: the client's, then the server's.
type handed struct {
	Access   Access
	Accepted time.Time
	Proved   bool // see link.tls
	Ended    [2]bool
	Rates    [2]uint64 // that the sockets were told
}

// Hand has tunnels go on in the next process that has p, and those of the one before in this. It must be called before Run.
func (s *Server) Hand(p *Passage) { s.passage = p }

// handOver sends away every tunnel that stands. Nothing of a stream is left in this process then: what was on its way through
// it is in the receiving socket, for which room is made if it must be.
func (s *Server) handOver() {
	if s.passage == nil {
		return
	}
	s.awaitRequests()
	began := time.Now()
	var halting []*tunnel
	for _, l := range s.links.all() {
		if t := l.halt(); t != nil {
			halting = append(halting, t)
		}
	}
	soon, late := time.After(flushSoon), time.After(flushPatience)
	for i := 0; i < len(halting); {
		select {
		case <-halting[i].still:
			i++
		case <-soon:
			for _, t := range halting {
				t.makeRoom()
			}
		case <-late:
			for _, t := range halting {
				select {
				case <-t.still:
				default:
					t.link.end(Shutdown) // and then it is
				}
			}
		}
	}
	batch := make([]*tunnel, 0, passageTunnels)
	records, size, sent := make([]json.RawMessage, 0, passageTunnels), 0, 0
	flush := func() {
		if len(batch) > 0 && s.send(batch, records) {
			sent += len(batch)
		}
		batch, records, size = batch[:0], records[:0], 0
	}
	for _, t := range halting {
		t.restoreRoom()
		record, ok := s.pack(t)
		if !ok {
			s.finished(t)
			continue
		}
		if len(batch) == passageTunnels || size+len(record) > passageMessage {
			flush()
		}
		batch, records, size = append(batch, t), append(records, record), size+len(record)+1
	}
	flush()
	if len(halting) > 0 {
		s.log.Info("proxied connections handed over", "connections", sent, "reset", len(halting)-sent, "took_ms", float64(time.Since(began).Microseconds())/1000)
	}
}

// awaitRequests gives requests under way a moment to become tunnels, or to be answered.
func (s *Server) awaitRequests() {
	for until := time.Now().Add(lastRequests); time.Now().Before(until); time.Sleep(5 * time.Millisecond) {
		busy := s.arriving.Load() > 0
		for _, l := range s.links.all() {
			busy = busy || l.underWay(time.Now())
		}
		if !busy {
			return
		}
	}
}

// underWay reports a request that is not a tunnel yet, or that may be about to come.
func (l *link) underWay(now time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended != "" || l.tunnel != nil && l.tunnel.left.Load() > 0 {
		return false
	}
	return l.current != nil || now.Sub(l.began) < lastRequests
}

// halt makes the link's tunnel stop where nothing is half done, and returns it; nil if it has none that stands.
func (l *link) halt() *tunnel {
	l.mu.Lock()
	defer l.mu.Unlock()
	t := l.tunnel
	if t == nil || l.ended != "" || t.over || t.left.Load() == 0 {
		return nil
	}
	t.still = make(chan struct{})
	t.halted.Store(true)
	t.up.src.disturb()
	t.down.src.disturb()
	t.wake()
	return t
}

// makeRoom has both sockets take at once what is on its way to them, however slowly the other side reads. It is a handful of
// tunnels that need it, for what a pipe holds.
func (t *tunnel) makeRoom() {
	for _, f := range []*flow{&t.up, &t.down} {
		select {
		case <-t.still:
			return
		default:
		}
		control(f.to, func(fd int) {
			if f.room, _ = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF); f.room > 0 {
				// The option is half of what it then reads.
				unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, 0)
				unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, (f.room+flushRoom)/2)
			}
		})
	}
}

// restoreRoom leaves the size of the buffers to the kernel again, as it was.
func (t *tunnel) restoreRoom() {
	for _, f := range []*flow{&t.up, &t.down} {
		if f.room == 0 {
			continue
		}
		control(f.to, func(fd int) {
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, f.room/2)
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_BUF_LOCK, 0)
			if f.pace.rate != 0 && f.pace.rate != paceFreely {
				unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, paceUnsent)
			}
		})
	}
}

func control(c *net.TCPConn, fn func(fd int)) {
	if raw, err := c.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) { fn(int(fd)) })
	}
}

// pack takes a still tunnel from its link, which nothing ends from then on. False: it has ended.
func (s *Server) pack(t *tunnel) (json.RawMessage, bool) {
	s.account(t, 0)
	l := t.link
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended != "" {
		return nil, false
	}
	a := *t.access
	a.Up, a.Down = t.up.moved.Load(), t.down.moved.Load()
	b, err := json.Marshal(handed{Access: a, Accepted: l.began, Proved: l.tls, Ended: [2]bool{t.up.past, t.down.past}, Rates: [2]uint64{t.up.pace.rate, t.down.pace.rate}})
	if err != nil || len(b) > passageMessage {
		s.log.Error("a proxied connection is reset: it cannot be described", "id", a.ID, "bytes", len(b), "err", err)
		return nil, false
	}
	l.ended = HandedOver
	return b, true
}

// send puts tunnels into the passage, all or none, and closes them here: without a word where they went, else with a reset.
func (s *Server) send(batch []*tunnel, records []json.RawMessage) bool {
	message, err := json.Marshal(records)
	if err == nil {
		var conns []syscall.Conn
		for _, t := range batch {
			conns = append(conns, t.link.client, t.server)
		}
		var raw syscall.RawConn
		if raw, err = s.passage.out.SyscallConn(); err == nil {
			err = withDescriptors(conns, nil, func(fds []int) error {
				var sent error
				err := raw.Control(func(fd uintptr) {
					sent = os.NewSyscallError("sendmsg", unix.Sendmsg(int(fd), message, unix.UnixRights(fds...), nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL))
				})
				return errors.Join(err, sent)
			})
		}
	}
	for _, t := range batch {
		if err == nil {
			t.link.client.Close()
			t.server.Close()
			s.links.remove(t.link)
			continue
		}
		t.link.mu.Lock()
		t.link.ended = Shutdown
		t.link.mu.Unlock()
		reset(t.link.client)
		reset(t.server)
		s.finished(t)
	}
	if err != nil {
		s.log.Error("proxied connections not handed over", "connections", len(batch), "err", err)
	}
	return err == nil
}

// withDescriptors calls fn with the descriptors of conns, none of which is closed meanwhile.
func withDescriptors(conns []syscall.Conn, fds []int, fn func([]int) error) (err error) {
	if len(conns) == 0 {
		return fn(fds)
	}
	raw, err := conns[0].SyscallConn()
	if err != nil {
		return err
	}
	if e := raw.Control(func(fd uintptr) { err = withDescriptors(conns[1:], append(fds, int(fd)), fn) }); e != nil {
		return e
	}
	return err
}

// takeOver goes on with the tunnels of the process before: those that sessions and policy of this one allow.
func (s *Server) takeOver() {
	if s.passage == nil {
		return
	}
	s.reload.Lock() // no policy comes between a judgement and the link that the next reload judges
	defer s.reload.Unlock()
	taken, refused := 0, 0
	for {
		message, fds, err := s.passage.receive()
		if err == io.EOF {
			break
		}
		var list []handed
		if err == nil {
			if err = json.Unmarshal(message, &list); err == nil && 2*len(list) != len(fds) {
				err = fmt.Errorf("%d descriptors for %d tunnels", len(fds), len(list))
			}
		}
		if err != nil {
			s.log.Error("proxied connections of an earlier run are reset", "descriptors", len(fds), "err", err)
			for _, fd := range fds {
				unix.Close(fd) // with RST: see cutWithUs
			}
			if message == nil {
				break
			}
			continue
		}
		for i, h := range list {
			if s.resume(h, fds[2*i], fds[2*i+1]) {
				taken++
			} else {
				refused++
			}
		}
	}
	if taken+refused > 0 {
		s.log.Info("proxied connections taken over", "connections", taken, "refused", refused)
	}
}

// receive returns a message and its descriptors, or io.EOF if there is none. A nil message with another error: there is no use
// in trying again.
func (p *Passage) receive() (message []byte, fds []int, err error) {
	raw, err := p.in.SyscallConn()
	if err != nil {
		return nil, nil, err
	}
	message, oob := make([]byte, 2*passageMessage), make([]byte, unix.CmsgSpace(4*253))
	var n, on, flags int
	if e := raw.Control(func(fd uintptr) {
		for {
			if n, on, flags, _, err = unix.Recvmsg(int(fd), message, oob, unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC); err != unix.EINTR {
				return
			}
		}
	}); e != nil {
		return nil, nil, e
	}
	switch {
	case err == unix.EAGAIN || err == nil && n == 0 && on == 0:
		return nil, nil, io.EOF
	case err != nil:
		return nil, nil, os.NewSyscallError("recvmsg", err)
	}
	controls, err := unix.ParseSocketControlMessage(oob[:on])
	if err != nil {
		return message[:n], nil, err
	}
	for _, c := range controls {
		more, err := unix.ParseUnixRights(&c)
		if err != nil {
			return message[:n], fds, err
		}
		fds = append(fds, more...)
	}
	if flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		err = errors.New("cut short")
	}
	return message[:n], fds, err
}

// resume relays on, if it is allowed. The descriptors are its own.
func (s *Server) resume(h handed, client, server int) bool {
	a := h.Access
	fail := func(err error) bool {
		s.log.Error("a proxied connection of an earlier run is reset", "id", a.ID, "user", a.User, "err", err)
		return false
	}
	cc, err1 := connOf(client)
	sc, err2 := connOf(server)
	if err := errors.Join(err1, err2); err != nil {
		for _, c := range []*net.TCPConn{cc, sc} {
			if c != nil {
				reset(c)
			}
		}
		return fail(err)
	}
	l := &link{source: a.Source, client: cc, began: h.Accepted, who: identity{session: a.Session, user: a.User, device: a.Device}}
	t := newTunnel(l, sc)
	t.parking, t.crew, t.access, t.finish = s.parking, s.crew, &a, s.finished
	t.up.moved.Store(a.Up)
	t.down.moved.Store(a.Down)
	for i, f := range []*flow{&t.up, &t.down} {
		n := f.moved.Load()
		f.told, f.pace.moved, f.pace.rate = n, n, h.Rates[i]
		if f.past = h.Ended[i]; f.past {
			t.ended.Add(1)
		}
		if info := tcpInfo(f.to); info != nil {
			f.pace.acked = info.Bytes_acked
		}
	}
	t.lull = s.state.Load().Idle // or longer: the kernel knows
	holder, _ := s.sessions.ByAddress(l.source.Addr())
	l.who.groups, l.paced = holder.Groups, t.down.pace.rate
	s.links.add(l)
	why := Reason("")
	q := Request{User: a.User, Groups: l.who.groups, Destination: a.Destination}
	d, st := l.serve(&q, &s.state)
	l.attach(t)
	l.mu.Lock()
	l.tls = h.Proved
	l.mu.Unlock()
	switch {
	case !s.alive(l) || holder.User != a.User || !leadsTo(cc, a.Source) || !leadsTo(sc, a.Dialed):
		why = NoSession
	case !l.allowed(st) || !d.Allow || !s.dialer.judge(st.policy, q, a.Dialed.Addr()).Allow:
		why = PolicyChanged
	}
	up, err1 := newSource(cc, s.buffers)
	down, err2 := newSource(sc, s.buffers)
	if err := errors.Join(err1, err2); err != nil && why == "" {
		fail(err)
		why = Shutdown
	}
	if why != "" {
		l.end(why)
		s.finished(t)
		return false
	}
	t.startParked(up, down)
	return true
}

// leadsTo is false for another's connection. One that has ended on both sides does not say any more whose it was.
func leadsTo(c *net.TCPConn, peer netip.AddrPort) bool {
	r := remote(c)
	return r == peer || !r.IsValid()
}

// connOf makes a connection of a descriptor, which is gone then.
func connOf(fd int) (*net.TCPConn, error) {
	f := os.NewFile(uintptr(fd), "tunnel")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	tc, ok := c.(*net.TCPConn)
	if !ok {
		c.Close()
		return nil, fmt.Errorf("%T is no TCP connection", c)
	}
	cutWithUs(tc)
	tc.SetKeepAliveConfig(keepAlive)
	return tc, nil
}
