package vpn

import (
	"net/netip"
	"testing"
	"time"
)

func TestReservedAddressIsNobodyElses(t *testing.T) {
	p := NewPool(netip.MustParsePrefix("10.77.0.0/29")) // .2 to .6
	now := time.Unix(0, 0)
	alice, bob, carol := "alice", "bob", "carol"
	three, four := netip.MustParseAddr("10.77.0.3"), netip.MustParseAddr("10.77.0.4")
	take := func(who string, at time.Time) string {
		a, err := p.Take(who, at)
		if err != nil {
			return err.Error()
		}
		return a.String()
	}
	p.Reserve([]netip.Addr{three}, now)
	for i, want := range []string{"10.77.0.2", "10.77.0.4", "10.77.0.5", "10.77.0.6", ErrPoolEmpty.Error()} {
		if got := take(bob, now); got != want {
			t.Fatalf("take %d: %s, want %s", i, got, want)
		}
	}
	if !p.TakeReserved(three, alice, now) || p.TakeReserved(three, alice, now) {
		t.Error("it is had once at a time")
	}
	if p.TakeReserved(netip.MustParseAddr("10.77.0.6"), alice, now) {
		t.Error("one that is not reserved is had as if it were")
	}
	p.Release(three, now)
	if !p.TakeReserved(three, alice, now) {
		t.Error("it rests after its own user")
	}
	p.Release(three, now)
	if p.TakeReserved(three, carol, now.Add(Quarantine-1)) || !p.TakeReserved(three, carol, now.Add(Quarantine)) {
		t.Error("after another user it rests, so long and no longer")
	}
	p.Release(three, now.Add(Quarantine))

	// Reserved while it is held and after: its holder keeps it, and does not get it again.
	p.Reserve([]netip.Addr{three, four}, now)
	p.Release(four, now)
	if got := take(bob, now.Add(2*Quarantine)); got != ErrPoolEmpty.Error() {
		t.Errorf("bob got %s, another's", got)
	}
	// Free again, they come back to the pool, rested.
	p.Reserve(nil, now.Add(3*Quarantine))
	if got := take(carol, now.Add(4*Quarantine-1)); got != three.String() {
		t.Errorf("carol got %s, want the one she had", got)
	}
	if got := take(alice, now.Add(4*Quarantine-1)); got != ErrPoolEmpty.Error() {
		t.Errorf("alice got %s, which rests", got)
	}
	if got := take(alice, now.Add(4*Quarantine)); got != four.String() {
		t.Errorf("alice got %s, want %v", got, four)
	}
}
