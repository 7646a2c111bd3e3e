package identity

import (
	"bytes"
	"errors"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"perimeterd/internal/statefile"
)

// contents is what a state file that nobody holds has in it.
func contents(t *testing.T, path string) Contents {
	t.Helper()
	f, err := statefile.Hold(path, false)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	c, err := ReadContents(f, st.Size())
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// An old state in the place of a newer one opens nothing that the newer one had closed.
func TestCarryKeepsWhatWasClosed(t *testing.T) {
	dir := t.TempDir()
	newer, older := filepath.Join(dir, "state.db"), filepath.Join(dir, "older.db")
	db := openState(t, newer)
	users, meta := NewUsers(db), NewMeta(db)
	add := func(name, device string, key byte, groups ...string) {
		t.Helper()
		e := sampleEnrolment(name, device, key)
		e.Groups = groups
		if _, err := users.Add(e, now); err != nil {
			t.Fatal(err)
		}
	}
	for i, name := range []string{"alice", "bob", "carol", "dora", "emil"} {
		add(name, "mac", byte(i+1), "operators", "db")
	}
	add("alice", "desk", 10)
	revoke := func(name, device string) {
		t.Helper()
		if _, err := users.Revoke(name, device, now); err != nil {
			t.Fatal(err)
		}
	}
	revoke("emil", "")
	if err := errors.Join(meta.RaiseTokenStep(100), meta.SetTokenSteps([]byte("some"))); err != nil {
		t.Fatal(err)
	}
	// The backup.
	var copied bytes.Buffer
	if err := db.Snapshot(&copied, func(int64) {}); err != nil {
		t.Fatal(err)
	}
	if err := WriteNew(older, copied.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	// What happens after it.
	revoke("alice", "mac")
	add("alice", "phone", 11)
	revoke("bob", "")
	add("emil", "new", 12)
	add("frida", "mac", 13)
	add("gustav", "mac", 14)
	revoke("gustav", "")
	if _, _, err := users.Set("carol", Change{Groups: []string{"db", "web"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := users.RaiseEpoch("dora"); err != nil {
		t.Fatal(err)
	}
	next := Successor{Key: KeyHash{99}, NotAfter: now.Add(2 * time.Hour)}
	if _, err := users.Renew("dora", KeyHash{4, 1}, next, now); err != nil {
		t.Fatal(err)
	}
	if err := users.Used("dora", next.Key); err != nil {
		t.Fatal(err)
	}
	last, err := meta.SequenceCredential("new sequence")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(meta.RaiseTokenStep(200), meta.SetTokenSteps([]byte("all so far"))); err != nil {
		t.Fatal(err)
	}
	db.Close()

	later := now.Add(time.Minute)
	db = openState(t, older)
	k, err := Carry(db, contents(t, newer), later)
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(k.Revoked)
	slices.Sort(k.Missing)
	if want := []string{"alice/mac", "bob", "carol (groups)"}; !slices.Equal(k.Revoked, want) {
		t.Errorf("revoked: %v, want %v", k.Revoked, want)
	}
	if want := []string{"alice/phone", "emil", "frida"}; !slices.Equal(k.Missing, want) {
		t.Errorf("missing: %v, want %v", k.Missing, want)
	}
	if want := []string{"dora/mac"}; !slices.Equal(k.Renewed, want) {
		t.Errorf("renewed: %v, want %v", k.Renewed, want)
	}
	users, meta = NewUsers(db), NewMeta(db)
	get := func(name string) User {
		t.Helper()
		u, err := users.Get(name)
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	if a := get("alice"); !a.Active() || a.Devices[0].Active(now) || !a.Devices[1].Active(now) || len(a.Devices) != 2 {
		t.Errorf("alice: %+v", a)
	}
	for _, name := range []string{"bob", "emil", "frida", "gustav"} {
		if u := get(name); u.Active() || u.Devices[0].Active(now) {
			t.Errorf("%s: %+v", name, u)
		}
	}
	if c := get("carol"); !c.Active() || !slices.Equal(c.Groups, []string{"db"}) {
		t.Errorf("carol: %+v", c)
	}
	if d := get("dora"); !d.Active() || d.Epoch != 1 || len(d.Devices) != 1 || d.Devices[0].Key != next.Key || !d.Devices[0].has(KeyHash{4, 1}) {
		t.Errorf("dora: %+v", d)
	}
	if e := get("emil"); e.Epoch != 1 {
		t.Errorf("emil: %+v", e)
	}
	if step, err := meta.TokenStep(); err != nil || step != 200 {
		t.Errorf("token step %d, %v", step, err)
	}
	if steps, err := meta.TokenSteps(); err != nil || string(steps) != "all so far" {
		t.Errorf("token steps %s, %v", steps, err)
	}
	// Ids go on after all that were ever given.
	h, err := users.Add(sampleEnrolment("hilda", "mac", 20), later)
	if err != nil || h.Credential <= last {
		t.Errorf("credential %d after %d, %v", h.Credential, last, err)
	}
	// Added again, frida gets a knock secret that she never had.
	f, err := users.Add(sampleEnrolment("frida", "mac", 21), later)
	if err != nil || f.Epoch != 1 {
		t.Errorf("frida: %+v %v", f, err)
	}
	db.Close()
	// A second time there is nothing left to keep.
	db = openState(t, older)
	if k, err := Carry(db, contents(t, newer), later); err != nil || len(k.Revoked) != 0 {
		t.Errorf("again: %+v %v", k, err)
	}
}
