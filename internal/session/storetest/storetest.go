// Package storetest is what every session.Store must pass.
package storetest

import (
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"testing"
	"time"

	"perimeterd/internal/session"
)

// start is the time of every test's beginning. It is whole seconds in UTC, as any medium keeps it.
var start = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// Medium makes an empty medium and returns how to open a store on it at a time. To open it again closes the earlier store.
type Medium func(t *testing.T) (open func(now time.Time) session.Store)

// Run tries the contract of session.Store.
func Run(t *testing.T, medium Medium) {
	tests := []struct {
		name string
		fn   func(t *testing.T, open func(time.Time) session.Store)
	}{
		{"PutIsSeenByEveryReader", putIsSeen},
		{"EndLeavesNothing", endLeavesNothing},
		{"KeyOfAnotherCertificateIsRefused", keyBound},
		{"KeyOfAnEndedSessionIsRefused", keyUsed},
		{"KeyOfALongEndedSessionIsForgottenAndNoOther", keyForgotten},
		{"KeyOfALiveSessionIsRefused", keyLive},
		{"AddressOfALiveSessionIsRefused", addressTaken},
		{"RefusedPutChangesNothing", refusedPut},
		{"ReopenKeepsLiveSessionsOnly", reopen},
		{"NoteIsKeptIsNoEventAndRevivesNobody", note},
		{"WatchReplaysLiveSessionsThenEveryChangeInOrder", watch},
		{"WatcherSeesTheStoreAfterTheChange", watcherReads},
		{"ExpireEndsWhatIsDueAndNamesTheNext", expire},
		{"ClockThatWasSetBackLengthensNoLife", clockBack},
		{"ReleasedAddressesKeepTheirLastHolderAndTheirTime", released},
		{"ConcurrentUseKeepsOneHolderOfAnAddress", concurrent},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) { test.fn(t, medium(t)) })
	}
}

// sample is session number n of certificate c.
func sample(n, c byte) session.Session {
	s := session.Session{
		ID:          session.NewID(),
		User:        fmt.Sprintf("user%d", c),
		Device:      "mac",
		Groups:      []string{"operators", "all"},
		Credential:  uint32(c),
		Chain:       [][]byte{{0x30, c}, {0x30}},
		Address:     netip.AddrFrom4([4]byte{10, 77, 1, n}),
		Outer:       netip.MustParseAddr("2001:db8::1"),
		Created:     start.Add(time.Duration(n) * time.Second),
		Expires:     start.Add(time.Hour),
		KeyExchange: "X25519MLKEM768",
		PostQuantum: true,
	}
	s.PublicKey[0], s.PublicKey[31], s.PresharedKey[5], s.Certificate[0] = n, 7, n, c
	return s
}

func put(t *testing.T, st session.Store, all ...session.Session) {
	t.Helper()
	for _, s := range all {
		if err := st.Put(s); err != nil {
			t.Fatalf("Put(%v): %v", s.Address, err)
		}
	}
}

func wantList(t *testing.T, st session.Store, want ...session.Session) {
	t.Helper()
	got := st.List()
	slices.SortFunc(got, func(a, b session.Session) int { return a.Address.Compare(b.Address) })
	slices.SortFunc(want, func(a, b session.Session) int { return a.Address.Compare(b.Address) })
	if len(got) != len(want) {
		t.Fatalf("List has %d sessions, want %d", len(got), len(want))
	}
	for i := range want {
		if !reflect.DeepEqual(got[i], want[i]) {
			t.Fatalf("List:\n got %+v\nwant %+v", got[i], want[i])
		}
		if s, ok := st.Get(want[i].ID); !ok || !reflect.DeepEqual(s, want[i]) {
			t.Fatalf("Get(%v) = %+v, %v", want[i].ID, s, ok)
		}
		if s, ok := st.ByAddress(want[i].Address); !ok || s.ID != want[i].ID {
			t.Fatalf("ByAddress(%v) = %v, %v", want[i].Address, s.ID, ok)
		}
		var of []session.Session
		for _, s := range want {
			if s.Certificate == want[i].Certificate {
				of = append(of, s)
			}
		}
		slices.SortFunc(of, func(a, b session.Session) int { return a.Created.Compare(b.Created) })
		if got := st.Of(want[i].Certificate); !reflect.DeepEqual(got, of) {
			t.Fatalf("Of(%x) = %+v, want %+v", want[i].Certificate[0], got, of)
		}
	}
	if st.Len() != len(want) {
		t.Fatalf("Len is %d, want %d", st.Len(), len(want))
	}
}

// eventually is for what the passing of time alone brings.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !holds(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("never: ", what)
		}
	}
}

func wantErr(t *testing.T, what string, got, want error) {
	t.Helper()
	if !errors.Is(got, want) {
		t.Fatalf("%s: error %v, want %v", what, got, want)
	}
}

