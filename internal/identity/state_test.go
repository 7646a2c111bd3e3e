package identity

import (
	"errors"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"perimeterd/internal/statefile"
)

func TestHeldStateFileSaysWhoHoldsIt(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	openState(t, path)
	began := time.Now()
	_, err := OpenState(path)
	if !errors.Is(err, ErrStateHeld) || !strings.Contains(err.Error(), "running daemon") {
		t.Fatalf("error %v", err)
	}
	if took := time.Since(began); took > 3*time.Second {
		t.Fatalf("it took %v to say so", took)
	}
}

func sampleEnrolment(name, device string, key byte) Enrolment {
	return Enrolment{Name: name, Device: device, Key: KeyHash{key, 1}, NotAfter: now.Add(time.Hour)}
}

func TestCredentialIsNeverAnothers(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	db := openState(t, path)
	users, meta := NewUsers(db), NewMeta(db)
	seen := map[uint32]string{}
	claim := func(id uint32, who string) {
		t.Helper()
		if id < 1 || id > maxCredential {
			t.Fatalf("%s has credential %d", who, id)
		}
		if other, taken := seen[id]; taken && other != who {
			t.Fatalf("%s and %s have credential %d", who, other, id)
		}
		seen[id] = who
	}
	add := func(name string, key byte) {
		t.Helper()
		u, err := users.Add(sampleEnrolment(name, "mac", key), now)
		if err != nil {
			t.Fatal(err)
		}
		claim(u.Credential, name)
	}
	add("alice", 1)
	seq, err := meta.SequenceCredential("alice") // the same word as a name, and still another id
	if err != nil {
		t.Fatal(err)
	}
	claim(seq, "sequence alice")
	if _, err := users.Revoke("alice", "", now); err != nil {
		t.Fatal(err)
	}
	add("bob", 2)
	db.Close()
	db = openState(t, path)
	users, meta = NewUsers(db), NewMeta(db)
	add("carol", 3)
	add("alice", 4)
	again, err := meta.SequenceCredential("alice")
	if err != nil || again != seq {
		t.Fatalf("the sequence's credential went from %d to %d (%v)", seq, again, err)
	}
	if len(seen) != 4 {
		t.Fatalf("%v", seen)
	}
	err = db.Update(func(tx *statefile.Tx) error { return tx.Bucket(bucketMeta).SetSequence(maxCredential) })
	if err != nil {
		t.Fatal(err)
	}
	if _, err := users.Add(sampleEnrolment("dave", "mac", 5), now); err == nil || !strings.Contains(err.Error(), "all 2147483647 credential ids are used") {
		t.Fatalf("past the last id: %v", err)
	}
}

func TestTokenStepOnlyRises(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	db := openState(t, path)
	for _, step := range []struct{ raise, want uint64 }{{0, 0}, {100, 100}, {99, 100}, {1 << 40, 1 << 40}, {100, 1 << 40}} {
		m := NewMeta(db)
		if err := m.RaiseTokenStep(step.raise); err != nil {
			t.Fatal(err)
		}
		db.Close()
		db = openState(t, path)
		if got, err := NewMeta(db).TokenStep(); err != nil || got != step.want {
			t.Fatalf("after raising to %d: %d %v, want %d", step.raise, got, err, step.want)
		}
	}
}

