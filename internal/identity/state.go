package identity

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"time"

	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
)

// Schema is the version of the state file that this program reads and writes.
const Schema = 1

// lockTimeout is how long OpenState waits for another process to let go of the file.
const lockTimeout = time.Second

// maxCredential is the highest credential id: the kernel's maps need bit 31 for themselves.
const maxCredential = 1<<31 - 1

var (
	bucketMeta      = []byte("meta")      // schema, token_step; its sequence numbers credentials
	bucketUsers     = []byte("users")     // name → User, JSON
	bucketSequences = []byte("sequences") // name of a shared knock sequence → uint32 credential id
	keySchema       = []byte("schema")
	keyTokenStep    = []byte("token_step")
	keyTokenSteps   = []byte("token_steps")
)

// ErrStateHeld is returned when another process, as a rule the daemon, holds the state file.
var ErrStateHeld = errors.New("another process holds it")

// OpenState opens the state file, made 0600 in a directory made 0700 where missing. It waits a second for the lock. A
// file of a newer program is refused.
func OpenState(path string) (*bolt.DB, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	if err := checkLength(path); err != nil {
		return nil, fmt.Errorf("state file %s: %w", path, err)
	}
	db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: lockTimeout})
	if errors.Is(err, berrors.ErrTimeout) {
		return nil, fmt.Errorf("state file %s: %w, as a rule the running daemon: "+
			"ask it through its control socket, or stop it first", path, ErrStateHeld)
	}
	if err != nil {
		return nil, fmt.Errorf("state file %s: %w", path, err)
	}
	if err := db.Update(prepare); err != nil {
		db.Close()
		return nil, fmt.Errorf("state file %s: %w", path, err)
	}
	return db, nil
}

// checkLength refuses a file that is shorter than it says itself. bbolt maps the file into memory, and dies of SIGBUS where
// pages are missing. The layout is bbolt's: go.etcd.io/bbolt/internal/common/meta.go, in the machine's byte order.
func checkLength(path string) error {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	const header, metaLen, magic = 16, 64, 0xED0CDAED
	pageSize := int64(os.Getpagesize())
	buf := make([]byte, header+metaLen)
	for page := range int64(2) {
		if _, err := f.ReadAt(buf, page*pageSize); err != nil {
			continue // too short for a meta page at all: bbolt says so itself
		}
		meta := buf[header:]
		sum := fnv.New64a()
		sum.Write(meta[:56])
		if binary.NativeEndian.Uint32(meta) != magic || binary.NativeEndian.Uint64(meta[56:]) != sum.Sum64() {
			continue
		}
		pageSize = int64(binary.NativeEndian.Uint32(meta[8:]))
		if want := int64(binary.NativeEndian.Uint64(meta[40:])) * pageSize; st.Size() < want {
			return fmt.Errorf("it is cut short, %d of %d bytes: restore a backup", st.Size(), want)
		}
	}
	return nil
}

func prepare(tx *bolt.Tx) error {
	meta, err := tx.CreateBucketIfNotExists(bucketMeta)
	if err != nil {
		return err
	}
	if v := meta.Get(keySchema); v == nil {
		if err := meta.Put(keySchema, []byte(strconv.Itoa(Schema))); err != nil {
			return err
		}
	} else if n, err := strconv.Atoi(string(v)); err != nil || n < 1 {
		return fmt.Errorf("its schema reads %q: it is not ours, or damaged: restore a backup", v)
	} else if n > Schema {
		return fmt.Errorf("schema %d was written by a newer perimeterd, this one knows up to %d: "+
			"install the newer one again, or restore a backup made before it", n, Schema)
	}
	for _, name := range [][]byte{bucketUsers, bucketSequences} {
		if _, err := tx.CreateBucketIfNotExists(name); err != nil {
			return err
		}
	}
	return nil
}

// nextCredential draws an id that was never given to anyone.
func nextCredential(tx *bolt.Tx) (uint32, error) {
	n, err := tx.Bucket(bucketMeta).NextSequence()
	if err != nil {
		return 0, err
	}
	if n > maxCredential {
		return 0, fmt.Errorf("all %d credential ids are used", maxCredential)
	}
	return uint32(n), nil
}

// Meta is what the state file remembers besides users.
type Meta struct{ db *bolt.DB }

// NewMeta reads and writes the state in db, which OpenState opened.
func NewMeta(db *bolt.DB) *Meta { return &Meta{db} }

// TokenStep is the step up to which no tokens may be loaded any more, whatever TokenSteps say; 0: none is barred.
func (m *Meta) TokenStep() (step uint64, err error) {
	err = m.db.View(func(tx *bolt.Tx) error {
		step, err = tokenStep(tx)
		return err
	})
	return step, err
}

// RaiseTokenStep bars tokens up to step, durably. A lower step than the recorded one changes nothing.
func (m *Meta) RaiseTokenStep(step uint64) error {
	return m.db.Update(func(tx *bolt.Tx) error {
		have, err := tokenStep(tx)
		if err != nil || step <= have {
			return err
		}
		return tx.Bucket(bucketMeta).Put(keyTokenStep, binary.BigEndian.AppendUint64(nil, step))
	})
}

func tokenStep(tx *bolt.Tx) (uint64, error) {
	switch v := tx.Bucket(bucketMeta).Get(keyTokenStep); len(v) {
	case 0:
		return 0, nil
	case 8:
		return binary.BigEndian.Uint64(v), nil
	default:
		// Reading it as 0 would let spent tokens open again.
		return 0, fmt.Errorf("state: the highest token step is %d bytes long, want 8: restore a backup", len(v))
	}
}

// TokenSteps is what SetTokenSteps kept; nil before the first.
func (m *Meta) TokenSteps() (text []byte, err error) {
	err = m.db.View(func(tx *bolt.Tx) error {
		text = bytes.Clone(tx.Bucket(bucketMeta).Get(keyTokenSteps))
		return nil
	})
	return text, err
}

// SetTokenSteps keeps, durably, which steps' tokens were ever loaded, in whose words it is.
func (m *Meta) SetTokenSteps(text []byte) error {
	return m.db.Update(func(tx *bolt.Tx) error { return tx.Bucket(bucketMeta).Put(keyTokenSteps, text) })
}

// SequenceCredential is the credential id of a shared knock sequence, given at the first call and kept for ever.
func (m *Meta) SequenceCredential(name string) (id uint32, err error) {
	err = m.db.Update(func(tx *bolt.Tx) error {
		b := tx.Bucket(bucketSequences)
		if v := b.Get([]byte(name)); len(v) == 4 {
			id = binary.BigEndian.Uint32(v)
			return nil
		}
		if id, err = nextCredential(tx); err != nil {
			return err
		}
		return b.Put([]byte(name), binary.BigEndian.AppendUint32(nil, id))
	})
	return id, err
}
