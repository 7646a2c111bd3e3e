package event

import (
	"cmp"
	"net/netip"
	"slices"
	"time"
)

// Rate lets Burst events pass at once, and one more after each Every. Both are positive, and their product is below a
// century.
type Rate struct {
	Burst int
	Every time.Duration
}

// Limits bound what is written of events that strangers cause.
type Limits struct {
	Source  Rate // of one source: an IPv4 address or an IPv6 /64, which is what one host can take addresses from
	Global  Rate // of all together
	Sources int  // how many are told apart; the one unseen for longest makes room
}

// StrangerLimits is at most 100 lines at once and 86,500 a day, some 20 MB, whatever strangers send.
func StrangerLimits() Limits {
	return Limits{Source: Rate{10, 6 * time.Second}, Global: Rate{100, time.Second}, Sources: 4096}
}

// Limiter decides which events are written, and counts those that are not. It keeps no clock, and is for one goroutine at
// a time.
type Limiter struct {
	limits Limits
	global bucket
	index  map[netip.Addr]int32
	table  []source // used in part until it is full; 0 is the ring's head and no source
	others uint64   // suppressed, of sources that made room since
}

// source is an element of a ring, most recently seen first.
type source struct {
	addr         netip.Addr
	bucket       bucket
	suppressed   uint64
	newer, older int32
}

// NewLimiter makes a Limiter whose memory is taken now.
func NewLimiter(l Limits) *Limiter {
	return &Limiter{limits: l, index: make(map[netip.Addr]int32, l.Sources), table: make([]source, 1, l.Sources+1)}
}

// Allow tells whether an event of a source at now is to be written. One that is not costs neither bucket anything.
func (l *Limiter) Allow(from netip.Addr, now time.Time) bool {
	s, at := l.seen(host(from)), now.UnixNano()
	mine, ok := s.bucket.take(l.limits.Source, at)
	global, okGlobal := l.global.take(l.limits.Global, at)
	if !ok || !okGlobal {
		s.suppressed++
		return false
	}
	s.bucket, l.global = mine, global
	return true
}

// host is what one limit is for.
func host(a netip.Addr) netip.Addr {
	if a = a.Unmap(); a.Is6() {
		p, _ := a.Prefix(64) // never fails: an IPv6 address has 64 bits
		return p.Addr()
	}
	return a
}

// seen finds a source, or makes room for it, and moves it to the front.
func (l *Limiter) seen(a netip.Addr) *source {
	i, known := l.index[a]
	switch {
	case known:
		l.unlink(i)
	case len(l.table) < cap(l.table):
		i = int32(len(l.table))
		l.table = append(l.table, source{addr: a})
	default:
		i = l.table[0].newer // the ring's end
		l.unlink(i)
		delete(l.index, l.table[i].addr)
		l.others += l.table[i].suppressed
		l.table[i] = source{addr: a}
	}
	if !known {
		l.index[a] = i
	}
	s, head := &l.table[i], &l.table[0]
	s.newer, s.older = 0, head.older
	l.table[head.older].newer = i
	head.older = i
	return s
}

func (l *Limiter) unlink(i int32) {
	s := &l.table[i]
	l.table[s.newer].older, l.table[s.older].newer = s.older, s.newer
}

// Suppressed is how many events of a source were not written.
type Suppressed struct {
	Source netip.Prefix // the zero Prefix: all sources that are not named
	Count  uint64
}

// reported is how many sources a report names.
const reported = 20

// Report is what was suppressed since the last one: the sources with most first, then the rest in one sum.
func (l *Limiter) Report() (list []Suppressed) {
	for i := range l.table[1:] {
		if s := &l.table[i+1]; s.suppressed > 0 {
			bits := s.addr.BitLen()
			if s.addr.Is6() {
				bits = 64
			}
			list = append(list, Suppressed{netip.PrefixFrom(s.addr, bits), s.suppressed})
			s.suppressed = 0
		}
	}
	slices.SortFunc(list, func(a, b Suppressed) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), a.Source.Addr().Compare(b.Source.Addr()))
	})
	rest := l.others
	l.others = 0
	for _, s := range list[min(reported, len(list)):] {
		rest += s.Count
	}
	list = list[:min(reported, len(list))]
	if rest > 0 {
		list = append(list, Suppressed{Count: rest})
	}
	return list
}

// bucket of tokens, as the time in Unix nanoseconds at which it is full (again): one number says both level and time.
type bucket int64

// take is the bucket without one token at now, and whether it had one. A clock that was set back empties the bucket at
// worst; it fills at its pace all the same.
func (b bucket) take(r Rate, now int64) (bucket, bool) {
	size := int64(r.Burst) * int64(r.Every)
	full := min(max(int64(b), now), now+size) + int64(r.Every)
	return bucket(full), full <= now+size
}
