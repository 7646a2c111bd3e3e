package session_test

import (
	"bytes"
	"errors"
	"path/filepath"
	"testing"
	"time"

	"perimeterd/internal/session"
)

func TestStateFromABackupHasNoSessionAndNoUsedKeyIsFree(t *testing.T) {
	dir := t.TempDir()
	now := time.Now().Truncate(time.Second).UTC()
	put := func(name string, keys ...byte) string {
		t.Helper()
		path := filepath.Join(dir, name)
		db := openDB(t, path)
		st, err := session.OpenBolt(db, now)
		if err != nil {
			t.Fatal(err)
		}
		for _, k := range keys {
			s := sampleSession(k, now)
			s.Certificate[0] = 7
			if err := st.Put(s); err != nil {
				t.Fatal(err)
			}
		}
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
		return path
	}
	older, newer := put("older.db", 1, 2), put("newer.db", 2, 3)
	var copied bytes.Buffer
	from := openDB(t, newer)
	if err := from.Snapshot(&copied, func(int64) {}); err != nil {
		t.Fatal(err)
	}
	db := openDB(t, older)
	if err := session.Carry(db, now, bytes.NewReader(copied.Bytes()), int64(copied.Len())); err != nil {
		t.Fatal(err)
	}
	st, err := session.OpenBolt(db, now)
	if err != nil {
		t.Fatal(err)
	}
	if all := st.List(); len(all) != 0 {
		t.Errorf("%d sessions came back", len(all))
	}
	// Their addresses rest, whoever had them.
	released, err := st.Released()
	if err != nil || len(released) != 3 {
		t.Errorf("released: %+v %v", released, err)
	}
	for _, r := range released {
		if r.Ago > time.Minute || r.User != "alice" {
			t.Errorf("%+v", r)
		}
	}
	for k := range byte(4) {
		s := sampleSession(k, now)
		s.Certificate[0] = 7
		err := st.Put(s)
		if used := k > 0; errors.Is(err, session.ErrKeyUsed) != used {
			t.Errorf("key %d: %v", k, err)
		}
	}
	s := sampleSession(3, now)
	if err := st.Put(s); !errors.Is(err, session.ErrKeyBound) {
		t.Errorf("to another certificate: %v", err)
	}
}
