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
// itself: data is spliced as without a limit. Five times a second it is looked at who sends, and shared anew.
const (
	paceEvery   = 200 * time.Millisecond
	paceLeast   = 4 << 10   // bytes a second: with nothing at all a socket would never show that it wants to send
	paceUnsent  = 128 << 10 // bytes that wait in a limited socket: enough for a burst, and a new share is felt soon
	paceHasLess = 0.8       // of its part: who moves less has all it wants

	paceFreely = ^uint64(0) // the kernel's word for no limit
)

// pace is what the pacer knows of a flow. It is the link's lock's.
type pace struct {
	moved   int64  // when it was last looked at
	acked   uint64 // the same, by the kernel's count, which goes on in a splice
	rate    uint64 // bytes a second that the socket was told; 0: none yet
	backlog bool   // bytes wait in the socket
}

// want is how many bytes a second the flow would like: 0 is silent, infinite is more than it gets.
func (f *flow) want(passed time.Duration) float64 {
	p := &f.pace
	moved := f.moved.Load()
	if moved == p.moved && !f.splicing.Load() && !p.backlog {
		return 0
	}
	info := tcpInfo(f.to)
	if info == nil {
		return 0
	}
	got := float64(info.Bytes_acked-p.acked) / passed.Seconds()
	p.moved, p.acked, p.backlog = moved, info.Bytes_acked, info.Notsent_bytes > 0
	if got >= paceHasLess*float64(p.rate) {
		return math.Inf(1)
	}
	return max(got/paceHasLess, paceLeast)
}

// hold tells the socket its rate, if that is another.
func (f *flow) hold(rate float64) {
	r, unsent := paceFreely, 0 // the system's own
	if !math.IsInf(rate, 1) {
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
// have as much, and share what is then left, to grow into. So all together never begin more than twice the limit.
func divide(limit float64, wants []float64) (rates []float64) {
	rates = make([]float64, len(wants))
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

// first gives a link's new tunnel an equal part of what its user may have, and everybody.
func (s *Server) first(st *state, l *link) {
	if !st.limited() && l.paced == 0 {
		return
	}
	ofUser, all := s.links.counts(l.who.user)
	rate := min(bytesOf(st.PerUserBandwidth)/float64(ofUser), bytesOf(st.Bandwidth)/float64(all))
	l.hold((*tunnel).upward, rate)
	l.hold((*tunnel).downward, rate)
}

// pace shares bandwidth until ctx ends.
func (s *Server) pace(ctx context.Context) {
	tick := time.NewTicker(paceEvery)
	defer tick.Stop()
	limited := false
	for last := time.Now(); ; {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			st := s.state.Load()
			if was := limited; st.limited() || was { // once more, to take limits off
				limited = st.limited()
				s.share(st, now.Sub(last))
			}
			last = now
		}
	}
}

func (st *state) limited() bool { return st.Bandwidth != 0 || st.PerUserBandwidth != 0 }

// share looks at all links, and gives each its part, up and down apart.
func (s *Server) share(st *state, passed time.Duration) {
	byUser := map[string][]*link{}
	for _, l := range s.links.all() {
		byUser[l.who.user] = append(byUser[l.who.user], l)
	}
	users := slices.Collect(maps.Values(byUser))
	for _, flow := range []func(*tunnel) *flow{(*tunnel).upward, (*tunnel).downward} {
		wants, sums := make([][]float64, len(users)), make([]float64, len(users))
		for u, links := range users {
			for _, l := range links {
				w := l.want(flow, passed)
				wants[u] = append(wants[u], w)
				sums[u] += w
			}
			sums[u] = min(sums[u], bytesOf(st.PerUserBandwidth))
		}
		for u, part := range divide(bytesOf(st.Bandwidth), sums) {
			for i, rate := range divide(min(part, bytesOf(st.PerUserBandwidth)), wants[u]) {
				users[u][i].hold(flow, rate)
			}
		}
	}
}

func (l *link) want(of func(*tunnel) *flow, passed time.Duration) float64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.tunnel == nil || l.ended != "" {
		return 0
	}
	return of(l.tunnel).want(passed)
}

func (l *link) hold(of func(*tunnel) *flow, rate float64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.tunnel != nil && l.ended == "" {
		of(l.tunnel).hold(rate)
	}
}