func TestAddRefusals(t *testing.T) {
	users := NewUsers(openState(t, filepath.Join(t.TempDir(), "state.db")))
	first := sampleEnrolment("alice", "mac", 1)
	first.Groups = []string{"operators", "db"}
	if _, err := users.Add(first, now); err != nil {
		t.Fatal(err)
	}
	day := now.Add(time.Hour).Format(time.DateOnly)
	for _, test := range []struct {
		edit func(*Enrolment)
		want string
		is   error
	}{
		{func(e *Enrolment) { e.Device = "mac" },
			`user "alice": device "mac" exists already, valid until ` + day + `: name another with --device, or revoke this one first`, ErrUserExists},
		{func(e *Enrolment) { e.Key = first.Key }, `user "alice": this key exists already, as device "mac": make a new one`, ErrUserExists},
		{func(e *Enrolment) { e.Groups = []string{"db"} },
			`user "alice": exists already, in groups ["operators" "db"]: leave --group off, or revoke him first`, ErrUserExists},
		{func(e *Enrolment) { e.Groups = []string{"Domain Admins"} },
			`group "Domain Admins": not a name: want 1 to 64 of a-z 0-9 . _ - with a letter or digit first`, ErrName},
		{func(e *Enrolment) { e.NotAfter = now }, `user "alice": not a name: the certificate has no key or ended already`, ErrName},
		{func(e *Enrolment) { e.Groups = []string{"db", "operators"} }, "", nil}, // the same set
	} {
		e := sampleEnrolment("alice", "desk", 2)
		test.edit(&e)
		_, err := users.Add(e, now)
		if test.is == nil {
			if err != nil {
				t.Error(err)
			}
			continue
		}
		if err == nil || err.Error() != test.want || !errors.Is(err, test.is) {
			t.Errorf("got  %v\nwant %s", err, test.want)
		}
	}
	if _, err := users.Revoke("nobody", "", now); !errors.Is(err, ErrNoUser) {
		t.Errorf("revoking nobody: %v", err)
	}
	if _, err := users.Revoke("alice", "phone", now); !errors.Is(err, ErrNoUser) {
		t.Errorf("revoking no device: %v", err)
	}
	u, err := users.RaiseEpoch("alice")
	if err != nil || u.Epoch != 1 {
		t.Errorf("epoch %d, %v", u.Epoch, err)
	}
	// A key stands for one user.
	if _, err := users.Add(sampleEnrolment("bob", "mac", 1), now); !errors.Is(err, ErrUserExists) || !strings.Contains(err.Error(), `user "alice": this key`) {
		t.Errorf("another's key: %v", err)
	}
	// An expired device's name is free again.
	late := sampleEnrolment("alice", "mac", 9)
	late.NotAfter = now.Add(3 * time.Hour)
	if _, err := users.Add(late, now.Add(2*time.Hour)); err != nil {
		t.Error(err)
	}
}

func TestConcurrentReadersAndWriters(t *testing.T) {
	users := NewUsers(openState(t, filepath.Join(t.TempDir(), "state.db")))
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := range 10 {
				name := string(rune('a'+w)) + string(rune('a'+i))
				if _, err := users.Add(sampleEnrolment(name, "mac", byte(10*w+i)), now); err != nil {
					t.Error(err)
				}
				if _, err := users.Get(name); err != nil {
					t.Error(err)
				}
				if _, err := users.List(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	all, err := users.List()
	if err != nil || len(all) != 40 {
		t.Fatalf("%d users, %v", len(all), err)
	}
	ids := map[uint32]bool{}
	for _, u := range all {
		ids[u.Credential] = true
	}
	if len(ids) != 40 {
		t.Fatalf("%d credentials for 40 users", len(ids))
	}
}

func TestKeyFiles(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "wireguard.key")
	want := [32]byte{1, 2, 3}
	if err := WriteNew(path, EncodeKey(want), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := ReadKey(path); err != nil || got != want {
		t.Fatalf("%x %v", got, err)
	}
	id := filepath.Join(dir, "server.id")
	if err := WriteNew(id, []byte("00112233445566778899aabbccddeeff\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if got, err := ReadServerID(id); err != nil || got[15] != 0xff {
		t.Fatalf("%x %v", got, err)
	}
	if _, err := ReadKey(id); err == nil || !strings.Contains(err.Error(), "want 32 bytes in base64 on one line") {
		t.Fatalf("%v", err)
	}
	if _, err := ReadServerID(path); err == nil || !strings.Contains(err.Error(), "want 32 hexadecimal digits") {
		t.Fatalf("%v", err)
	}
}
