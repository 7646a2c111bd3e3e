package client

import (
	"math/rand/v2"
	"time"
)

// vitals are what a keeper decides from.
type vitals struct {
	now      time.Time
	asked    time.Time // last initiation sent by UDP
	answered time.Time // last handshake complete
	moved    bool      // another network, or a wake from sleep
	cut      bool      // the stream broke that was the only way
	stopped  bool      // data came fast, and then none
	unheard  time.Time // data left and were sent again, and nothing has come back; zero: no such
	revived  int       // revivals since the last answer
	lost     bool      // the gate does not know the session
	young    bool      // of a renewed session, until data pass
	nextTry  time.Time // no attempt before
	renewAt  time.Time
}

type action int

const (
	nothing action = iota
	healthy        // an answer came: forget earlier trouble
	shake          // see whether a handshake is answered
	revive         // knock, shake hands again, and ask the gate
	renew          // ask for a new session
)

// decide is pure; it is asked at every beat.
func (v vitals) decide() action {
	silent := v.asked.After(v.answered) && v.now.Sub(v.asked) > answerPatience
	switch {
	case v.moved:
		return revive
	case v.now.Before(v.nextTry):
		return nothing
	case !v.now.Before(v.renewAt):
		return renew
	case silent && v.revived >= reviveLimit:
		return renew
	case silent, v.cut:
		return revive
	case v.stopped:
		return shake
	case !v.unheard.IsZero():
		if v.now.Sub(v.unheard) >= dataPatience && !v.asked.After(v.unheard) {
			return shake
		}
	case !v.asked.After(v.answered) && v.revived > 0:
		return healthy
	}
	return nothing
}

// pause grows with each attempt in vain, and never falls in step with other clients'.
func pause(attempt int, longest time.Duration) time.Duration {
	d := min(time.Second<<min(attempt, 16), longest)
	return d*3/4 + rand.N(d/2)
}

// flow sees data that come fast and then not at all.
type flow struct {
	heard uint64 // at the last beat, bytes
	fast  bool
	quiet int // beats since
}

// stopped is asked at every beat, and true once after each stop.
func (f *flow) stopped(heard uint64) bool {
	came := heard - f.heard
	f.heard = heard
	switch {
	case came >= many:
		f.fast, f.quiet = true, 0
	case came > 0:
		f.quiet = 0
	case f.fast:
		if f.quiet++; f.quiet == lull {
			f.fast = false
			return true
		}
	}
	return false
}

// renewTime is well before the end: a tenth of the session's life, ten minutes at most.
func renewTime(began, ends time.Time) time.Time {
	early := min(ends.Sub(began)/10, 10*time.Minute)
	return ends.Add(-early - rand.N(early/4+1))
}