func putIsSeen(t *testing.T, open func(time.Time) session.Store) {
	st := open(start)
	wantList(t, st)
	a, b := sample(1, 1), sample(2, 1)
	put(t, st, a, b)
	wantList(t, st, a, b)
	if _, ok := st.Get(session.NewID()); ok {
		t.Fatal("Get found a session that never was")
	}
	if s, ok := st.ByAddress(netip.MustParseAddr("10.77.9.9")); ok || s.User != "" {
		t.Fatalf("ByAddress found %+v for an address that nobody holds", s)
	}
}

func endLeavesNothing(t *testing.T, open func(time.Time) session.Store) {
	st := open(start)
	a, b := sample(1, 1), sample(2, 2)
	put(t, st, a, b)
	wantErr(t, "End", st.End(a.ID, session.Kicked), nil)
	wantList(t, st, b)
	if _, ok := st.ByAddress(a.Address); ok {
		t.Fatal("the address of an ended session still names it")
	}
	wantErr(t, "second End", st.End(a.ID, session.Kicked), session.ErrNotFound)
	next := sample(3, 3)
	next.Address = a.Address
	put(t, st, next)
	wantList(t, st, next, b)
}

func keyBound(t *testing.T, open func(time.Time) session.Store) {
	st := open(start)
	a := sample(1, 1)
	thief := sample(2, 2)
	thief.PublicKey = a.PublicKey
	put(t, st, a)
	wantErr(t, "while live", st.Put(thief), session.ErrKeyBound)
	wantErr(t, "End", st.End(a.ID, session.Deleted), nil)
	wantErr(t, "after its end", st.Put(thief), session.ErrKeyBound)
	wantErr(t, "after reopening", open(start).Put(thief), session.ErrKeyBound)
}

func keyUsed(t *testing.T, open func(time.Time) session.Store) {
	st := open(start)
	a := sample(1, 1)
	again := sample(2, 1)
	again.PublicKey = a.PublicKey
	put(t, st, a)
	wantErr(t, "End", st.End(a.ID, session.Deleted), nil)
	wantErr(t, "after its end", st.Put(again), session.ErrKeyUsed)
	wantErr(t, "after reopening", open(start).Put(again), session.ErrKeyUsed)
}

// forget has a store look at its keys often enough for all of them, at a time.
func forget(st session.Store, now time.Time) {
	for range 10 {
		st.Expire(now)
	}
}

func keyForgotten(t *testing.T, open func(time.Time) session.Store) {
	st := open(start)
	ended, live := sample(1, 1), sample(2, 2)
	live.Expires = start.Add(3 * session.KeyMemory)
	put(t, st, ended, live)
	wantErr(t, "End", st.End(ended.ID, session.Deleted), nil)
	of := func(s session.Session) session.Session {
		next := sample(3, 3)
		next.PublicKey = s.PublicKey
		next.Created, next.Expires = start.Add(session.KeyMemory), live.Expires
		return next
	}
	early := start.Add(session.KeyMemory - time.Hour)
	st = open(early)
	forget(st, early)
	wantErr(t, "an hour before", st.Put(of(ended)), session.ErrKeyBound)
	late := start.Add(session.KeyMemory + time.Hour)
	st = open(late)
	forget(st, late)
	wantErr(t, "of the live session", st.Put(of(live)), session.ErrKeyBound)
	wantErr(t, "an hour after", st.Put(of(ended)), nil)
}

func clockBack(t *testing.T, open func(time.Time) session.Store) {
	st := open(start)
	a, b := sample(1, 1), sample(2, 2)
	a.Created, a.Expires = start, start.Add(200*time.Millisecond)
	b.Created = start
	put(t, st, a, b)
	yesterday := start.Add(-24 * time.Hour)
	eventually(t, "a running store ends what has lived its time", func() bool {
		st.Expire(yesterday)
		_, live := st.Get(a.ID)
		return !live
	})
	wantList(t, st, b)
	c := sample(3, 3)
	c.Created, c.Expires = start, start.Add(200*time.Millisecond)
	put(t, st, c)
	eventually(t, "a store that is opened again ends it too", func() bool { return open(yesterday).Len() == 1 })
	wantList(t, open(yesterday), b)
}

