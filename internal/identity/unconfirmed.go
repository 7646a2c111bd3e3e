package identity

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"

	"perimeterd/internal/statefile"
)

// Unconfirmed says that a configuration file was tried and not confirmed, so that another rules until the file changes.
type Unconfirmed struct {
	File [sha256.Size]byte // of the file's text
	Good []byte            // text of the configuration that rules instead
}

var keyUnconfirmed = []byte("unconfirmed")

// Unconfirmed is what SetUnconfirmed recorded, or nil.
func (m *Meta) Unconfirmed() (u *Unconfirmed, err error) {
	err = m.db.View(func(tx *statefile.Tx) error {
		v := tx.Bucket(bucketMeta).Get(keyUnconfirmed)
		if v == nil {
			return nil
		}
		if err := json.Unmarshal(v, &u); err != nil {
			return fmt.Errorf("state: the configuration that was not confirmed: %w: restore a backup", err)
		}
		return nil
	})
	return u, err
}

// SetUnconfirmed records it durably; nil removes the record.
func (m *Meta) SetUnconfirmed(u *Unconfirmed) error {
	return m.db.Update(func(tx *statefile.Tx) error {
		if u == nil {
			return tx.Bucket(bucketMeta).Delete(keyUnconfirmed)
		}
		v, err := json.Marshal(u)
		if err != nil {
			return err
		}
		return tx.Bucket(bucketMeta).Put(keyUnconfirmed, v)
	})
}
