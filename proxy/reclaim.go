package proxy

import "time"

// reclaim tells when what Go keeps free of memory is worth giving back: after thousands of tunnels have come to rest, or gone, it
// is more than half of what the process holds, and the runtime gives it back slowly or, below its goal, never.
// A round costs a collection, some 30 ms of CPU beside those who talk.
type reclaim struct {
	seen  int // tunnels, at the last look
	given int // and when memory was last given back
	when  time.Time
}

const (
	reclaimFor   = 1000            // tunnels more or fewer
	reclaimEvery = time.Minute     // at most
	reclaimAgain = 5 * time.Minute // while as many stay: garbage of the sweeps and lines comes back
)

// due says whether the time has come: the number differs and stands still, or has stood for long.
func (r *reclaim) due(n int, now time.Time) bool {
	moved, differs := diff(n, r.seen), diff(n, r.given)
	r.seen = n
	again := n >= reclaimFor && now.Sub(r.when) >= reclaimAgain
	if differs < reclaimFor && !again || moved > max(differs, n)/10 || now.Sub(r.when) < reclaimEvery {
		return false
	}
	r.given, r.when = n, now
	return true
}

func diff(a, b int) int { return max(a-b, b-a) }
