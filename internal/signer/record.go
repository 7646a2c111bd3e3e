package signer

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"perimeterd/internal/identity"
)

// Renewable is the directory of the record, beside the CA key.
const Renewable = "renewable"

// maxRecord bounds a user's file, bytes, and with it how many certificates may be renewed for him at once: some 200.
const maxRecord = 64 << 10

// certificate is one that may be renewed.
type certificate struct {
	Device   string           `json:"device"`
	Key      identity.KeyHash `json:"key"`
	Enrolled time.Time        `json:"enrolled"` // when its first predecessor was issued
	NotAfter time.Time        `json:"not_after"`
	Next     identity.KeyHash `json:"next,omitzero"` // the one key that it was renewed with
}

// record keeps a file for each user, in JSON, whole or not at all.
type record struct{ dir *os.Root }

// lock keeps other signers of the same CA out until unlock: a command's, and the daemon's.
func (r record) lock() (unlock func() error, err error) {
	if err := r.dir.Mkdir(Renewable, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("%w: make it as root, and its owner that of the CA key", err)
	}
	d, err := r.dir.Open(Renewable)
	if err != nil {
		return nil, err
	}
	for {
		err := syscall.Flock(int(d.Fd()), syscall.LOCK_EX)
		if errors.Is(err, syscall.EINTR) {
			continue
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("lock %s: %w", Renewable, err), d.Close())
		}
		return d.Close, nil
	}
}

// read is empty for a user of whom nothing is known.
func (r record) read(user string) (list []certificate, err error) {
	text, err := r.dir.ReadFile(filepath.Join(Renewable, user))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(text, &list); err != nil {
		return nil, fmt.Errorf("the record of user %q is damaged: `perimeterd user profile` enrols him anew once %s is removed: %w",
			user, filepath.Join(r.dir.Name(), Renewable, user), err)
	}
	return list, nil
}

// write replaces a user's file, durably; one without certificates goes. What ended by now is left out.
func (r record) write(user string, list []certificate, now time.Time) error {
	list = slices.DeleteFunc(list, func(c certificate) bool { return !now.Before(c.NotAfter) })
	file := filepath.Join(Renewable, user)
	if len(list) == 0 {
		if err := r.dir.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return r.sync()
	}
	text, err := json.Marshal(list)
	if err != nil {
		return err
	}
	if len(text) > maxRecord {
		return fmt.Errorf("user %q has %d certificates that may be renewed: revoke devices of his first", user, len(list))
	}
	fresh := filepath.Join(Renewable, "."+user) // no name begins with a dot
	f, err := r.dir.OpenFile(fresh, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return errors.Join(err, r.dir.Remove(fresh))
	}
	if err := r.dir.Rename(fresh, file); err != nil {
		return err
	}
	return r.sync()
}

func (r record) sync() error {
	d, err := r.dir.Open(Renewable)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
