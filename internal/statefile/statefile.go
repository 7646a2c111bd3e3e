// Package statefile is the one file in which a bastion remembers: users, sessions, revocations, the highest token step. It is a
// bbolt file with a seal.
//
// bbolt checks its two header pages and nothing else. A byte that rots elsewhere would bring the program down when it comes to
// the page, or be read as if it had been written: a revocation that is none any more. So the bucket "meta" holds a seal, the
// exclusive or of the SHA-256 of every record and of every bucket's sequence, which each transaction keeps; and before bbolt maps
// the file into memory, Check reads it page by page and compares. What opens is what was committed. The seal finds damage, not an
// attacker: who can write the file can seal it.
//
// A file with one bad header is refused, although bbolt would go on with the other: that is the state before the last change,
// and the last change may have been a revocation that somebody was told is done. A crash does not make such a file, since a
// header is 80 bytes of one sector, which a disk writes whole.
//
// The free list is not stored but found at each opening, as a bad one would make bbolt write over what is in use.
package statefile

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

const (
	// lockTimeout is how long an opening waits for another process to let go of the file.
	lockTimeout = time.Second
	// mapped is the address space taken for the file. As long as the file is smaller, no reader, as one that copies it all,
	// keeps a writer waiting for the mapping to move.
	mapped = 1 << 30
	// growth is by how many bytes the file grows at a time, and what a full disk leaves for revocations.
	growth = 1 << 20
)

var (
	// ErrHeld is wrapped when another process, as a rule the daemon, holds the file.
	ErrHeld = errors.New("another process holds it")
	// ErrOlder is wrapped when a file that may only be read has an older schema.
	ErrOlder = errors.New("it is of an older perimeterd")
)

var (
	bucketMeta = []byte("meta")
	keySchema  = []byte("schema") // decimal
	keySeal    = []byte("seal")   // 32 bytes; not under itself
)

// DB is an open file. Its methods may be called from several goroutines.
type DB struct {
	bolt     *bolt.DB
	file     *os.File
	reserved atomic.Int64 // bytes that the disk has set aside for the file
}

// Open opens the file for this process alone, made 0600 in a directory made 0700 where missing. It waits a second for
// another process. A file of an older program is brought to this one's schema, after a copy beside it; one of a newer
// program, and one that is damaged, is refused.
func Open(path string) (*DB, error) {
	if err := create(path); err != nil {
		return nil, fmt.Errorf("state file %s: %w", path, err)
	}
	db, info, err := open(path, false)
	if err != nil {
		return nil, err
	}
	if err := db.migrate(path, info); err != nil {
		db.Close()
		return nil, fmt.Errorf("state file %s: %w", path, err)
	}
	db.reserve()
	return db, nil
}

// OpenReadOnly opens a file that is there, next to others who only read. It changes nothing, on a read-only file system too.
// Errors: fs.ErrNotExist, ErrOlder, and Open's.
func OpenReadOnly(path string) (*DB, error) {
	db, info, err := open(path, true)
	if err == nil && info.Schema != Schema {
		db.Close()
		return nil, fmt.Errorf("state file %s: %w: schema %d, this one reads %d", path, ErrOlder, info.Schema, Schema)
	}
	return db, err
}

func open(path string, readOnly bool) (*DB, Info, error) {
	f, err := Hold(path, !readOnly)
	if err != nil {
		return nil, Info{}, err
	}
	db, info := &DB{file: f}, Info{}
	st, err := f.Stat()
	if err == nil {
		info, err = Check(f, st.Size(), nil) // before a byte of it is mapped
	}
	if err == nil {
		db.bolt, err = bolt.Open(path, 0o600, &bolt.Options{
			ReadOnly: readOnly, NoFreelistSync: true, FreelistType: bolt.FreelistMapType, InitialMmapSize: mapped,
			OpenFile: func(string, int, fs.FileMode) (*os.File, error) { return f, nil },
		})
	}
	if err != nil {
		f.Close()
		return nil, Info{}, fmt.Errorf("state file %s: %w", path, err)
	}
	db.bolt.AllocSize = growth
	return db, info, nil
}

