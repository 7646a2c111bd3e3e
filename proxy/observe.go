package proxy

import (
	"cmp"
	"slices"
	"sync"
	"time"
)

const (
	observedMost  = 1000 // destinations that are told apart
	observedUsers = 20   // of each that are named
)

// Observation is a destination that was let through only because rules are observed: what enforcing them would refuse.
type Observation struct {
	Destination string    `json:"destination"` // empty: all those for which there was no room
	Reason      Reason    `json:"reason,omitempty"`
	Rule        int       `json:"rule,omitempty"`
	Requests    int       `json:"requests"`
	Users       []string  `json:"users"` // in the order in which they came, the first twenty
	Last        time.Time `json:"last"`
}

// Observed counts observations since it was made. It is ready for use as it is.
type Observed struct {
	mu   sync.Mutex
	seen map[observedKey]*Observation
}

type observedKey struct {
	destination string
	reason      Reason
	rule        int
}

// Access is a watcher of the proxy.
func (o *Observed) Access(a Access) {
	if !a.Decision.Observed {
		return
	}
	k := observedKey{a.Destination.String(), a.Decision.Reason, a.Decision.Rule}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.seen == nil {
		o.seen = map[observedKey]*Observation{}
	}
	if o.seen[k] == nil && len(o.seen) >= observedMost {
		k = observedKey{}
	}
	n := o.seen[k]
	if n == nil {
		n = &Observation{Destination: k.destination, Reason: k.reason, Rule: k.rule}
		o.seen[k] = n
	}
	n.Requests++
	n.Last = a.Began
	if len(n.Users) < observedUsers && !slices.Contains(n.Users, a.User) {
		n.Users = append(n.Users, a.User)
	}
}

// Most are those with the most requests, n at most.
func (o *Observed) Most(n int) []Observation {
	o.mu.Lock()
	defer o.mu.Unlock()
	all := make([]Observation, 0, len(o.seen))
	for _, s := range o.seen {
		c := *s
		c.Users = slices.Clone(s.Users)
		all = append(all, c)
	}
	slices.SortFunc(all, func(a, b Observation) int {
		return cmp.Or(cmp.Compare(b.Requests, a.Requests), cmp.Compare(a.Destination, b.Destination), cmp.Compare(a.Reason, b.Reason), cmp.Compare(a.Rule, b.Rule))
	})
	return all[:min(n, len(all))]
}
