package identity

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"perimeterd/internal/statefile"
)

// maxCredential is the highest credential id: the kernel's maps need bit 31 for themselves.
const maxCredential = 1<<31 - 1

var (
	bucketMeta      = []byte("meta")      // token_step, and what package statefile keeps; its sequence numbers credentials
	bucketUsers     = []byte("users")     // name → User, JSON
	bucketSequences = []byte("sequences") // name of a shared knock sequence → uint32 credential id
	keyTokenStep    = []byte("token_step")
	keyTokenSteps   = []byte("token_steps")
)

// ErrStateHeld is returned when another process, as a rule the daemon, holds the state file.
var ErrStateHeld = statefile.ErrHeld

// OpenState opens the state file for this process alone, as statefile.Open does, and makes it where missing.
func OpenState(path string) (*statefile.DB, error) {
	db, err := statefile.Open(path)
	if err != nil {
		return nil, err
	}
	err = db.Update(func(tx *statefile.Tx) error {
		for _, name := range [][]byte{bucketUsers, bucketSequences} {
			if _, err := tx.CreateBucketIfNotExists(name); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		db.Close()
		return nil, fmt.Errorf("state file %s: %w", path, err)
	}
	return db, nil
}

// ReadState opens a state file that is there to read it, next to others who do. An older one is brought up to this program's
// schema first, which takes writing. Errors: fs.ErrNotExist, ErrStateHeld.
func ReadState(path string) (*statefile.DB, error) {
	db, err := statefile.OpenReadOnly(path)
	if errors.Is(err, statefile.ErrOlder) {
		return OpenState(path)
	}
	return db, err
}

// nextCredential draws an id that was never given to anyone.
func nextCredential(tx *statefile.Tx) (uint32, error) {
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
type Meta struct{ db *statefile.DB }

// NewMeta reads and writes the state in db, which OpenState opened.
func NewMeta(db *statefile.DB) *Meta { return &Meta{db} }

// TokenStep is the step up to which no tokens may be loaded any more, whatever TokenSteps say; 0: none is barred.
func (m *Meta) TokenStep() (step uint64, err error) {
	err = m.db.View(func(tx *statefile.Tx) error {
		step, err = tokenStep(tx)
		return err
	})
	return step, err
}

// RaiseTokenStep bars tokens up to step, durably. A lower step than the recorded one changes nothing.
func (m *Meta) RaiseTokenStep(step uint64) error {
	return m.db.Update(func(tx *statefile.Tx) error {
		return raiseTokenStep(tx, step)
	})
}

func raiseTokenStep(tx *statefile.Tx, step uint64) error {
	have, err := tokenStep(tx)
	if err != nil || step <= have {
		return err
	}
	return tx.Bucket(bucketMeta).Put(keyTokenStep, binary.BigEndian.AppendUint64(nil, step))
}

func tokenStep(tx *statefile.Tx) (uint64, error) {
	return decodeTokenStep(tx.Bucket(bucketMeta).Get(keyTokenStep))
}

func decodeTokenStep(v []byte) (uint64, error) {
	switch len(v) {
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
	err = m.db.View(func(tx *statefile.Tx) error {
		text = bytes.Clone(tx.Bucket(bucketMeta).Get(keyTokenSteps))
		return nil
	})
	return text, err
}

// SetTokenSteps keeps, durably, which steps' tokens were ever loaded, in whose words it is.
func (m *Meta) SetTokenSteps(text []byte) error {
	return m.db.Update(func(tx *statefile.Tx) error { return tx.Bucket(bucketMeta).Put(keyTokenSteps, text) })
}

// SequenceCredential is the credential id of a shared knock sequence, given at the first call and kept for ever.
func (m *Meta) SequenceCredential(name string) (id uint32, err error) {
	err = m.db.Update(func(tx *statefile.Tx) error {
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
