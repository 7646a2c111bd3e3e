package identity

import (
	"bytes"
	"io"
	"slices"
	"time"

	"perimeterd/internal/statefile"
)

// Contents is what a state file holds of identities.
type Contents struct {
	statefile.Info
	Users      []User // by name, revoked ones included
	TokenStep  uint64
	TokenSteps []byte
}

// ReadContents reads a state file of this schema or an older one as it lies there, while nobody writes it, and all of it. Its
// errors are statefile.Check's.
func ReadContents(file io.ReaderAt, size int64) (c Contents, err error) {
	c.Info, err = statefile.Check(file, size, func(bucket string, k, v []byte) error {
		switch {
		case bucket == string(bucketUsers):
			u, err := decode(k, v)
			c.Users = append(c.Users, u)
			return err
		case bucket == string(bucketMeta) && bytes.Equal(k, keyTokenStep):
			c.TokenStep, err = decodeTokenStep(v)
			return err
		case bucket == string(bucketMeta) && bytes.Equal(k, keyTokenSteps):
			c.TokenSteps = bytes.Clone(v)
		}
		return nil
	})
	return c, err
}

// Count says how many users may come in, how many were revoked, and how many devices of the former were.
func (c Contents) Count() (active, revoked, devices int) {
	for _, u := range c.Users {
		if !u.Active() {
			revoked++
			continue
		}
		active++
		for _, d := range u.Devices {
			if !d.Revoked.IsZero() {
				devices++
			}
		}
	}
	return active, revoked, devices
}

// Kept is what Carry did, by "USER", "USER/DEVICE" and "USER (groups)". Renewed certificates hold, the ones before them do not.
type Kept struct {
	Revoked []string // who would have been let in again, or into more, and is not
	Missing []string // who could come in there and cannot here, for this state does not have them
	Renewed []string // whose certificate is another one since
}

// Carry takes over of a state what would make this one, which is of the same bastion, older, and put in its place, less closed:
// revocations, the epochs of knock secrets, groups that somebody is out of, renewals, the token steps, and credential ids that were given away. Users
// whom this one does not know are entered as revoked.
func Carry(db *statefile.DB, from Contents, now time.Time) (k Kept, err error) {
	err = db.Update(func(tx *statefile.Tx) error {
		meta := tx.Bucket(bucketMeta)
		if err := meta.SetSequence(max(meta.Sequence(), from.Sequences[string(bucketMeta)])); err != nil {
			return err
		}
		if err := raiseTokenStep(tx, from.TokenStep); err != nil {
			return err
		}
		if from.TokenSteps != nil { // all that this one has is in them
			if err := meta.Put(keyTokenSteps, from.TokenSteps); err != nil {
				return err
			}
		}
		for _, other := range from.Users {
			u, known, err := get(tx, other.Name)
			if err != nil {
				return err
			}
			if !known {
				u = other
				u.revoke("", now)
			}
			k.carry(&u, other)
			if err := put(tx, u); err != nil {
				return err
			}
		}
		return nil
	})
	return k, err
}

func (k *Kept) carry(u *User, from User) {
	u.Epoch = max(u.Epoch, from.Epoch)
	if from.Barred.After(u.Barred) {
		u.Barred = from.Barred
	}
	switch {
	case u.Active() && !from.Active():
		u.revoke("", from.Revoked)
		k.Revoked = append(k.Revoked, u.Name)
		return
	case !u.Active() && from.Active():
		k.Missing = append(k.Missing, u.Name)
		return
	}
	if n := len(u.Groups); n > 0 {
		u.Groups = slices.DeleteFunc(u.Groups, func(g string) bool { return !slices.Contains(from.Groups, g) })
		if len(u.Groups) < n {
			k.Revoked = append(k.Revoked, u.Name+" (groups)")
		}
	}
	for _, d := range from.Devices {
		i := slices.IndexFunc(u.Devices, func(own Device) bool { return own.ID() == d.ID() })
		if i < 0 {
			if d.Revoked.IsZero() {
				k.Missing = append(k.Missing, u.Name+"/"+d.Name)
			}
			continue
		}
		own := &u.Devices[i]
		if own.Key != d.Key || d.Next != nil && (own.Next == nil || own.Next.Key != d.Next.Key) {
			k.Renewed = append(k.Renewed, u.Name+"/"+d.Name)
		}
		// Once it was renewed, the one that it had is refused.
		own.Key, own.Issuer, own.NotAfter, own.First, own.Old, own.Next = d.Key, d.Issuer, d.NotAfter, d.First, d.Old, d.Next
		if own.Revoked.IsZero() && !d.Revoked.IsZero() {
			own.Revoked = d.Revoked
			k.Revoked = append(k.Revoked, u.Name+"/"+d.Name)
		}
	}
}
