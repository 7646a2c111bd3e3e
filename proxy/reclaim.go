package proxy

import (
	"runtime/metrics"
	"time"
)

// reclaim tells when the process's memory that is nobody's is worth giving back. After thousands of tunnels have come to rest, or
// gone, it is more than half of what is resident, and the runtime gives it back slowly or, below its goal, never.
// A round takes 15 to 100 ms of CPU beside those who talk, and stops them for a millisecond. It leaves what Go never gives back: 0.5 KB of
// each goroutine and 0.6 KB of each descriptor that there ever were at once.
type reclaim struct {
	allocated uint64 // bytes ever, at the last look
	when      time.Time
}

const (
	reclaimLeast  = 8 << 20 // bytes
	reclaimShare  = 8       // of what lives, an eighth: what a collection costs grows with that
	reclaimEvery  = 2 * time.Minute
	reclaimMoving = 100      // directions
	reclaimBusy   = 8        // of what is free, an eighth allocated from one look to the next: it would soon be there again
	stackOf       = 16 << 10 // bytes of a goroutine's stack at most, nearly always; those of the dead are freed by a collection
)

// memory is what the Go runtime has.
type memory struct {
	live      uint64 // bytes that the last collection found in use
	free      uint64 // bytes that are nobody's, or that a collection would find so, and are resident
	allocated uint64 // bytes ever
}

// readMemory costs some microseconds, and stops nobody.
func readMemory() memory {
	s := [...]metrics.Sample{
		{Name: "/gc/heap/live:bytes"}, {Name: "/memory/classes/heap/objects:bytes"}, {Name: "/memory/classes/heap/free:bytes"},
		{Name: "/memory/classes/heap/stacks:bytes"}, {Name: "/sched/goroutines:goroutines"}, {Name: "/gc/heap/allocs:bytes"},
	}
	metrics.Read(s[:])
	at := func(i int) uint64 { return s[i].Value.Uint64() }
	m := memory{live: at(0), free: at(2), allocated: at(5)}
	m.free += at(1) - min(at(0), at(1))
	m.free += at(3) - min(stackOf*at(4), at(3))
	return m
}

// due says whether the time has come. Moving is how many have just been told to come to rest, and will have freed their stacks at
// the next look.
func (r *reclaim) due(m memory, moving int, now time.Time) bool {
	allocated := m.allocated - r.allocated
	r.allocated = m.allocated
	if moving > reclaimMoving || m.free < max(reclaimLeast, m.live/reclaimShare) || allocated > m.free/reclaimBusy || now.Sub(r.when) < reclaimEvery {
		return false
	}
	r.when = now
	return true
}