func released(t *testing.T, open func(time.Time) session.Store) {
	want := func(st session.Store, order ...session.Session) (ago []time.Duration) {
		t.Helper()
		got, err := st.Released()
		wantErr(t, "Released", err, nil)
		if len(got) != len(order) {
			t.Fatalf("%d addresses, want %d: %+v", len(got), len(order), got)
		}
		for i, r := range got {
			if r.Address != order[i].Address || r.User != order[i].User || r.Device != order[i].Device || r.Ago < 0 || r.Ago > time.Hour {
				t.Fatalf("address %d is %+v, want that of %s's", i, r, order[i].User)
			}
			ago = append(ago, r.Ago)
		}
		return ago
	}
	st := open(start)
	a, b, c := sample(1, 1), sample(2, 2), sample(3, 3)
	put(t, st, a, b, c)
	want(st)
	wantErr(t, "End", st.End(b.ID, session.Kicked), nil)
	wantErr(t, "End", st.End(a.ID, session.Deleted), nil)
	before := want(st, b, a)
	// Neither a restart nor a clock that was set makes it longer ago than it is.
	for _, jump := range []time.Duration{0, 24 * time.Hour, -24 * time.Hour} {
		st = open(start.Add(min(jump, 30*time.Minute)))
		if after := want(st, b, a); after[0] < before[0] {
			t.Fatalf("%v ago, and before that %v", after[0], before[0])
		}
	}
	again := sample(4, 4)
	again.Address = b.Address
	put(t, st, again)
	want(st, a)
	wantErr(t, "End", st.End(again.ID, session.Kicked), nil)
	want(st, a, again)
	// What expires while nobody looks rests from when it is found.
	want(open(c.Expires), a, again, c)
}

func keyLive(t *testing.T, open func(time.Time) session.Store) {
	st := open(start)
	a := sample(1, 1)
	again := sample(2, 1)
	again.PublicKey = a.PublicKey
	put(t, st, a)
	wantErr(t, "Put", st.Put(again), session.ErrKeyUsed)
	wantList(t, st, a)
}

func addressTaken(t *testing.T, open func(time.Time) session.Store) {
	st := open(start)
	a := sample(1, 1)
	b := sample(2, 2)
	b.Address = a.Address
	put(t, st, a)
	wantErr(t, "Put", st.Put(b), session.ErrAddressTaken)
	wantErr(t, "Put after reopening", open(start).Put(b), session.ErrAddressTaken)
}

func refusedPut(t *testing.T, open func(time.Time) session.Store) {
	st := open(start)
	a, b := sample(1, 1), sample(2, 2)
	put(t, st, a)
	var events int
	st.Watch(func(session.Event) { events++ })
	b.Address = a.Address
	wantErr(t, "Put", st.Put(b), session.ErrAddressTaken)
	b.Address, b.ID = sample(2, 2).Address, a.ID
	if err := st.Put(b); err == nil {
		t.Fatal("a second session took the first one's id")
	}
	if events != 1 {
		t.Fatalf("%d events, want the replayed one only", events)
	}
	wantList(t, st, a)
	// The key of a refused session was not bound by the refusal.
	b.ID, b.Certificate[0] = session.NewID(), 9
	put(t, st, b)
}

func reopen(t *testing.T, open func(time.Time) session.Store) {
	st := open(start)
	live, short, ended := sample(1, 1), sample(2, 2), sample(3, 3)
	short.Expires = start.Add(time.Minute)
	put(t, st, live, short, ended)
	wantErr(t, "End", st.End(ended.ID, session.Revoked), nil)
	wantList(t, open(start), live, short)
	st = open(start.Add(time.Minute))
	wantList(t, st, live)
	// What expired while nobody looked is as ended as any other, and gone for good.
	again := sample(4, 2)
	again.PublicKey = short.PublicKey
	wantErr(t, "key of the expired one", st.Put(again), session.ErrKeyUsed)
	wantList(t, open(start), live)
}

func note(t *testing.T, open func(time.Time) session.Store) {
	st := open(start)
	a, b := sample(1, 1), sample(2, 2)
	put(t, st, a, b)
	events := 0
	st.Watch(func(session.Event) { events++ })
	wantErr(t, "End", st.End(b.ID, session.Revoked), nil)
	events = 0
	a.Seen = session.Seen{Endpoint: netip.MustParseAddrPort("198.18.1.2:40000"), Handshake: start.Add(time.Second), Stamp: [12]byte{0x40, 11: 7}}
	b.Seen = a.Seen
	wantErr(t, "Note", st.Note(map[session.ID]session.Seen{a.ID: a.Seen, b.ID: b.Seen, session.NewID(): a.Seen}), nil)
	if events != 0 {
		t.Errorf("%d events", events)
	}
	wantList(t, st, a)
	wantList(t, open(start), a)
}