// Hold opens the file and locks it, against everybody or only against those who write. It waits a second for the lock, which
// goes with the file's Close. Errors: ErrHeld, fs.ErrNotExist.
func Hold(path string, alone bool) (*os.File, error) {
	flag, how := os.O_RDONLY, unix.LOCK_SH
	if alone {
		flag, how = os.O_RDWR, unix.LOCK_EX
	}
	for deadline := time.Now().Add(lockTimeout); ; time.Sleep(lockTimeout / 20) {
		f, err := os.OpenFile(path, flag|unix.O_NOFOLLOW, 0) // root may open what the daemon's user has put there
		if errors.Is(err, unix.ELOOP) {
			return nil, fmt.Errorf("state file %s is a link, which is not followed: put the file itself there", path)
		}
		if err != nil {
			return nil, fmt.Errorf("state file: %w", err)
		}
		err = unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
		if err == nil && sameFile(f, path) { // another may have taken its place while we waited
			return f, nil
		}
		f.Close()
		if err != nil && err != unix.EWOULDBLOCK {
			return nil, fmt.Errorf("state file %s: lock: %w", path, err)
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("state file %s: %w, as a rule the running daemon: "+
				"ask it through its control socket, or stop it first", path, ErrHeld)
		}
	}
}

func sameFile(f *os.File, path string) bool {
	a, err := f.Stat()
	if err != nil {
		return false
	}
	b, err := os.Stat(path)
	return err == nil && os.SameFile(a, b)
}

// create makes an empty state where there is none: whole or not at all, so that a file without a byte is a damaged one.
func create(path string) error {
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	tmp, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	defer tmp.Close()
	if err := own(tmp, dir); err != nil {
		return err
	}
	raw, err := bolt.Open(tmp.Name(), 0o600, &bolt.Options{NoFreelistSync: true,
		OpenFile: func(string, int, fs.FileMode) (*os.File, error) { return tmp, nil }})
	if err != nil {
		return err
	}
	err = (&DB{bolt: raw}).Update(func(tx *Tx) error {
		meta, err := tx.CreateBucketIfNotExists(bucketMeta)
		if err != nil {
			return err
		}
		return meta.Put(keySchema, []byte(strconv.Itoa(Schema)))
	})
	if err := errors.Join(err, raw.Close()); err != nil {
		return err
	}
	if err := os.Link(tmp.Name(), path); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return syncDir(dir)
}

