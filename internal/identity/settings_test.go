package identity

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"path/filepath"
	"testing"
	"time"
)

func ptr[T any](v T) *T { return &v }

func TestSettingsChangeWhatIsNamedAndSayWhatThatDoes(t *testing.T) {
	f := newFixture(t)
	alice := f.enrol(t, "alice", "mac")
	f.enrol(t, "bob", "mac")
	own := netip.MustParseAddr("10.77.0.50")
	for _, test := range []struct {
		name   string
		change Change
		afresh bool
	}{
		{"nothing", Change{}, false},
		{"groups", Change{Groups: []string{"db", "operators"}}, true},
		{"the same groups in another order", Change{Groups: []string{"operators", "db"}}, false},
		{"no groups", Change{Groups: []string{}}, true},
		{"an address", Change{Address: &own}, true},
		{"the same address", Change{Address: &own}, false},
		{"devices", Change{Sessions: ptr(1)}, false},
		{"the longest session", Change{SessionMax: ptr(int64(3600))}, true},
	} {
		if _, afresh, err := f.users.Set("alice", test.change); err != nil || afresh != test.afresh {
			t.Errorf("%s: afresh %v, %v", test.name, afresh, err)
		}
	}
	id, err := f.Identify(state(t, alice))
	if err != nil {
		t.Fatal(err)
	}
	if want := (Settings{Address: own, Sessions: 1, SessionMax: 3600}); id.Settings != want || len(id.Groups) != 0 {
		t.Errorf("the gate is told %+v and groups %q, want %+v", id.Settings, id.Groups, want)
	}
	if id.Settings.Max(12*time.Hour) != time.Hour || id.Settings.Limit(5) != 1 || (Settings{}).Max(12*time.Hour) != 12*time.Hour || (Settings{}).Limit(5) != 5 {
		t.Error("settings do not go before everybody's")
	}
	for _, bad := range []struct {
		user   string
		change Change
		is     error
	}{
		{"bob", Change{Address: &own}, ErrUserExists},
		{"bob", Change{Address: ptr(netip.MustParseAddr("fd00::1"))}, ErrSetting},
		{"bob", Change{Sessions: ptr(-1)}, ErrSetting},
		{"bob", Change{SessionMax: ptr(int64(-1))}, ErrSetting},
		{"bob", Change{SessionMax: ptr(int64(59))}, ErrSetting},
		{"bob", Change{Groups: []string{"A"}}, ErrName},
		{"bob", Change{Groups: make([]string, 65)}, ErrName},
		{"carol", Change{}, ErrNoUser},
	} {
		if _, _, err := f.users.Set(bad.user, bad.change); !errors.Is(err, bad.is) {
			t.Errorf("%s %+v: %v, want %v", bad.user, bad.change, err, bad.is)
		}
	}
	// A freed address is another's to have.
	if _, _, err := f.users.Set("alice", Change{Address: &netip.Addr{}}); err != nil {
		t.Fatal(err)
	}
	if _, _, err := f.users.Set("bob", Change{Address: &own}); err != nil {
		t.Error(err)
	}
}

func TestReplacedDeviceHasOneCertificate(t *testing.T) {
	f := newFixture(t)
	old, desk := f.enrol(t, "alice", "mac"), f.enrol(t, "alice", "desk")
	is, err := f.ca.IssueClient("alice", "mac", time.Hour, now)
	if err != nil {
		t.Fatal(err)
	}
	e := Enrolment{Name: "alice", Device: "mac", Key: is.KeyHash, NotAfter: is.NotAfter, Replace: true}
	for _, bad := range []Enrolment{{Name: "bob", Device: "mac"}, {Name: "alice", Device: "phone"}} {
		bad.Key, bad.NotAfter, bad.Replace = e.Key, e.NotAfter, true
		if _, err := f.users.Add(bad, now); !errors.Is(err, ErrNoUser) {
			t.Errorf("%s's %s: %v, want ErrNoUser", bad.Name, bad.Device, err)
		}
	}
	u, err := f.users.Add(e, now)
	if err != nil || u.Epoch != 0 || len(u.Devices) != 3 {
		t.Fatalf("%+v %v", u, err)
	}
	_, err = f.Identify(state(t, old))
	wantRefusal(t, err, RevokedCert)
	for _, good := range []*Issued{desk, is} {
		if _, err := f.Identify(state(t, good)); err != nil {
			t.Error(err)
		}
	}
	if _, err := f.users.Revoke("alice", "", now); err != nil {
		t.Fatal(err)
	}
	e.Key[0] ^= 1
	if _, err := f.users.Add(e, now); !errors.Is(err, ErrNoUser) {
		t.Errorf("a revoked user's: %v, want ErrNoUser", err)
	}
}

func TestLastSeenIsKeptAndNeverGoesBack(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	db := openState(t, path)
	users := NewUsers(db)
	if _, err := users.Add(sampleEnrolment("alice", "mac", 1), now); err != nil {
		t.Fatal(err)
	}
	key := sampleEnrolment("alice", "mac", 1).Key
	run := func(at ...time.Time) {
		seen := NewSeen(db, slog.New(slog.DiscardHandler))
		for _, a := range at {
			seen.Note(key, a)
		}
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if err := seen.Run(ctx); err != nil {
			t.Fatal(err)
		}
	}
	last := func() time.Time {
		all, err := users.List()
		if err != nil {
			t.Fatal(err)
		}
		return all[0].Devices[0].LastSeen
	}
	if !last().IsZero() {
		t.Errorf("seen before he ever came: %v", last())
	}
	run(now, now.Add(time.Minute), now.Add(-time.Hour))
	if !last().Equal(now.Add(time.Minute)) {
		t.Errorf("seen %v, want %v", last(), now.Add(time.Minute))
	}
	run(now)
	if !last().Equal(now.Add(time.Minute)) {
		t.Errorf("seen %v, want %v still", last(), now.Add(time.Minute))
	}
	db.Close()
	if db = openState(t, path); db != nil {
		users = NewUsers(db)
	}
	if !last().Equal(now.Add(time.Minute)) {
		t.Errorf("after reopening seen %v", last())
	}
	if u, err := users.Get("alice"); err != nil || !u.Devices[0].LastSeen.IsZero() {
		t.Errorf("what a list shows is written into the record: %+v %v", u, err)
	}
	// A disk that refuses brings nothing down.
	db.Close()
	run(now.Add(time.Hour))
}
