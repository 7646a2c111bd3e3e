package identity

import (
	"errors"
	"testing"
	"time"
)

func TestSuccessorRetiresTheCertificateBeforeWhenItIsUsed(t *testing.T) {
	f := newFixture(t)
	first := f.enrol(t, "alice", "mac")
	issue := func() *Issued {
		t.Helper()
		is, err := f.ca.IssueClient("alice", "mac", 90*24*time.Hour, now)
		if err != nil {
			t.Fatal(err)
		}
		return is
	}
	successor := func(is *Issued) Successor { return Successor{Key: is.KeyHash, NotAfter: is.NotAfter} }
	second, unused := issue(), issue()
	_, err := f.Identify(state(t, second))
	wantRefusal(t, err, UnknownKey)
	for _, is := range []*Issued{unused, second} { // the one that was never used makes room
		if _, err := f.users.Renew("alice", first.KeyHash, successor(is), now); err != nil {
			t.Fatal(err)
		}
	}
	_, err = f.Identify(state(t, unused))
	wantRefusal(t, err, UnknownKey)
	before, err := f.Identify(state(t, first))
	if err != nil || before.Unused || before.Certificate != first.KeyHash {
		t.Errorf("before it is used: %+v %v", before, err)
	}
	id, err := f.Identify(state(t, second))
	if err != nil || !id.Unused || id.Certificate != first.KeyHash || id.Key != second.KeyHash || !id.NotAfter.Equal(second.NotAfter) {
		t.Errorf("the first use: %+v %v", id, err)
	}
	for range 2 {
		if err := f.users.Used("alice", second.KeyHash); err != nil {
			t.Fatal(err)
		}
	}
	if id, err = f.Identify(state(t, second)); err != nil || id.Unused || id.Certificate != first.KeyHash {
		t.Errorf("from then on: %+v %v", id, err)
	}
	_, err = f.Identify(state(t, first))
	wantRefusal(t, err, Superseded)

	// Once more: sessions stay the first one's, and the one before is retired.
	third := issue()
	if _, err := f.users.Renew("alice", first.KeyHash, successor(third), now); !errors.Is(err, ErrNotRenewed) {
		t.Errorf("a retired certificate is renewed: %v", err)
	}
	if _, err := f.users.Renew("alice", second.KeyHash, successor(third), now); err != nil {
		t.Fatal(err)
	}
	if err := f.users.Used("alice", third.KeyHash); err != nil {
		t.Fatal(err)
	}
	if id, err = f.Identify(state(t, third)); err != nil || id.Certificate != first.KeyHash {
		t.Errorf("the third: %+v %v", id, err)
	}
	for _, old := range []*Issued{first, second} {
		_, err = f.Identify(state(t, old))
		wantRefusal(t, err, Superseded)
	}
	// None of these keys is for anybody else.
	for _, is := range []*Issued{first, second, third} {
		if _, err := f.users.Add(Enrolment{Name: "bob", Device: "mac", Key: is.KeyHash, NotAfter: is.NotAfter}, now); !errors.Is(err, ErrUserExists) {
			t.Errorf("another user has the key: %v", err)
		}
	}
	bob := f.enrol(t, "bob", "mac")
	if _, err := f.users.Renew("bob", bob.KeyHash, successor(third), now); !errors.Is(err, ErrUserExists) {
		t.Errorf("another's key as successor: %v", err)
	}
	if _, err := f.users.Renew("bob", third.KeyHash, successor(issue()), now); !errors.Is(err, ErrNotRenewed) {
		t.Errorf("another's certificate is renewed: %v", err)
	}
	if _, err := f.users.Renew("carol", third.KeyHash, successor(issue()), now); !errors.Is(err, ErrNoUser) {
		t.Errorf("of nobody: %v", err)
	}
}

func TestRevokedDeviceIsRevokedWithAllItsCertificates(t *testing.T) {
	f := newFixture(t)
	first := f.enrol(t, "alice", "mac")
	second, err := f.ca.IssueClient("alice", "mac", 90*24*time.Hour, now)
	if err != nil {
		t.Fatal(err)
	}
	next := Successor{Key: second.KeyHash, NotAfter: second.NotAfter}
	if _, err := f.users.Renew("alice", first.KeyHash, next, now); err != nil {
		t.Fatal(err)
	}
	if _, err := f.users.Revoke("alice", "mac", now); err != nil {
		t.Fatal(err)
	}
	for _, is := range []*Issued{first, second} {
		_, err := f.Identify(state(t, is))
		wantRefusal(t, err, RevokedCert)
	}
	if err := f.users.Used("alice", second.KeyHash); err != nil {
		t.Fatal(err)
	}
	for _, is := range []*Issued{first, second} {
		_, err := f.Identify(state(t, is))
		wantRefusal(t, err, RevokedCert)
	}
	if _, err := f.users.Renew("alice", second.KeyHash, Successor{Key: KeyHash{7}, NotAfter: second.NotAfter}, now); !errors.Is(err, ErrNotRenewed) {
		t.Errorf("a revoked certificate is renewed: %v", err)
	}
}

// A successor that is only used after the certificate before it ended is as good.
func TestSuccessorOutlivesTheCertificateBefore(t *testing.T) {
	f := newFixture(t)
	is, err := f.ca.IssueClient("alice", "mac", time.Hour, now)
	if err != nil {
		t.Fatal(err)
	}
	f.enter(t, "alice", "mac", is)
	second, err := f.ca.IssueClient("alice", "mac", 3*time.Hour, now)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.users.Renew("alice", is.KeyHash, Successor{Key: second.KeyHash, NotAfter: second.NotAfter}, now); err != nil {
		t.Fatal(err)
	}
	f.clock = now.Add(2 * time.Hour)
	_, err = f.Identify(state(t, is))
	wantRefusal(t, err, Expired)
	if id, err := f.Identify(state(t, second)); err != nil || !id.Unused {
		t.Errorf("%+v %v", id, err)
	}
	u, err := f.users.Get("alice")
	if err != nil || !u.Devices[0].Active(f.clock) {
		t.Errorf("%+v %v", u, err)
	}
}