// own gives a new file to the owner of its directory, who is the daemon's user, where this is root's process. By a path it could
// be another file by now.
func own(f *os.File, dir string) error {
	if os.Geteuid() != 0 {
		return nil
	}
	st, err := os.Stat(dir)
	if err != nil {
		return err
	}
	owner := st.Sys().(*syscall.Stat_t)
	return f.Chown(int(owner.Uid), int(owner.Gid))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// SyncLate is for filling a file that nobody depends on yet: what changes is durable after Sync only.
func (db *DB) SyncLate() { db.bolt.NoSync = true }

// Sync makes all changes durable, after SyncLate.
func (db *DB) Sync() error { return db.bolt.Sync() }

// Close lets go of the file, after transactions under way.
func (db *DB) Close() error { return db.bolt.Close() }

// View runs fn on the state as it is now; what others write meanwhile is not seen.
func (db *DB) View(fn func(*Tx) error) error {
	return db.bolt.View(func(raw *bolt.Tx) error { return fn(begin(raw)) })
}

// errUnchanged rolls back what changed nothing.
var errUnchanged = errors.New("unchanged")

// Update runs fn and makes all that it changed durable, or with an error nothing of it. What changes nothing touches no
// disk, so that a full one does not fail it.
func (db *DB) Update(fn func(*Tx) error) error {
	err := db.bolt.Update(func(raw *bolt.Tx) error {
		tx := begin(raw)
		if err := fn(tx); err != nil {
			return err
		}
		if !tx.changed {
			return errUnchanged
		}
		return raw.Bucket(bucketMeta).Put(keySeal, tx.seal[:])
	})
	if err == errUnchanged {
		return nil
	}
	db.reserve()
	return err
}

// reserve has the disk set the file's space aside, as bbolt grows it by a hole: once the disk is full, there is still room to
// write a revocation. A disk that cannot is as good as before, so errors are nobody's.
func (db *DB) reserve() {
	if db.file == nil {
		return
	}
	if st, err := db.file.Stat(); err == nil && st.Size() > db.reserved.Load() {
		db.reserved.Store(st.Size())
		_ = unix.Fallocate(int(db.file.Fd()), 0, 0, st.Size())
	}
}

// Snapshot writes a copy of the file as it is at this moment, which may be opened as a state. Size is told first how many
// bytes will come. Neither readers nor writers wait for it.
func (db *DB) Snapshot(w io.Writer, size func(int64)) error {
	return db.bolt.View(func(tx *bolt.Tx) error {
		size(tx.Size())
		_, err := tx.WriteTo(w)
		return err
	})
}

// seal is the exclusive or of hashes.
type seal [sha256.Size]byte

func (s *seal) toggle(bucket, key, value []byte) {
	h := sha256.New()
	for _, part := range [][]byte{bucket, key} {
		h.Write(binary.BigEndian.AppendUint32(nil, uint32(len(part))))
		h.Write(part)
	}
	h.Write(value)
	for i, b := range h.Sum(nil) {
		s[i] ^= b
	}
}

// toggleSequence is for a bucket's sequence: as a record without a key, which no other is. That of an unused one is not there.
func (s *seal) toggleSequence(bucket []byte, n uint64) {
	if n != 0 {
		s.toggle(bucket, nil, binary.BigEndian.AppendUint64(nil, n))
	}
}

// Tx is a transaction. It and what comes from it are good until its function returns.
type Tx struct {
	raw     *bolt.Tx
	seal    seal
	changed bool
}

func begin(raw *bolt.Tx) *Tx {
	tx := &Tx{raw: raw}
	if meta := raw.Bucket(bucketMeta); meta != nil {
		copy(tx.seal[:], meta.Get(keySeal))
	}
	return tx
}

// Bucket is a bucket of this name, or nil, which has no records.
func (tx *Tx) Bucket(name []byte) *Bucket {
	raw := tx.raw.Bucket(name)
	if raw == nil {
		return nil
	}
	return &Bucket{raw, name, tx}
}

// CreateBucketIfNotExists is Bucket, and makes it where it is missing.
func (tx *Tx) CreateBucketIfNotExists(name []byte) (*Bucket, error) {
	if b := tx.Bucket(name); b != nil {
		return b, nil
	}
	raw, err := tx.raw.CreateBucket(name)
	if err != nil {
		return nil, err
	}
	tx.changed = true
	return &Bucket{raw, name, tx}, nil
}

// Bucket is a sorted map, and a counter besides.
type Bucket struct {
	raw  *bolt.Bucket
	name []byte
	tx   *Tx
}

// Get is the value of key, or nil. It must not be changed.
func (b *Bucket) Get(key []byte) []byte {
	if b == nil {
		return nil
	}
	return b.raw.Get(key)
}

// ForEach calls fn for every record, sorted by key, until it returns an error. It must not change the bucket.
func (b *Bucket) ForEach(fn func(k, v []byte) error) error {
	if b == nil {
		return nil
	}
	return b.raw.ForEach(fn)
}

// Cursor goes through the records by key.
func (b *Bucket) Cursor() Cursor { return Cursor{b.raw.Cursor()} }

// Cursor is at a record, or past the last.
type Cursor struct{ raw *bolt.Cursor }

// Seek goes to the first record whose key is not below key; where there is none, what it returns is nil.
func (c Cursor) Seek(key []byte) (k, v []byte) { return c.raw.Seek(key) }

// Next goes to the record after.
func (c Cursor) Next() (k, v []byte) { return c.raw.Next() }

// Put sets the value of key.
func (b *Bucket) Put(key, value []byte) error {
	old := b.raw.Get(key)
	if old != nil && bytes.Equal(old, value) {
		return nil
	}
	old = bytes.Clone(old) // Put may move it
	if err := b.raw.Put(key, value); err != nil {
		return err
	}
	if old != nil {
		b.tx.seal.toggle(b.name, key, old)
	}
	b.tx.seal.toggle(b.name, key, value)
	b.tx.changed = true
	return nil
}

// Delete removes key; one that is not there is none to remove.
func (b *Bucket) Delete(key []byte) error {
	old := b.raw.Get(key)
	if old == nil {
		return nil
	}
	b.tx.seal.toggle(b.name, key, old)
	b.tx.changed = true
	return b.raw.Delete(key)
}

// Sequence is the last number that NextSequence drew.
func (b *Bucket) Sequence() uint64 { return b.raw.Sequence() }

// NextSequence draws a number that it never drew before.
func (b *Bucket) NextSequence() (uint64, error) {
	n := b.raw.Sequence() + 1
	return n, b.SetSequence(n)
}

// SetSequence sets the number after which NextSequence goes on.
func (b *Bucket) SetSequence(n uint64) error {
	before := b.raw.Sequence()
	if n == before {
		return nil
	}
	if err := b.raw.SetSequence(n); err != nil {
		return err
	}
	b.tx.seal.toggleSequence(b.name, before)
	b.tx.seal.toggleSequence(b.name, n)
	b.tx.changed = true
	return nil
}
