package identity

import (
	"bytes"
	"cmp"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"perimeterd/internal/statefile"
)

var (
	// ErrName is wrapped by errors about the form of a name.
	ErrName = errors.New("not a name")
	// ErrSetting is wrapped where a setting has a value that cannot be.
	ErrSetting = errors.New("not possible")
	// ErrNoUser is wrapped when a user or device does not exist.
	ErrNoUser = errors.New("not known here")
	// ErrUserExists is wrapped when what should be added is there already.
	ErrUserExists = errors.New("exists already")
)

// maxDevices bounds a user's record, revoked devices included: it is read at every handshake.
const maxDevices = 256

// Renewals is how long after the enrolment certificates are renewed at most.
const Renewals = 365 * 24 * time.Hour

// KeyHash is the SHA-256 of a public key (SubjectPublicKeyInfo), hexadecimal as text.
type KeyHash [32]byte

// MarshalText writes hexadecimal.
func (h KeyHash) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, h[:]), nil }

// UnmarshalText is the inverse of MarshalText.
func (h *KeyHash) UnmarshalText(text []byte) error {
	if n, err := hex.Decode(h[:], text[:min(len(text), 2*len(h))]); err != nil || n != len(h) || len(text) != 2*len(h) {
		return errors.New("key hash: want 64 hexadecimal digits")
	}
	return nil
}

// User is a person who may come in. The JSON form is what the state file holds and `user list --json` prints.
type User struct {
	Name       string    `json:"name"`
	Groups     []string  `json:"groups"`
	Credential uint32    `json:"credential"` // in the kernel's maps; never another's
	Epoch      uint32    `json:"epoch"`      // of the knock secret; a higher one makes earlier secrets worthless
	Created    time.Time `json:"created"`
	Revoked    time.Time `json:"revoked,omitzero"`
	// Barred is when he was last revoked, if he was let in again since: of an external authority's certificates, which the
	// store does not know, those issued before are not his any more.
	Barred time.Time `json:"barred,omitzero"`
	Settings
	Devices []Device `json:"devices"` // oldest first, revoked ones included; of an external authority's, those entered here
}

// Device is one certificate of a user, and those renewed from it.
type Device struct {
	Name     string     `json:"name"`
	Key      KeyHash    `json:"key"`
	Issuer   string     `json:"issuer,omitempty"` // of the certificate: IssuerOf
	NotAfter time.Time  `json:"not_after"`
	Created  time.Time  `json:"created"`
	Revoked  time.Time  `json:"revoked,omitzero"`
	First    KeyHash    `json:"first,omitzero"`     // of the certificate it was enrolled with; zero: Key
	Old      KeyHash    `json:"old,omitzero"`       // of the one before this; zero: there was none
	Next     *Successor `json:"next,omitempty"`     // issued, and never used so far
	LastSeen time.Time  `json:"last_seen,omitzero"` // for lists: as Seen recorded it
}

// Active says whether the user is not revoked. Whether a certificate still holds is the device's matter.
func (u User) Active() bool { return u.Revoked.IsZero() }

// Active says whether the device is neither revoked nor expired.
func (d Device) Active(now time.Time) bool { return d.Revoked.IsZero() && now.Before(d.end()) }

// Enrolment is a certificate that was just issued, about to become a user's. Without Device, Key and NotAfter it is a name
// alone, which lets in certificates of an external authority, and none of the built-in one.
type Enrolment struct {
	Name     string    `json:"name"`
	Groups   []string  `json:"groups"` // for a user who is active already: empty, or what he has
	Device   string    `json:"device"`
	Key      KeyHash   `json:"key"`
	Issuer   string    `json:"issuer,omitempty"` // IssuerOf the certificate
	NotAfter time.Time `json:"not_after"`
	Replace  bool      `json:"replace,omitempty"` // of a device that an active user has: its certificates are revoked
}

func (e *Enrolment) nameAlone() bool {
	return e.Device == "" && e.Key == (KeyHash{}) && e.NotAfter.IsZero()
}

// Users is the store of users.
type Users struct {
	db       *statefile.DB
	pending  pending
	ordering sync.Mutex // of changes; readers never take it
}

// NewUsers reads and writes the users in db, which OpenState opened.
func NewUsers(db *statefile.DB) *Users { return &Users{db: db} }

