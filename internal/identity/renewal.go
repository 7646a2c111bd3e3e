package identity

import (
	"errors"
	"fmt"
	"time"

	"perimeterd/internal/statefile"
)

// ErrNotRenewed is wrapped where a device's certificate has no successor.
var ErrNotRenewed = errors.New("cannot be renewed")

// Successor is a renewed certificate that its owner may not have got yet: until it is used for the first time, the one before
// it holds too.
type Successor struct {
	Key      KeyHash   `json:"key"`
	Issuer   string    `json:"issuer,omitempty"` // IssuerOf the certificate
	NotAfter time.Time `json:"not_after"`
}

// ID stands for the device's certificates, one renewed from another: the key hash of the first.
func (d Device) ID() KeyHash {
	if d.First == (KeyHash{}) {
		return d.Key
	}
	return d.First
}

// end is when the last of the device's certificates ends.
func (d Device) end() time.Time {
	if d.Next != nil && d.Next.NotAfter.After(d.NotAfter) {
		return d.Next.NotAfter
	}
	return d.NotAfter
}

// has says whether the key is, or was, the device's, as far as is known.
func (d Device) has(key KeyHash) bool {
	return d.Key == key || d.First == key || d.Old == key || d.Next != nil && d.Next.Key == key
}

// Renew enters a successor of the user's certificate with the key old. A successor that was never used makes room. Errors:
// ErrNoUser, ErrNotRenewed, ErrUserExists where the key is somebody's already, or of the medium.
func (s *Users) Renew(name string, old KeyHash, next Successor, now time.Time) (u User, err error) {
	err = s.update(func(tx *statefile.Tx) error {
		if u, err = mustGet(tx, name); err != nil {
			return err
		}
		for i := range u.Devices {
			d := &u.Devices[i]
			if d.Key != old {
				continue
			}
			if !u.Active() || !d.Active(now) {
				return fmt.Errorf("user %q: device %q %w: it is revoked or expired", name, d.Name, ErrNotRenewed)
			}
			if d.Next == nil || d.Next.Key != next.Key {
				if err := unusedKey(tx, next.Key); err != nil {
					return err
				}
			}
			d.Next = &next
			return put(tx, u)
		}
		return fmt.Errorf("user %q: the certificate %w: it is not his", name, ErrNotRenewed)
	})
	return u, err
}

// Used makes a successor the device's certificate: from now on the one before it is refused. One that is so already changes
// nothing. Errors: ErrNoUser, or of the medium.
func (s *Users) Used(name string, key KeyHash) error {
	return s.update(func(tx *statefile.Tx) error {
		u, err := mustGet(tx, name)
		if err != nil {
			return err
		}
		for i := range u.Devices {
			if d := &u.Devices[i]; d.Next != nil && d.Next.Key == key {
				d.First, d.Old = d.ID(), d.Key
				d.Key, d.Issuer, d.NotAfter, d.Next = d.Next.Key, d.Next.Issuer, d.Next.NotAfter, nil
				return put(tx, u)
			}
		}
		return nil
	})
}
