package control

import (
	"context"
	"errors"
	"net/netip"
	"testing"

	"perimeterd/internal/identity"
	"perimeterd/internal/session"
	"perimeterd/vpn"
)

func TestChangedGroupsEndTheUsersSessionsAndNoOthers(t *testing.T) {
	f, ctx := start(t), context.Background()
	for _, e := range []identity.Enrolment{enrolment("alice", "mac", 1), enrolment("alice", "desk", 2), enrolment("bob", "mac", 3)} {
		if _, err := f.AddUser(ctx, e); err != nil {
			t.Fatal(err)
		}
	}
	f.begin(t, "alice", "mac", 1)
	f.begin(t, "alice", "desk", 2)
	bob := f.begin(t, "bob", "mac", 3)
	reasons := map[session.Reason]int{}
	f.ops.Sessions.Watch(func(e session.Event) { reasons[e.Ended]++ })
	clear(reasons)
	f.changed = nil
	done, err := f.SetUser(ctx, "alice", identity.Change{Groups: []string{"db"}})
	if err != nil || done.Ended != 2 || len(done.User.Groups) != 1 || reasons[session.Changed] != 2 {
		t.Errorf("%+v, %v, %v", done, reasons, err)
	}
	if len(f.changed) != 1 || f.changed[0] != "alice" {
		t.Errorf("told of a change: %v", f.changed)
	}
	if _, live := f.ops.Sessions.Get(bob.ID); !live {
		t.Error("bob's session ended")
	}
	f.begin(t, "alice", "mac", 4)
	if done, err := f.SetUser(ctx, "alice", identity.Change{Groups: []string{"db"}}); err != nil || done.Ended != 0 {
		t.Errorf("the same groups again: %+v %v", done, err)
	}
	if done, err := f.SetUser(ctx, "alice", identity.Change{Groups: []string{}}); err != nil || done.Ended != 1 || len(done.User.Groups) != 0 {
		t.Errorf("no groups, over the socket: %+v %v", done, err)
	}

	for _, test := range []struct {
		user   string
		change identity.Change
		status int
	}{
		{"alice", identity.Change{Address: &bob.Address}, 409},
		{"carol", identity.Change{}, 404},
		{"alice", identity.Change{Groups: []string{"A"}}, 400},
		{"alice", identity.Change{Sessions: new(int), SessionMax: func() *int64 { n := int64(1); return &n }()}, 400},
	} {
		_, err := f.SetUser(ctx, test.user, test.change)
		var e *vpn.APIError
		if !errors.As(err, &e) || e.Status != test.status {
			t.Errorf("%s %+v: %v, want status %d", test.user, test.change, err, test.status)
		}
	}
	if _, err := f.SetUser(ctx, "alice", identity.Change{Address: new(netip.Addr)}); err != nil {
		t.Error(err)
	}
}

func TestReplacedCertificatesSessionsEnd(t *testing.T) {
	f, ctx := start(t), context.Background()
	for _, e := range []identity.Enrolment{enrolment("alice", "mac", 1), enrolment("alice", "desk", 2)} {
		if _, err := f.AddUser(ctx, e); err != nil {
			t.Fatal(err)
		}
	}
	mac, desk := f.begin(t, "alice", "mac", 1), f.begin(t, "alice", "desk", 2)
	e := enrolment("alice", "mac", 3)
	e.Replace = true
	if _, err := f.AddUser(ctx, e); err != nil {
		t.Fatal(err)
	}
	if _, live := f.ops.Sessions.Get(mac.ID); live {
		t.Error("the old certificate's session lives")
	}
	if _, live := f.ops.Sessions.Get(desk.ID); !live {
		t.Error("another device's session ended")
	}
}
