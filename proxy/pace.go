package proxy

import (
	"context"
	"maps"
	"math"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Bandwidth is shared by telling each sending socket how fast it may send (SO_MAX_PACING_RATE), which the kernel keeps by
// itself: data is spliced as without a limit. Five times a second it is looked at who sends, and shared anew. What was moved
// beyond a limit meanwhile is owed (see bucket), whoever has closed his connection since.
const (
	paceEvery   = 200 * time.Millisecond
	paceLeast   = 4 << 10   // bytes a second: with nothing at all a socket would never show that it wants to send
	paceUnsent  = 128 << 10 // bytes that wait in a limited socket: enough for a burst, and a new share is felt soon
	paceHasLess = 0.8       // of its part: who moves less has all it wants

	paceFreely = ^uint64(0) // the kernel's word for no limit
)

// pace is what the pacer knows of a flow. It is the link's lock's.
type pace struct {
	known   bool   // base and start are those of its begin, or of the time when there came to be a limit
	base    uint64 // acked, and
	start   int64  // moved, then
	moved   int64  // when it was last looked at
	acked   uint64 // the same, by the kernel's count, which goes on in a splice
	rate    uint64 // bytes a second that the socket was told; 0: none yet
	backlog bool   // bytes wait in the socket
}

// begin notes where counting begins. The client's socket may have served other requests.
func (f *flow) begin(info *unix.TCPInfo) {
	p, moved := &f.pace, f.moved.Load()
	p.known, p.base, p.start, p.acked, p.moved = true, info.Bytes_acked, moved, info.Bytes_acked, moved
}

// want is how many bytes a second the flow would like, 0 is silent, infinite is more than it gets; and how many bytes it has
// sent since it was last looked at.
func (f *flow) want(passed time.Duration) (rate, sent float64) {
	p := &f.pace
	moved := f.moved.Load()
	if p.known && moved == p.moved && !f.splicing.Load() && !p.backlog {
		return 0, 0
	}
	info := tcpInfo(f.to)
	if info == nil {
		return 0, 0
	}
	if !p.known {
		f.begin(info)
	}
	sent = float64(info.Bytes_acked - p.acked)
	got := sent / passed.Seconds()
	p.moved, p.acked, p.backlog = moved, info.Bytes_acked, info.Notsent_bytes > 0
	if got >= paceHasLess*float64(p.rate) {
		return math.Inf(1), sent
	}
	return max(got/paceHasLess, paceLeast), sent
}

// rest is what a flow that has ended moved since want was asked last, or what waits in its socket to be moved.
func (f *flow) rest() float64 {
	p := &f.pace
	if !p.known {
		return 0
	}
	n := f.moved.Load() - p.start - int64(p.acked-p.base)
	p.known = false
	return float64(max(n, 0))
}

// hold tells the socket its rate, if that is another.
func (f *flow) hold(rate float64) {
	r, unsent := paceFreely, 0 // the system's own
	if math.IsInf(rate, 1) {
		f.pace.known = false // nobody looks at it from now on
	} else {
		r, unsent = max(uint64(rate), paceLeast), paceUnsent
	}
	old := f.pace.rate
	if old == r || old == 0 && r == paceFreely || old != paceFreely && r != paceFreely && max(old, r)-min(old, r) < old/16 {
		return
	}
	raw, err := f.to.SyscallConn()
	if err != nil {
		return
	}
	raw.Control(func(fd uintptr) {
		if unix.SetsockoptUint64(int(fd), unix.SOL_SOCKET, unix.SO_MAX_PACING_RATE, r) == nil &&
			unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, unsent) == nil {
			f.pace.rate = r
		}
	})
}

// bytesOf is bytes a second of bits a second, infinite for no limit.
func bytesOf(bits uint64) float64 {
	if bits == 0 {
		return math.Inf(1)
	}
	return float64(bits) / 8
}

// divide shares a limit. Who is silent may begin with an equal part; those who send get what they want as long as the others
// have as much, and share what is then left, to grow into. So all together never begin more than twice the limit; what they moved of it
// beyond the limit is owed. The result is in rates, if there is room.
func divide(limit float64, wants, rates []float64) []float64 {
	rates = slices.Grow(rates[:0], len(wants))[:len(wants)]
	clear(rates)
	sending := 0
	for i, w := range wants {
		if w > 0 && !math.IsInf(limit, 1) {
			sending++
		} else {
			rates[i] = limit / float64(len(wants))
		}
	}
	left := limit
	for waiting := sending; waiting > 0; {
		part, before := left/float64(waiting), waiting
		for i, w := range wants {
			if rates[i] == 0 && w <= part {
				rates[i] = w
				left -= w
				waiting--
			}
		}
		if waiting == before { // all others want more than there is
			for i := range wants {
				if rates[i] == 0 {
					rates[i] = part
				}
			}
			return rates
		}
	}
	for i, w := range wants {
		if w > 0 && sending > 0 {
			rates[i] += left / float64(sending)
		}
	}
	return rates
}

