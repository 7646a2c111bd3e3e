package proxy

import (
	"math"
	"sync"
	"time"
)

// paceRepay is the time in which what is owed is paid back.
const paceRepay = 2 * paceEvery

// bucket is what somebody has moved, up and down, beyond his limit: the emptiness of a token bucket that full holds nothing. It
// outlives connections, or whoever opened new ones again and again would have what new ones begin with, again and again.
type bucket struct {
	owed  [2]float64 // bytes
	begun [2]float64 // bytes a second that new tunnels were told since bandwidth was last shared
}

func (b *bucket) allows(limit float64, way int) float64 {
	return max(limit-b.owed[way]/paceRepay.Seconds(), 0)
}

// pay takes off what the limit allowed in the time that has passed, and reports whether nothing is owed any more.
func (b *bucket) pay(limit float64, way int, passed time.Duration) bool {
	b.owed[way] = max(b.owed[way]-limit*passed.Seconds(), 0)
	b.begun[way] = 0
	return *b == bucket{}
}

// begin is what one more tunnel of so many may begin with: half of what those that just began have left, so that any number of them
// begin with no more than the limit.
func (b *bucket) begin(limit float64, way, of int) float64 {
	if math.IsInf(limit, 1) {
		return limit
	}
	allowed := b.allows(limit, way)
	rate := max(min(allowed/float64(of), (allowed-b.begun[way])/2), 0)
	b.begun[way] += rate
	return rate
}

// debts is the buckets of those who owe something, and that of all.
type debts struct {
	mu    sync.Mutex
	users map[string]*bucket
	all   bucket
}

func (d *debts) userLocked(user string) *bucket {
	b := d.users[user]
	if b == nil {
		b = &bucket{}
		d.users[user] = b
	}
	return b
}

func (d *debts) charge(user string, way int, bytes float64) {
	if bytes == 0 {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.userLocked(user).owed[way] += bytes
	d.all.owed[way] += bytes
}

// pay forgets who owes nothing.
func (d *debts) pay(st *state, way int, passed time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for user, b := range d.users {
		if b.pay(bytesOf(st.PerUserBandwidth), way, passed) {
			delete(d.users, user)
		}
	}
	d.all.pay(bytesOf(st.Bandwidth), way, passed)
}

func (d *debts) begin(st *state, user string, way, ofUser, ofAll int) float64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return min(d.userLocked(user).begin(bytesOf(st.PerUserBandwidth), way, ofUser), d.all.begin(bytesOf(st.Bandwidth), way, ofAll))
}

func (d *debts) allows(st *state, user string, way int) float64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	limit := bytesOf(st.PerUserBandwidth)
	if b := d.users[user]; b != nil {
		return b.allows(limit, way)
	}
	return limit
}

func (d *debts) allowsAll(st *state, way int) float64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.all.allows(bytesOf(st.Bandwidth), way)
}