// Add enters a new user, gives an active one another device, or lets a revoked one in again: with his old credential id, a
// new epoch, and none of his old certificates. A device whose certificate expired may be added again under its name.
func (s *Users) Add(e Enrolment, now time.Time) (u User, err error) {
	if err := e.check(now); err != nil {
		return User{}, err
	}
	err = s.update(func(tx *statefile.Tx) error {
		var known bool
		if u, known, err = get(tx, e.Name); err != nil {
			return err
		}
		if e.Replace {
			if err := u.retire(e, now); err != nil {
				return err
			}
		}
		switch {
		case !known:
			u = User{Name: e.Name, Groups: e.Groups, Created: now, Devices: []Device{}}
			if u.Credential, err = nextCredential(tx); err != nil {
				return err
			}
		case !u.Active():
			u.Groups, u.Barred, u.Revoked, u.Epoch = e.Groups, u.Revoked, time.Time{}, u.Epoch+1
		case e.nameAlone():
			return fmt.Errorf("user %q: %w, in groups %q", u.Name, ErrUserExists, u.Groups)
		case len(e.Groups) > 0 && !sameSet(e.Groups, u.Groups):
			return fmt.Errorf("user %q: %w, in groups %q: leave --group off, or revoke him first", u.Name, ErrUserExists, u.Groups)
		}
		if e.nameAlone() {
			return put(tx, u)
		}
		for _, d := range u.Devices {
			if d.Name == e.Device && d.Active(now) {
				return fmt.Errorf("user %q: device %q %w, valid until %s: name another with --device, or revoke this one first",
					u.Name, d.Name, ErrUserExists, d.NotAfter.Format(time.DateOnly))
			}
		}
		if err := unusedKey(tx, e.Key); err != nil {
			return err
		}
		if len(u.Devices) >= maxDevices {
			return fmt.Errorf("user %q: has had %d devices, the most there may be: use another name", u.Name, maxDevices)
		}
		u.Devices = append(u.Devices, Device{Name: e.Device, Key: e.Key, Issuer: e.Issuer, NotAfter: e.NotAfter, Created: now})
		return put(tx, u)
	})
	if err != nil {
		return User{}, err
	}
	return u, nil
}

// retire revokes the certificates of a device that is about to get another.
func (u *User) retire(e Enrolment, now time.Time) error {
	known := false
	for i := range u.Devices {
		if d := &u.Devices[i]; d.Name == e.Device {
			known = true
			if d.Revoked.IsZero() {
				d.Revoked = now
			}
		}
	}
	if !known || !u.Active() {
		return fmt.Errorf("user %q with device %q is %w, or revoked: `perimeterd user add` enters him", e.Name, e.Device, ErrNoUser)
	}
	return nil
}

// unusedKey refuses a key that somebody has, or had, a certificate for: it stands for one certificate.
func unusedKey(tx *statefile.Tx, key KeyHash) error {
	text, err := key.MarshalText()
	if err != nil {
		return err
	}
	return tx.Bucket(bucketUsers).ForEach(func(k, v []byte) error {
		if !bytes.Contains(v, text) { // of ten thousand, none is taken apart
			return nil
		}
		u, err := decode(k, v)
		if err != nil {
			return err
		}
		for _, d := range u.Devices {
			if d.has(key) {
				return fmt.Errorf("user %q: this key %w, as device %q: make a new one", u.Name, ErrUserExists, d.Name)
			}
		}
		return nil
	})
}

func each(tx *statefile.Tx, fn func(User) error) error {
	return tx.Bucket(bucketUsers).ForEach(func(k, v []byte) error {
		u, err := decode(k, v)
		if err != nil {
			return err
		}
		return fn(u)
	})
}

func (e *Enrolment) check(now time.Time) error {
	if err := CheckName("user", e.Name); err != nil {
		return err
	}
	if err := CheckName("device", e.Device); err != nil && !e.nameAlone() {
		return err
	}
	if err := checkGroups(e.Name, e.Groups); err != nil {
		return err
	}
	if e.Groups == nil {
		e.Groups = []string{}
	}
	if !e.nameAlone() && (e.Key == (KeyHash{}) || !e.NotAfter.After(now)) {
		return fmt.Errorf("user %q: %w: the certificate has no key or ended already", e.Name, ErrName)
	}
	return nil
}

func sameSet(a, b []string) bool {
	a, b = slices.Sorted(slices.Values(a)), slices.Sorted(slices.Values(b))
	return slices.Equal(slices.Compact(a), slices.Compact(b))
}

// Get finds a user, active or revoked. Errors: ErrNoUser, or of the medium.
func (s *Users) Get(name string) (u User, err error) {
	err = s.db.View(func(tx *statefile.Tx) error {
		u, err = mustGet(tx, name)
		return err
	})
	if errors.Is(err, ErrNoUser) {
		if since, is := s.pending.user(name); is {
			return forbidden(name, since), nil
		}
	}
	s.pending.overlay(&u)
	return u, err
}