// first gives a link's new tunnel a part of what its user may have, and everybody, until bandwidth is shared anew.
func (s *Server) first(st *state, l *link) {
	if !st.limited() && l.paced == 0 {
		return
	}
	ofUser, all := s.links.counts(l.who.user)
	for way, of := range ways {
		rate := s.debts.begin(st, l.who.user, way, ofUser, all)
		l.paces(of, func(f *flow) {
			if info := tcpInfo(f.to); info != nil {
				f.begin(info)
			}
			f.hold(rate) // which forgets that, if there is no limit
		})
	}
}

// settleUp charges what a tunnel that has ended moved last.
func (s *Server) settleUp(t *tunnel) {
	if !s.state.Load().limited() {
		return
	}
	for way, of := range ways {
		t.link.mu.Lock()
		n := of(t).rest()
		t.link.mu.Unlock()
		s.debts.charge(t.link.who.user, way, n)
	}
}

// pace shares bandwidth until ctx ends.
func (s *Server) pace(ctx context.Context) {
	tick := time.NewTicker(paceEvery)
	defer tick.Stop()
	limited := false
	var sh sharing
	for last := time.Now(); ; {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			st := s.state.Load()
			if st.limited() || limited { // once more, to take limits off
				s.share(st, now.Sub(last), &sh)
				if limited = st.limited(); !limited {
					sh = sharing{}
				}
			}
			last = now
		}
	}
}

func (st *state) limited() bool { return st.Bandwidth != 0 || st.PerUserBandwidth != 0 }

// sharing is who shares, in memory that is used each time: thousands who are silent are not to make garbage.
type sharing struct {
	links              []*link
	users              []*sharer
	by                 map[string]*sharer
	wants, most, parts []float64 // by user
}

type sharer struct {
	user         string
	links        []*link
	wants, rates []float64 // by link
}

// gather finds who has links, and which.
func (sh *sharing) gather(r *registry) {
	for _, u := range sh.users {
		clear(u.links)
		u.links = u.links[:0]
	}
	sh.links, sh.users = r.appendAll(sh.links[:0]), sh.users[:0]
	if sh.by == nil {
		sh.by = map[string]*sharer{}
	}
	for _, l := range sh.links {
		u := sh.by[l.who.user]
		if u == nil {
			u = &sharer{user: l.who.user}
			sh.by[u.user] = u
		}
		if len(u.links) == 0 {
			sh.users = append(sh.users, u)
		}
		u.links = append(u.links, l)
	}
	clear(sh.links)
	maps.DeleteFunc(sh.by, func(_ string, u *sharer) bool { return len(u.links) == 0 })
}

// share looks at all links, and gives each its part, up and down apart.
func (s *Server) share(st *state, passed time.Duration, sh *sharing) {
	sh.gather(s.links)
	for way, flow := range ways {
		sh.wants, sh.most = sh.wants[:0], sh.most[:0]
		for _, u := range sh.users {
			u.wants = u.wants[:0]
			sum, sent := 0.0, 0.0
			for _, l := range u.links {
				w, n := l.want(flow, passed)
				u.wants = append(u.wants, w)
				sum += w
				sent += n
			}
			sh.wants = append(sh.wants, sum)
			s.debts.charge(u.user, way, sent)
		}
		s.debts.pay(st, way, passed)
		for i, u := range sh.users {
			sh.most = append(sh.most, s.debts.allows(st, u.user, way))
			sh.wants[i] = min(sh.wants[i], sh.most[i])
		}
		sh.parts = divide(s.debts.allowsAll(st, way), sh.wants, sh.parts)
		for i, u := range sh.users {
			u.rates = divide(min(sh.parts[i], sh.most[i]), u.wants, u.rates)
			for j, rate := range u.rates {
				u.links[j].hold(flow, rate)
			}
		}
	}
}

// ways are the directions: up, down.
var ways = [2]func(*tunnel) *flow{(*tunnel).upward, (*tunnel).downward}

func (l *link) want(of func(*tunnel) *flow, passed time.Duration) (rate, sent float64) {
	l.paces(of, func(f *flow) { rate, sent = f.want(passed) })
	return rate, sent
}

func (l *link) hold(of func(*tunnel) *flow, rate float64) {
	l.paces(of, func(f *flow) { f.hold(rate) })
}

// paces calls fn for the flow of a tunnel that lasts.
func (l *link) paces(of func(*tunnel) *flow, fn func(*flow)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.tunnel != nil && l.ended == "" {
		fn(of(l.tunnel))
	}
}
