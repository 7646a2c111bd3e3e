package identity

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"perimeterd/internal/statefile"
)

// onDisk runs fn with a file system of a size of its own below dir, in a mount namespace that goes with the thread.
func onDisk(t *testing.T, size string, fn func(dir string)) {
	t.Helper()
	dir := t.TempDir()
	done := make(chan bool, 1)
	go func() {
		whole := false
		defer func() { done <- whole }()
		runtime.LockOSThread() // and never unlocked: the thread dies
		if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
			t.Error(err)
			return
		}
		if err := errors.Join(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""), unix.Mount("none", dir, "tmpfs", 0, "size="+size)); err != nil {
			t.Error(err)
			return
		}
		fn(dir)
		whole = true
	}()
	if !<-done {
		t.FailNow()
	}
}

// fillUp leaves no room in a directory's file system.
func fillUp(t *testing.T, dir string) (filler string) {
	t.Helper()
	filler = filepath.Join(dir, "filler")
	f, err := os.Create(filler)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for {
		if _, err := f.Write(make([]byte, 4096)); errors.Is(err, unix.ENOSPC) {
			return filler
		} else if err != nil {
			t.Fatal(err)
		}
	}
}

func TestFullDiskStillTakesRevocations(t *testing.T) {
	onDisk(t, "8m", func(dir string) {
		path := filepath.Join(dir, "state.db")
		db := openState(t, path)
		users := NewUsers(db)
		const many = 200
		for i := range many {
			if _, err := users.Add(numbered(i), now); err != nil {
				t.Fatal(err)
			}
		}
		fillUp(t, dir)
		for i := range many {
			if _, err := users.Revoke(fmt.Sprintf("user%d", i), "", now); err != nil {
				t.Fatalf("revocation %d: %v", i, err)
			}
		}
		db.Close()
		all, err := NewUsers(openState(t, path)).List()
		if err != nil || len(all) != many || slices.ContainsFunc(all, User.Active) {
			t.Fatalf("%d users, %v", len(all), err)
		}
	})
}

func TestRevocationThatCannotBeWrittenHoldsAndIsWrittenLater(t *testing.T) {
	onDisk(t, "200k", func(dir string) {
		path := filepath.Join(dir, "state.db")
		db := openState(t, path)
		users := NewUsers(db)
		for i, name := range []string{"alice", "bob", "carol"} {
			if _, err := users.Add(sampleEnrolment(name, "mac", byte(i)), now); err != nil {
				t.Fatal(err)
			}
		}
		filler := fillUp(t, dir)
		// As long as somebody reads, as a backup does, pages that are written anew are not free for others.
		added := []string{"alice", "bob", "carol"}
		var bob User
		err := db.View(func(*statefile.Tx) error {
			for err := error(nil); err == nil; {
				e := numbered(len(added))
				if _, err = users.Add(e, now); err == nil {
					added = append(added, e.Name)
				}
			}
			for err := error(nil); err == nil; {
				_, err = users.RaiseEpoch("carol")
			}
			_, err := users.Revoke("alice", "", now)
			bob, _ = users.Revoke("bob", "mac", now)
			return err
		})
		if err == nil || !strings.HasPrefix(err.Error(), "the revocation is not on the disk: ") || !strings.Contains(err.Error(), "no space left on device: ") {
			t.Fatal(err)
		}
		if !bob.Active() || bob.Devices[0].Active(now) {
			t.Errorf("bob is %+v", bob)
		}
		check := func(what string, users *Users) {
			t.Helper()
			alice, err := users.Get("alice")
			if err != nil || alice.Active() || alice.Devices[0].Active(now) {
				t.Errorf("%s: %+v %v", what, alice, err)
			}
			all, err := users.List()
			if err != nil || len(all) != len(added) {
				t.Fatalf("%s: %d users of %d, %v", what, len(all), len(added), err)
			}
			for _, u := range all {
				if out := u.Name == "alice" || u.Name == "bob"; u.Devices[0].Active(now) == out {
					t.Errorf("%s: %+v", what, u)
				}
			}
		}
		check("unwritten", users)
		if got := users.Unwritten(); !slices.Equal(got, []string{"alice", "bob"}) {
			t.Errorf("unwritten: %v", got)
		}
		if err := os.Remove(filler); err != nil {
			t.Fatal(err)
		}
		if err := users.Settle(); err != nil {
			t.Fatal(err)
		}
		if got := users.Unwritten(); len(got) > 0 {
			t.Errorf("still unwritten: %v", got)
		}
		db.Close()
		check("opened again", NewUsers(openState(t, path)))
	})
}

// Added again before the disk took the revocation, he gets none of his old certificates back.
func TestUnwrittenRevocationGoesWithTheNextChange(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	db := openState(t, path)
	users := NewUsers(db)
	for i, name := range []string{"alice", "bob"} {
		if _, err := users.Add(sampleEnrolment(name, "mac", byte(i)), now); err != nil {
			t.Fatal(err)
		}
	}
	users.pending.add("alice", "", now)
	users.pending.add("carol", "", now) // by Forbid
	users.pending.add("dave", "mac", now)
	if carol, err := users.Get("carol"); err != nil || carol.Active() {
		t.Errorf("%+v %v", carol, err)
	}
	u, err := users.Add(sampleEnrolment("alice", "desk", 9), now)
	if err != nil || !u.Active() || u.Epoch != 1 || u.Devices[0].Active(now) || !u.Devices[1].Active(now) {
		t.Fatalf("%+v %v", u, err)
	}
	users.pending.add("bob", "mac", now)
	if _, err := users.RaiseEpoch("alice"); err != nil {
		t.Fatal(err)
	}
	db.Close()
	users = NewUsers(openState(t, path))
	if carol, err := users.Get("carol"); err != nil || carol.Active() || carol.Credential == 0 {
		t.Errorf("%+v %v", carol, err)
	}
	if _, err := users.Get("dave"); !errors.Is(err, ErrNoUser) {
		t.Errorf("dave: %v", err)
	}
	bob, err := users.Get("bob")
	if err != nil || bob.Devices[0].Active(now) {
		t.Fatalf("%+v %v", bob, err)
	}
}