// List is every user, revoked ones included, by name.
func (s *Users) List() (all []User, err error) {
	err = s.db.View(func(tx *statefile.Tx) error {
		return each(tx, func(u User) error {
			s.pending.overlay(&u)
			for i := range u.Devices {
				u.Devices[i].LastSeen = lastSeen(tx, u.Devices[i].ID())
			}
			all = append(all, u)
			return nil
		})
	})
	return all, err
}

// Revoke ends a user's right to come in, or with a device's name that device's alone, and returns what he is now. To
// revoke again changes nothing. A device keeps the user's knock secret, which opens the window but nothing behind it.
// Errors: ErrNoUser, or of the medium; a revocation that could not be written holds all the same, as long as these Users live,
// and goes with the next change, or Settle, that the medium takes.
func (s *Users) Revoke(name, device string, now time.Time) (u User, err error) {
	s.ordering.Lock()
	defer s.ordering.Unlock()
	err = s.updateLocked(func(tx *statefile.Tx) error {
		if u, err = mustGet(tx, name); err != nil {
			return err
		}
		if !u.revoke(device, now) {
			return fmt.Errorf("user %q: device %q is %w: `perimeterd user list` shows his devices", name, device, ErrNoUser)
		}
		return put(tx, u)
	})
	switch {
	case errors.Is(err, ErrNoUser):
		return User{}, err
	case err != nil:
		s.pending.add(name, device, now)
		return u, notOnDisk(err)
	}
	return u, nil
}

// revoke is Revoke in memory, and says whether there is such a device.
func (u *User) revoke(device string, now time.Time) (found bool) {
	for i := range u.Devices {
		d := &u.Devices[i]
		if device != "" && d.Name != device {
			continue
		}
		found = true
		if d.Revoked.IsZero() {
			d.Revoked = now
		}
	}
	if device == "" && u.Active() {
		u.Revoked = now
	}
	return found || device == ""
}

// Forbid enters a name that is not known here as revoked: an external authority's list would let him in without it. Where the medium
// refuses, it holds as Revoke does.
func (s *Users) Forbid(name string, now time.Time) (u User, err error) {
	if err := CheckName("user", name); err != nil {
		return User{}, err
	}
	s.ordering.Lock()
	defer s.ordering.Unlock()
	err = s.updateLocked(func(tx *statefile.Tx) error {
		if _, known, err := get(tx, name); err != nil || known {
			return cmp.Or(err, fmt.Errorf("user %q: %w", name, ErrUserExists))
		}
		u, err = forbid(tx, name, now)
		return err
	})
	if err != nil && !errors.Is(err, ErrUserExists) {
		s.pending.add(name, "", now)
		return forbidden(name, now), notOnDisk(err)
	}
	return u, err
}

func forbid(tx *statefile.Tx, name string, now time.Time) (u User, err error) {
	u = forbidden(name, now)
	if u.Credential, err = nextCredential(tx); err != nil {
		return User{}, err
	}
	return u, put(tx, u)
}

func forbidden(name string, now time.Time) User {
	return User{Name: name, Groups: []string{}, Created: now, Revoked: now, Devices: []Device{}}
}

func notOnDisk(err error) error {
	return fmt.Errorf("the revocation is not on the disk: %w: a running daemon keeps the user out and tries again, but forgets it "+
		"when it ends: make room, then revoke again to be sure", err)
}

// RaiseEpoch makes the user's knock secrets so far worthless. Errors: ErrNoUser, or of the medium.
func (s *Users) RaiseEpoch(name string) (u User, err error) {
	err = s.update(func(tx *statefile.Tx) error {
		if u, err = mustGet(tx, name); err != nil {
			return err
		}
		u.Epoch++
		return put(tx, u)
	})
	return u, err
}

func mustGet(tx *statefile.Tx, name string) (User, error) {
	u, known, err := get(tx, name)
	if err == nil && !known {
		err = fmt.Errorf("user %q is %w: `perimeterd user list` shows who is", name, ErrNoUser)
	}
	return u, err
}

func get(tx *statefile.Tx, name string) (u User, known bool, err error) {
	v := tx.Bucket(bucketUsers).Get([]byte(name))
	if v == nil {
		return User{}, false, nil
	}
	u, err = decode([]byte(name), v)
	return u, err == nil, err
}

func decode(k, v []byte) (u User, err error) {
	if err := json.Unmarshal(v, &u); err != nil || u.Name != string(k) {
		return User{}, fmt.Errorf("state: the record of user %q is damaged: restore a backup", k)
	}
	return u, nil
}

func put(tx *statefile.Tx, u User) error {
	v, err := json.Marshal(u)
	if err != nil {
		return err
	}
	return tx.Bucket(bucketUsers).Put([]byte(u.Name), v)
}