func watch(t *testing.T, open func(time.Time) session.Store) {
	st := open(start)
	a, b := sample(1, 1), sample(2, 2)
	put(t, st, a)
	var first, second []string
	log := func(to *[]string) func(session.Event) {
		return func(e session.Event) { *to = append(*to, e.Session.Address.String()+" "+string(e.Ended)) }
	}
	st.Watch(log(&first))
	put(t, st, b)
	st.Watch(log(&second))
	wantErr(t, "End", st.End(a.ID, session.Replaced), nil)
	st.Expire(b.Expires)
	if want := []string{"10.77.1.1 ", "10.77.1.2 ", "10.77.1.1 replaced", "10.77.1.2 expired"}; !slices.Equal(first, want) {
		t.Fatalf("first watcher saw %q, want %q", first, want)
	}
	slices.Sort(second[:2]) // the replay has no order
	if want := []string{"10.77.1.1 ", "10.77.1.2 ", "10.77.1.1 replaced", "10.77.1.2 expired"}; !slices.Equal(second, want) {
		t.Fatalf("second watcher saw %q, want %q", second, want)
	}
}

func watcherReads(t *testing.T, open func(time.Time) session.Store) {
	st := open(start)
	a := sample(1, 1)
	var seen []bool
	st.Watch(func(e session.Event) {
		_, byID := st.Get(e.Session.ID)
		_, byAddress := st.ByAddress(e.Session.Address)
		seen = append(seen, byID, byAddress, len(st.List()) == 1)
	})
	put(t, st, a)
	wantErr(t, "End", st.End(a.ID, session.Deleted), nil)
	if want := []bool{true, true, true, false, false, false}; !slices.Equal(seen, want) {
		t.Fatalf("the watcher saw %v, want %v", seen, want)
	}
}

func expire(t *testing.T, open func(time.Time) session.Store) {
	st := open(start)
	if next := st.Expire(start); !next.IsZero() {
		t.Fatalf("an empty store's next expiry is %v", next)
	}
	a, b := sample(1, 1), sample(2, 2)
	a.Expires = start.Add(time.Minute)
	put(t, st, a, b)
	if next := st.Expire(start.Add(59 * time.Second)); !next.Equal(a.Expires) {
		t.Fatalf("next is %v, want %v", next, a.Expires)
	}
	wantList(t, st, a, b)
	if next := st.Expire(a.Expires); !next.Equal(b.Expires) {
		t.Fatalf("next is %v, want %v", next, b.Expires)
	}
	wantList(t, st, b)
	if next := st.Expire(b.Expires.Add(time.Hour)); !next.IsZero() {
		t.Fatalf("next is %v, want none", next)
	}
	wantList(t, st)
}

// concurrent lets many fight for few addresses while others read; run it under -race. At the end the watcher's picture,
// which a tunnel would hold, must be the store's.
func concurrent(t *testing.T, open func(time.Time) session.Store) {
	st := open(start)
	peers := map[netip.Addr]session.ID{} // guarded by the order of the watcher's calls
	st.Watch(func(e session.Event) {
		a := e.Session.Address
		switch holder, held := peers[a]; {
		case e.Ended == "" && held:
			t.Errorf("%v begins for %v while %v holds it", a, e.Session.ID, holder)
		case e.Ended != "" && holder != e.Session.ID:
			t.Errorf("%v ends for %v while %v holds it", a, e.Session.ID, holder)
		}
		if delete(peers, a); e.Ended == "" {
			peers[a] = e.Session.ID
		}
	})
	stop := make(chan struct{})
	var readers, writers sync.WaitGroup
	for range 2 {
		readers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				for _, s := range st.List() {
					if got, ok := st.ByAddress(s.Address); ok && got.Address != s.Address {
						t.Errorf("ByAddress(%v) is a session of %v", s.Address, got.Address)
					}
					st.Get(s.ID)
				}
			}
		})
	}
	for w := range byte(4) {
		writers.Go(func() {
			for i := range byte(15) {
				s := sample(i%3, w)
				s.PublicKey[1], s.PublicKey[2] = w, i
				if err := st.Put(s); err != nil && !errors.Is(err, session.ErrAddressTaken) {
					t.Errorf("Put: %v", err)
				}
				if i%2 == 0 {
					for _, held := range st.List() {
						if err := st.End(held.ID, session.Kicked); err != nil && !errors.Is(err, session.ErrNotFound) {
							t.Errorf("End: %v", err)
						}
					}
				}
				st.Expire(start)
				seen := map[session.ID]session.Seen{}
				for _, held := range st.List() {
					seen[held.ID] = session.Seen{Handshake: start}
				}
				if err := st.Note(seen); err != nil {
					t.Errorf("Note: %v", err)
				}
			}
		})
	}
	writers.Wait()
	close(stop)
	readers.Wait()
	live := st.List()
	if len(live) != len(peers) {
		t.Fatalf("%d live sessions, the watcher knows %d", len(live), len(peers))
	}
	for _, s := range live {
		if peers[s.Address] != s.ID {
			t.Fatalf("the watcher has %v at %v, the store %v", peers[s.Address], s.Address, s.ID)
		}
	}
	wantList(t, open(start), live...)
}
