package gate

import (
	"net/http"
	"net/netip"
	"slices"
	"testing"
	"time"

	"perimeterd/internal/identity"
	"perimeterd/internal/session"
)

func TestAUsersOwnSettingsGoBeforeEverybodys(t *testing.T) {
	b := newBench(t, nil) // two sessions a certificate, of 12 hours
	alice, other, bob := b.user("alice", "mac", 24*time.Hour), b.user("alice", "desk", 24*time.Hour), b.user("bob", "mac", 24*time.Hour)
	own, one, max := netip.MustParseAddr("10.77.0.3"), 1, int64(3600)
	if _, _, err := b.users.Set("alice", identity.Change{Address: &own, Sessions: &one, SessionMax: &max}); err != nil {
		t.Fatal(err)
	}
	b.gate.Reserve(map[netip.Addr]string{own: "alice"})
	post := func(c *http.Client) netip.Addr {
		t.Helper()
		_, public := keyPair(t)
		return b.post(c, public).Address.Addr()
	}
	var bobs []netip.Addr
	for range 2 {
		bobs = append(bobs, post(bob))
	}
	if slices.Contains(bobs, own) {
		t.Errorf("bob has %v, alice's own among them", bobs)
	}
	if got := post(alice); got != own {
		t.Errorf("alice has %v, want her own", got)
	}
	if got := post(alice); got != own {
		t.Errorf("her next session has %v, want the same: it replaces the first", got)
	}
	if got := post(other); got == own {
		t.Error("her second device took the address from the first")
	}
	var live []string
	for _, s := range b.store.List() {
		if s.User == "alice" {
			live = append(live, s.Device)
			if left := s.Expires.Sub(s.Created); left != time.Hour {
				t.Errorf("a session of %v, want an hour", left)
			}
		}
	}
	if !slices.Equal(live, []string{"mac", "desk"}) {
		t.Errorf("alice's live sessions: %v", live)
	}
	post(other)
	if n := len(b.store.List()); n != 4 {
		t.Errorf("%d live sessions: a second one of a device replaces the first", n)
	}
	// Connections of her last session that still end do not keep it from her.
	b.gate.Track(func(session.ID) int { return 1 })
	if got := post(alice); got != own {
		t.Errorf("while connections end alice has %v", got)
	}
	b.gate.Track(func(session.ID) int { return 0 })
	b.gate.release(time.Now())
	if s, live := b.store.ByAddress(own); !live || s.User != "alice" || b.gate.pool.TakeReserved(own, userKey("alice"), time.Now()) {
		t.Error("the address is free, and alice's session has it")
	}

	// After a restart the address is still hers, although it was held by one of her devices only.
	for _, s := range b.store.List() {
		b.gate.pool.Hold(s.Address, owner(s.User, s.Device))
	}
	b.gate.Reserve(map[netip.Addr]string{own: "alice"})
	if got := post(alice); got != own {
		t.Errorf("then alice has %v", got)
	}
}
