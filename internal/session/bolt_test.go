package session_test

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"perimeterd/internal/session"
	"perimeterd/internal/session/storetest"
	"perimeterd/internal/statefile"
)

func openDB(t testing.TB, path string) *statefile.DB {
	t.Helper()
	db, err := statefile.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

func TestBolt(t *testing.T) {
	storetest.Run(t, func(t *testing.T) func(time.Time) session.Store {
		path := filepath.Join(t.TempDir(), "state.db")
		var db *statefile.DB
		return func(now time.Time) session.Store {
			if db != nil {
				db.Close()
			}
			db = openDB(t, path)
			st, err := session.OpenBolt(db, now)
			if err != nil {
				t.Fatal(err)
			}
			return st
		}
	})
}

func sampleSession(n byte, now time.Time) session.Session {
	s := session.Session{ID: session.NewID(), User: "alice", Address: netip.AddrFrom4([4]byte{10, 77, 0, n}),
		Created: now, Expires: now.Add(time.Hour)}
	s.PublicKey[0] = n
	return s
}

func TestSessionEndedWhileTheDiskFailsIsGoneAndStaysGone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	now := time.Now().Truncate(time.Second).UTC()
	db := openDB(t, path)
	st, err := session.OpenBolt(db, now)
	if err != nil {
		t.Fatal(err)
	}
	s := sampleSession(9, now)
	if err := st.Put(s); err != nil {
		t.Fatal(err)
	}
	var ended session.Reason
	st.Watch(func(e session.Event) { ended = e.Ended })
	db.Close() // every write fails from here on
	if err := st.End(s.ID, session.Revoked); err == nil || !strings.Contains(err.Error(), "state file could not be told") {
		t.Fatalf("End: %v, want an error of the medium", err)
	}
	if _, ok := st.Get(s.ID); ok || ended != session.Revoked {
		t.Fatalf("the session is live: %v, the watcher saw %q", ok, ended)
	}
	if err := st.Put(sampleSession(10, now)); err == nil {
		t.Fatal("Put succeeded on a closed file")
	}
	if got := st.List(); len(got) != 0 {
		t.Fatalf("a session that could not be written is live: %v", got)
	}
}

// failWrites makes every write to an open file of this process fail, as a disk that turned read-only does, until the
// returned function is called.
func failWrites(t *testing.T, path string) (heal func()) {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range fds {
		if target, err := os.Readlink("/proc/self/fd/" + e.Name()); err != nil || target != path {
			continue
		}
		fd, err := strconv.Atoi(e.Name())
		if err != nil {
			t.Fatal(err)
		}
		saved, err := unix.Dup(fd) // keeps the lock, too
		if err != nil {
			t.Fatal(err)
		}
		readOnly, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer readOnly.Close()
		if err := unix.Dup3(int(readOnly.Fd()), fd, 0); err != nil {
			t.Fatal(err)
		}
		return func() {
			if err := unix.Dup3(saved, fd, 0); err != nil {
				t.Fatal(err)
			}
			unix.Close(saved)
		}
	}
	t.Fatalf("%s is not open", path)
	return nil
}

func TestEndThatCouldNotBeWrittenIsWrittenWithTheNextChange(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	now := time.Now().Truncate(time.Second).UTC()
	db := openDB(t, path)
	st, err := session.OpenBolt(db, now)
	if err != nil {
		t.Fatal(err)
	}
	revoked, later := sampleSession(9, now), sampleSession(10, now)
	if err := st.Put(revoked); err != nil {
		t.Fatal(err)
	}
	heal := failWrites(t, path)
	if err := st.End(revoked.ID, session.Revoked); err == nil {
		t.Fatal("End says it was written")
	}
	heal()
	if err := st.Put(later); err != nil {
		t.Fatal(err)
	}
	db.Close()
	if st, err = session.OpenBolt(openDB(t, path), now); err != nil {
		t.Fatal(err)
	}
	if all := st.List(); len(all) != 1 || all[0].ID != later.ID {
		t.Fatalf("after a restart %v live", all)
	}
	again := sampleSession(9, now)
	if err := st.Put(again); !errors.Is(err, session.ErrKeyUsed) {
		t.Fatalf("its key: %v", err)
	}
}

func TestDamagedRecordKeepsTheStoreClosed(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	now := time.Now()
	db := openDB(t, path)
	if _, err := session.OpenBolt(db, now); err != nil {
		t.Fatal(err)
	}
	id := session.NewID()
	err := db.Update(func(tx *statefile.Tx) error {
		return tx.Bucket([]byte("sessions")).Put(id[:], []byte(`{"User":"mallory"}`))
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := session.OpenBolt(db, now); err == nil || !strings.Contains(err.Error(), "is damaged") {
		t.Fatalf("OpenBolt: %v, want a refusal", err)
	}
}

// ByAddress runs for every connection that the proxy accepts.
func BenchmarkByAddress(b *testing.B) {
	now := time.Now()
	st, err := session.OpenBolt(openDB(b, filepath.Join(b.TempDir(), "state.db")), now)
	if err != nil {
		b.Fatal(err)
	}
	s := sampleSession(1, now)
	if err := st.Put(s); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, ok := st.ByAddress(s.Address); !ok {
			b.Fatal("gone")
		}
	}
}
