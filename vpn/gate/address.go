package gate

import (
	"errors"
	"net/netip"
	"time"

	"perimeterd/internal/identity"
	"perimeterd/internal/session"
)

// Reserve makes addresses be those of users, and nobody else's.
func (g *Gate) Reserve(users map[netip.Addr]string) {
	g.begin.Lock()
	defer g.begin.Unlock()
	var list []netip.Addr
	for a := range users {
		if g.cfg.Network.Contains(a) {
			list = append(list, a)
		}
	}
	g.pool.Reserve(list, time.Now())
	// After a restart they are owned by the device that had them last, and would rest after it.
	for _, s := range g.store.List() {
		if users[s.Address] == s.User {
			g.pool.Own(s.Address, userKey(s.User))
		}
	}
	released, err := g.store.Released()
	if err != nil {
		g.log.Error("users' own addresses rest for longer than they need to", "err", err)
	}
	for _, r := range released {
		if users[r.Address] == r.User {
			g.pool.Own(r.Address, userKey(r.User))
		}
	}
}

// owner is whose address stays his: a renewed certificate changes nothing.
func owner(user, device string) string { return user + "\x00" + device }

// userKey owns an address that a user's devices share, one after another.
func userKey(name string) string { return name }

// address takes one for a new session: the user's own where he has one. A session of the same certificate that holds it
// gives it up first, since a client that renews its session should keep the address. While another device of his holds it, or
// it rests after another user, the session gets one of the pool.
func (g *Gate) address(id identity.Identity, device string, now time.Time) (netip.Addr, error) {
	own := id.Settings.Address
	if !own.IsValid() {
		return g.pool.Take(owner(id.User, device), now)
	}
	if s, held := g.store.ByAddress(own); held && s.Certificate == id.Certificate {
		if err := g.store.End(s.ID, session.Replaced); err != nil && !errors.Is(err, session.ErrNotFound) {
			return netip.Addr{}, err
		}
	}
	if _, held := g.store.ByAddress(own); !held {
		g.reclaim(own, id.User, now)
	}
	if g.pool.TakeReserved(own, userKey(id.User), now) {
		return own, nil
	}
	g.log.Info("the user's own address is not free: the session gets another", "user", id.User, "address", own)
	return g.pool.Take(owner(id.User, device), now)
}

// reclaim gives a user's own address back to him while connections of his own last session still end: they are reset already.
func (g *Gate) reclaim(own netip.Addr, user string, now time.Time) {
	g.rest.Lock()
	defer g.rest.Unlock()
	for id, s := range g.ended {
		if s.Address == own && s.User == user {
			g.pool.Release(own, now)
			delete(g.ended, id)
		}
	}
}
