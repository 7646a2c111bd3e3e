// Package quota bounds what each of many can have written. A refusal costs nobody anything but those who keep it.
package quota

import (
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// The share of what is refused to one: 17,280 a day.
const (
	Every = 5 * time.Second
	Burst = 500
)

// most are kept, each with a share of his own. Those beyond have one share together.
const most = 1024

// Quota gives each its share. Its methods wait for nobody.
type Quota[K comparable] struct {
	every time.Duration
	burst int

	mu     sync.Mutex
	shares map[K]*share
	swept  time.Time
}

type share struct {
	pace *rate.Limiter
	left Left
}

// Left is what found its share used up, since the last that tells. The zero Left is nothing.
type Left struct {
	Count uint64
	Since time.Time // of the first
}

// New makes a Quota: burst at once, and one more every so often.
func New[K comparable](every time.Duration, burst int) *Quota[K] {
	return &Quota[K]{every: every, burst: burst, shares: map[K]*share{}}
}

// Take says whether one more of who's is to be written, and then what was not before it; else it is counted. The zero K is who
// is beyond those that are kept.
func (q *Quota[K]) Take(who K, now time.Time) (before Left, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	s := q.shares[who]
	if s == nil && len(q.shares) >= most {
		if now.Sub(q.swept) >= q.every { // not for each of a flood
			q.forgetLocked(now)
		}
		if len(q.shares) >= most {
			who = *new(K)
			s = q.shares[who]
		}
	}
	if s == nil {
		s = &share{pace: rate.NewLimiter(rate.Every(q.every), q.burst)}
		q.shares[who] = s
	}
	if !s.pace.AllowN(now, 1) {
		if s.left.Count == 0 {
			s.left.Since = now
		}
		s.left.Count++
		return Left{}, false
	}
	before, s.left = s.left, Left{}
	return before, true
}

// Untold is what was not written and no Take told. It is told by this.
func (q *Quota[K]) Untold(now time.Time) map[K]Left {
	q.mu.Lock()
	defer q.mu.Unlock()
	all := map[K]Left{}
	for who, s := range q.shares {
		if s.left.Count > 0 {
			all[who], s.left = s.left, Left{}
		}
	}
	q.forgetLocked(now)
	return all
}

// forgetLocked drops the shares that are as good as new.
func (q *Quota[K]) forgetLocked(now time.Time) {
	q.swept = now
	for who, s := range q.shares {
		if s.left.Count == 0 && s.pace.TokensAt(now) >= float64(q.burst) {
			delete(q.shares, who)
		}
	}
}
