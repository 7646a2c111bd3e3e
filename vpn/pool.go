package vpn

import (
	"errors"
	"net/netip"
	"sync"
	"time"
)

// Quarantine is how long a released address waits before another owner gets it: longer than a TCP peer retransmits
// (RFC 9293 and Linux's tcp_retries2: some 15 minutes), so that no old connection's bytes reach a new owner.
const Quarantine = 20 * time.Minute

// ErrPoolEmpty is returned when every address is held or in quarantine.
var ErrPoolEmpty = errors.New("no free tunnel address")

// Pool hands out the addresses of an IPv4 network but its first two (the network, the daemon) and its last (broadcast).
// An address stays with its owner, a device of a user: who comes back gets the one he had, quarantine or not.
type Pool struct {
	mu       sync.Mutex
	first    netip.Addr
	next     netip.Addr // never handed out yet, from here on
	end      netip.Addr // the broadcast address
	owners   map[netip.Addr]string
	held     map[netip.Addr]bool
	byOwner  map[string][]netip.Addr
	released []release // in order of time
	last     map[netip.Addr]time.Time
	reserved map[netip.Addr]bool
}

type release struct {
	address netip.Addr
	at      time.Time
}

// NewPool makes a pool of network, whose first address is the daemon's.
func NewPool(network netip.Prefix) *Pool {
	network = network.Masked()
	last := network.Addr().As4()
	for i := network.Bits(); i < 32; i++ {
		last[i/8] |= 0x80 >> (i % 8)
	}
	first := network.Addr().Next().Next()
	return &Pool{first: first, next: first, end: netip.AddrFrom4(last), owners: map[netip.Addr]string{}, held: map[netip.Addr]bool{},
		byOwner: map[string][]netip.Addr{}, last: map[netip.Addr]time.Time{}, reserved: map[netip.Addr]bool{}}
}

// Size is how many addresses network has for clients.
func Size(network netip.Prefix) int { return 1<<(32-network.Bits()) - 3 }

// Take holds an address for owner. ErrPoolEmpty: try again after Quarantine at the latest.
func (p *Pool) Take(owner string, now time.Time) (netip.Addr, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, a := range p.byOwner[owner] {
		if !p.held[a] && !p.reserved[a] {
			p.held[a] = true
			return a, nil
		}
	}
	for p.next.Less(p.end) {
		a := p.next
		p.next = a.Next()
		if _, used := p.owners[a]; !used && !p.reserved[a] { // Hold may have come first
			p.holdLocked(a, owner)
			return a, nil
		}
	}
	for len(p.released) > 0 && now.Sub(p.released[0].at) >= Quarantine {
		r := p.released[0]
		p.released = p.released[1:]
		// Its owner may have come back since, and gone again later.
		if a := r.address; !p.held[a] && !p.reserved[a] && p.last[a].Equal(r.at) {
			p.disownLocked(a)
			p.holdLocked(a, owner)
			return a, nil
		}
	}
	return netip.Addr{}, ErrPoolEmpty
}

// Reserve makes these addresses, and no others, be had by TakeReserved alone. Whoever holds one keeps it until he releases it.
func (p *Pool) Reserve(list []netip.Addr, now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	before := p.reserved
	p.reserved = map[netip.Addr]bool{}
	for _, a := range list {
		p.reserved[a] = true
		delete(before, a)
	}
	for a := range before {
		// Everybody's again, after a rest: Take may have passed over it by now.
		if !p.held[a] && a.Less(p.next) {
			p.last[a] = now
			p.released = append(p.released, release{a, now})
		}
	}
}

// TakeReserved holds a reserved address for owner, and says whether it could: somebody may hold it, or have released it less
// than Quarantine ago.
func (p *Pool) TakeReserved(a netip.Addr, owner string, now time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	before, had := p.owners[a]
	if !p.reserved[a] || p.held[a] || had && before != owner && now.Sub(p.last[a]) < Quarantine {
		return false
	}
	p.disownLocked(a)
	p.holdLocked(a, owner)
	return true
}

// Own makes an address that is held, or rests, be owner's.
func (p *Pool) Own(a netip.Addr, owner string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, had := p.owners[a]; had {
		p.disownLocked(a)
		p.ownLocked(a, owner)
	}
}

// Hold marks an address as owner's, for sessions that come back after a restart.
func (p *Pool) Hold(a netip.Addr, owner string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.disownLocked(a)
	p.holdLocked(a, owner)
}

// Rest notes that owner gave an address back at a time, before this pool was there. It is to be called in the order of
// these times, and before Hold. Addresses of another network are nobody's here.
func (p *Pool) Rest(a netip.Addr, owner string, at time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if a.Less(p.first) || !a.Less(p.end) {
		return
	}
	p.disownLocked(a)
	p.ownLocked(a, owner)
	p.last[a] = at
	p.released = append(p.released, release{a, at})
}

// Release begins the quarantine of an address that Take or Hold held.
func (p *Pool) Release(a netip.Addr, now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.held[a] {
		delete(p.held, a)
		p.last[a] = now
		// Entries whose address was taken again since say nothing any more.
		for len(p.released) > 0 && (p.held[p.released[0].address] || !p.last[p.released[0].address].Equal(p.released[0].at)) {
			p.released = p.released[1:]
		}
		p.released = append(p.released, release{a, now})
	}
}

func (p *Pool) holdLocked(a netip.Addr, owner string) {
	p.held[a] = true
	p.ownLocked(a, owner)
}

func (p *Pool) ownLocked(a netip.Addr, owner string) {
	p.owners[a] = owner
	p.byOwner[owner] = append(p.byOwner[owner], a)
}

func (p *Pool) disownLocked(a netip.Addr) {
	owner, ok := p.owners[a]
	if !ok {
		return
	}
	delete(p.owners, a)
	list := p.byOwner[owner]
	for i, x := range list {
		if x == a {
			list = append(list[:i], list[i+1:]...)
			break
		}
	}
	if len(list) == 0 {
		delete(p.byOwner, owner)
	} else {
		p.byOwner[owner] = list
	}
}
