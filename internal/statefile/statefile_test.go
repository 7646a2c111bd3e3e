package statefile

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
)

// records are what a file holds: "bucket/key" → value, and "bucket#" → sequence.
type records map[string]string

func openFile(t testing.TB, path string) *DB {
	t.Helper()
	db, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

// read is what Check visits.
func read(data []byte) (records, error) {
	all := records{}
	info, err := Check(bytes.NewReader(data), int64(len(data)), func(bucket string, k, v []byte) error {
		all[bucket+"/"+string(k)] = string(v)
		return nil
	})
	for name, n := range info.Sequences {
		if n > 0 {
			all[name+"#"] = fmt.Sprint(n)
		}
	}
	return all, err
}

func snapshot(t testing.TB, db *DB) []byte {
	t.Helper()
	var b bytes.Buffer
	told := int64(-1)
	if err := db.Snapshot(&b, func(n int64) { told = n }); err != nil || told != int64(b.Len()) {
		t.Fatalf("%d bytes of %d: %v", b.Len(), told, err)
	}
	return b.Bytes()
}

// fill makes a file of several levels, with deletions, values over several pages, and an unused remainder.
func fill(t testing.TB, db *DB, rounds int) records {
	t.Helper()
	r := rand.New(rand.NewPCG(1, uint64(rounds)))
	model := records{"meta/schema": fmt.Sprint(Schema)}
	for range rounds {
		err := db.Update(func(tx *Tx) error {
			for range 40 {
				bucket := []string{"users", "sessions", "keys"}[r.IntN(3)]
				b, err := tx.CreateBucketIfNotExists([]byte(bucket))
				if err != nil {
					return err
				}
				key := fmt.Sprintf("%0*d", 1+r.IntN(80), r.IntN(300))
				switch n := r.IntN(10); {
				case n == 0:
					if err := b.Delete([]byte(key)); err != nil {
						return err
					}
					delete(model, bucket+"/"+key)
				case n == 1:
					n, err := b.NextSequence()
					if err != nil {
						return err
					}
					model[bucket+"#"] = fmt.Sprint(n)
				default:
					size := r.IntN(400)
					if r.IntN(50) == 0 {
						size = r.IntN(20000)
					}
					value := strings.Repeat(string(rune('a'+r.IntN(26))), size)
					if err := b.Put([]byte(key), []byte(value)); err != nil {
						return err
					}
					model[bucket+"/"+key] = value
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return model
}

func TestCheckFindsWhatWasWritten(t *testing.T) {
	for rounds := range 15 {
		path := filepath.Join(t.TempDir(), "state.db")
		db := openFile(t, path)
		model := fill(t, db, rounds)
		check := func(what string, data []byte) {
			t.Helper()
			if got, err := read(data); err != nil || !maps.Equal(got, model) {
				t.Fatalf("%s after %d rounds: %v, %d records, want %d", what, rounds, err, len(got), len(model))
			}
		}
		check("a snapshot", snapshot(t, db))
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		check("the file", data)
	}
}

func TestSnapshotOpensAsAState(t *testing.T) {
	dir := t.TempDir()
	db := openFile(t, filepath.Join(dir, "state.db"))
	model := fill(t, db, 20)
	for i := range 5 { // of headers with even and odd numbers
		copied := filepath.Join(dir, fmt.Sprintf("copy%d.db", i))
		if err := os.WriteFile(copied, snapshot(t, db), 0o600); err != nil {
			t.Fatal(err)
		}
		again := openFile(t, copied)
		for n := range 5 {
			if err := again.Update(func(tx *Tx) error { return tx.Bucket([]byte("users")).Put([]byte("new"), []byte{byte(n)}) }); err != nil {
				t.Fatal(err)
			}
			got, err := read(snapshot(t, again))
			if err != nil || got["users/new"] != string([]byte{byte(n)}) || len(got) < len(model) {
				t.Fatalf("%v, %d records", err, len(got))
			}
		}
		if err := db.Update(func(tx *Tx) error { _, err := tx.Bucket([]byte("users")).NextSequence(); return err }); err != nil {
			t.Fatal(err)
		}
	}
}

// hurt is a file that something happened to.
func hurt(r *rand.Rand, whole []byte) (data []byte, what string) {
	data = slices.Clone(whole)
	at := r.IntN(len(data))
	switch r.IntN(6) {
	case 0, 1:
		return data[:at], fmt.Sprintf("cut to %d bytes", at)
	case 2:
		bit := r.IntN(8)
		data[at] ^= 1 << bit
		return data, fmt.Sprintf("bit %d of byte %d flipped", bit, at)
	case 3:
		data[at] = byte(r.Uint32())
		return data, fmt.Sprintf("byte %d is %#x", at, data[at])
	case 4:
		at &^= 511
		clear(data[at:min(at+512, len(data))])
		return data, fmt.Sprintf("the sector at %d zeroed", at)
	default: // a sector that belongs elsewhere
		from := r.IntN(len(data)) &^ 511
		at &^= 511
		copy(data[at:min(at+512, len(data))], whole[from:min(from+512, len(whole))])
		return data, fmt.Sprintf("the sector at %d is that of %d", at, from)
	}
}

func TestDamagedFileIsRefusedOrWhole(t *testing.T) {
	dir := t.TempDir()
	path, torn := filepath.Join(dir, "state.db"), filepath.Join(dir, "torn.db")
	db := openFile(t, path)
	model := fill(t, db, 25)
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	info, err := Check(bytes.NewReader(whole), int64(len(whole)), nil)
	if err != nil {
		t.Fatal(err)
	}
	seed := uint64(time.Now().UnixNano())
	r := rand.New(rand.NewPCG(seed, 0))
	refused, opened := 0, 0
	for range 600 {
		data, what := hurt(r, whole[:info.Size]) // what follows is unused
		if err := os.WriteFile(torn, data, 0o600); err != nil {
			t.Fatal(err)
		}
		db, err := Open(torn)
		if err != nil {
			if !strings.HasPrefix(err.Error(), "state file "+torn+": it is ") || !strings.HasSuffix(err.Error(), ": restore a backup") {
				t.Fatalf("seed %d, %s: %v", seed, what, err)
			}
			refused++
			continue
		}
		opened++
		// What is there is all that was, and goes on to be a file that opens.
		got, err := read(snapshot(t, db))
		if err != nil || !maps.Equal(got, model) {
			t.Fatalf("seed %d, %s: opened with %d of %d records, %v", seed, what, len(got), len(model), err)
		}
		if err := db.Update(func(tx *Tx) error { return tx.Bucket([]byte("users")).Put([]byte("more"), make([]byte, 9000)) }); err != nil {
			t.Fatalf("seed %d, %s: %v", seed, what, err)
		}
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
		if db, err = Open(torn); err != nil {
			t.Fatalf("seed %d, %s: opened, changed, and then: %v", seed, what, err)
		}
		db.Close()
	}
	t.Logf("a file of %d bytes with %d records, damaged: refused %d times, opened whole %d times", info.Size, len(model), refused, opened)
}

// FuzzCheck changes two places of a file without a seal, whose headers are made good again, or nothing else would be reached.
func FuzzCheck(f *testing.F) {
	dir := f.TempDir()
	files := [][]byte{schema1(f, filepath.Join(dir, "few.db"), 3), schema1(f, filepath.Join(dir, "many.db"), 200)}
	f.Add(uint8(0), uint32(0), []byte{}, uint32(0), []byte{})
	f.Add(uint8(1), uint32(4096+16+16), []byte{9}, uint32(3*4096), []byte{2})
	f.Fuzz(func(t *testing.T, which uint8, at uint32, patch []byte, at2 uint32, patch2 []byte) {
		data := slices.Clone(files[int(which)%len(files)])
		copy(data[int(at)%len(data):], patch)
		copy(data[int(at2)%len(data):], patch2)
		for at := 0; at <= 4096; at += 4096 {
			m := data[at+pageHeader:]
			sum := fnv.New64a()
			sum.Write(m[:metaSize-8])
			binary.NativeEndian.PutUint64(m[metaSize-8:], sum.Sum64())
		}
		if _, err := read(data); err != nil {
			return
		}
		// What passes is good for bbolt.
		path := filepath.Join(dir, fmt.Sprint(os.Getpid()))
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		db, err := Open(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := db.Update(func(tx *Tx) error { return tx.Bucket(bucketMeta).Put([]byte("fuzz"), data[:6000]) }); err != nil {
			t.Fatal(err)
		}
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
	})
}

// schema1 is a file as perimeterd made it before there was a seal, with a list of free pages.
func schema1(t testing.TB, path string, users int) []byte {
	t.Helper()
	raw, err := bolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	put := func(bucket, key, value string) {
		t.Helper()
		err := raw.Update(func(tx *bolt.Tx) error {
			b, err := tx.CreateBucketIfNotExists([]byte(bucket))
			if err != nil {
				return err
			}
			if _, err := b.NextSequence(); err != nil {
				return err
			}
			return b.Put([]byte(key), []byte(value))
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	put("meta", "schema", "1")
	for i := range users {
		put("users", fmt.Sprintf("user%d", i), strings.Repeat("x", 100))
	}
	if err := raw.Close(); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestOlderSchemaIsBroughtUpAfterACopy(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "state.db")
	before := schema1(t, path, 200)
	want, err := read(before)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := OpenReadOnly(path); !errors.Is(err, ErrOlder) {
		t.Fatalf("to read only: %v", err)
	}
	db := openFile(t, path)
	got, err := read(snapshot(t, db))
	if err != nil {
		t.Fatal(err)
	}
	want["meta/schema"] = fmt.Sprint(Schema)
	if !maps.Equal(got, want) {
		t.Fatalf("%d records, want %d", len(got), len(want))
	}
	kept, err := os.ReadFile(path + ".schema1")
	if err != nil || !bytes.Equal(kept, before) {
		t.Fatalf("the copy has %d bytes, want %d: %v", len(kept), len(before), err)
	}
	if st, err := os.Stat(path + ".schema1"); err != nil || st.Mode().Perm() != 0o600 {
		t.Fatalf("%v %v", st.Mode(), err)
	}
	left, err := filepath.Glob(filepath.Join(dir, ".*"))
	if err != nil || len(left) > 0 {
		t.Fatalf("%v stays, %v", left, err)
	}
}

func TestOlderSchemaStaysWhereNoCopyCanBeMade(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	before := schema1(t, path, 3)
	if err := os.MkdirAll(path+".schema1/in/the/way", 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(path); err == nil || !strings.Contains(err.Error(), "schema 1 is left as it is, since no copy could be made before the change to 2: ") {
		t.Fatal(err)
	}
	after, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(after, before) {
		t.Fatalf("it changed: %v", err)
	}
}

func TestNewerSchemaIsRefusedByName(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	for schema, want := range map[string]string{
		"3":   "schema 3 was written by a newer perimeterd, this one knows up to 2: install the newer one again, or restore a backup made before it",
		"one": `its schema reads "one": it is not ours, or damaged: restore a backup`,
		"0":   `its schema reads "0": it is not ours`,
	} {
		os.Remove(path)
		db := openFile(t, path)
		if err := db.Update(func(tx *Tx) error { return tx.Bucket(bucketMeta).Put(keySchema, []byte(schema)) }); err != nil {
			t.Fatal(err)
		}
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
		before, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for name, open := range map[string]func(string) (*DB, error){"open": Open, "read": OpenReadOnly} {
			if _, err := open(path); err == nil || !strings.Contains(err.Error(), want) {
				t.Fatalf("%s, schema %s: %v, want %q", name, schema, err, want)
			}
		}
		if after, err := os.ReadFile(path); err != nil || !bytes.Equal(before, after) {
			t.Fatalf("schema %s: the file changed, %v", schema, err)
		}
	}
}

func TestWhatIsNoStateIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	other := filepath.Join(t.TempDir(), "other.db")
	raw, err := bolt.Open(other, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	raw.Close()
	bare, err := os.ReadFile(other)
	if err != nil {
		t.Fatal(err)
	}
	for want, data := range map[string][]byte{
		"it is empty: restore a backup":                                  {},
		"it is damaged (its header at byte 0; ":                          []byte("state_dir = \"/var/lib/perimeterd\"\n"),
		"it is cut short, 4096 bytes, ":                                  bare[:4096],
		"it has no schema: it is not ours, or damaged: restore a backup": bare,
	} {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(path); err == nil || !strings.Contains(err.Error(), "state file "+path+": "+want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}

func TestALinkIsNotFollowed(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state")
	db, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	db.Close()
	link := path + "-link"
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	for _, alone := range []bool{false, true} {
		f, err := Hold(link, alone)
		if err == nil {
			f.Close()
		}
		if err == nil || !strings.Contains(err.Error(), link+" is a link, which is not followed") {
			t.Errorf("alone %v: %v", alone, err)
		}
	}
}

func TestReadersShareAndWritersDoNot(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	if _, err := OpenReadOnly(path); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("missing: %v", err)
	}
	db := openFile(t, path)
	for name, open := range map[string]func(string) (*DB, error){"open": Open, "read": OpenReadOnly} {
		if _, err := open(path); !errors.Is(err, ErrHeld) || !strings.Contains(err.Error(), "running daemon") {
			t.Fatalf("%s while another writes: %v", name, err)
		}
	}
	db.Close()
	before, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		db, err := OpenReadOnly(path)
		if err != nil {
			t.Fatal(err)
		}
		defer db.Close()
		err = db.Update(func(tx *Tx) error { return nil })
		if err == nil {
			t.Error("a reader writes")
		}
	}
	if _, err := Open(path); !errors.Is(err, ErrHeld) {
		t.Fatalf("while others read: %v", err)
	}
	after, err := os.Stat(path)
	if err != nil || !after.ModTime().Equal(before.ModTime()) || after.Size() != before.Size() {
		t.Fatalf("reading changed %v to %v, %v", before, after, err)
	}
}

// A restore puts another file in the place of the one that a starting daemon waits for.
func TestWhoWaitedForAFileThatIsReplacedGetsTheOneInItsPlace(t *testing.T) {
	dir := t.TempDir()
	path, next := filepath.Join(dir, "state.db"), filepath.Join(dir, "next.db")
	openFile(t, next).Close()
	openFile(t, path).Close()
	held, err := Hold(path, true)
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan error, 1)
	go func() {
		db, err := Open(path)
		if err == nil {
			defer db.Close()
			if !sameFile(db.file, path) {
				err = errors.New("it has the old file")
			}
		}
		got <- err
	}()
	if err := os.Rename(next, path); err != nil {
		t.Fatal(err)
	}
	held.Close()
	if err := <-got; err != nil {
		t.Fatal(err)
	}
}

func TestUpdateThatChangesNothingWritesNothing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	db := openFile(t, path)
	same := func(tx *Tx) error {
		b, err := tx.CreateBucketIfNotExists(bucketMeta)
		if err != nil {
			return err
		}
		return errors.Join(b.Put(keySchema, []byte(fmt.Sprint(Schema))), b.Delete([]byte("nothing")), b.SetSequence(0))
	}
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := db.Update(same); err != nil {
		t.Fatal(err)
	}
	after, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(before, after) {
		t.Fatalf("the file changed, %v", err)
	}
	// Nor does one that fails.
	failed := errors.New("no")
	err = db.Update(func(tx *Tx) error {
		if err := tx.Bucket(bucketMeta).Put([]byte("k"), []byte("v")); err != nil {
			return err
		}
		return failed
	})
	if err != failed {
		t.Fatal(err)
	}
	if got, err := read(snapshot(t, db)); err != nil || len(got) != 1 {
		t.Fatalf("%v %v", got, err)
	}
}

// BenchmarkCheck is what every opening costs: 10,000 users of 600 bytes, 100,000 keys.
func BenchmarkCheck(b *testing.B) {
	db := openFile(b, filepath.Join(b.TempDir(), "state.db"))
	err := db.Update(func(tx *Tx) error {
		for name, n := range map[string]int{"users": 10_000, "keys": 100_000} {
			bucket, err := tx.CreateBucketIfNotExists([]byte(name))
			if err != nil {
				return err
			}
			size := 600
			if name == "keys" {
				size = 40
			}
			for i := range n {
				if err := bucket.Put([]byte(fmt.Sprintf("%032d", i)), make([]byte, size)); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		b.Fatal(err)
	}
	data := snapshot(b, db)
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		if _, err := Check(bytes.NewReader(data), int64(len(data)), nil); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkUpdate(b *testing.B) {
	db := openFile(b, filepath.Join(b.TempDir(), "state.db"))
	for i := 0; b.Loop(); i++ {
		err := db.Update(func(tx *Tx) error {
			users, err := tx.CreateBucketIfNotExists([]byte("users"))
			if err != nil {
				return err
			}
			return users.Put([]byte(fmt.Sprintf("%d", i%1000)), []byte(fmt.Sprintf("%0600d", i)))
		})
		if err != nil {
			b.Fatal(err)
		}
	}
}
