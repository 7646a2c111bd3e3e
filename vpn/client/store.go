package client

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"filippo.io/age"
	"filippo.io/age/armor"
	"github.com/pelletier/go-toml/v2"
)

// Dir is where profiles and what belongs to them live: $XDG_CONFIG_HOME/perimeter or ~/.config/perimeter, and each
// system's equal of it.
func Dir() (string, error) {
	base, err := os.UserConfigDir()
	if err != nil {
		return "", fmt.Errorf("no place for profiles: %w: set one of them", err)
	}
	return filepath.Join(base, "perimeter"), nil
}

// makeDir creates Dir for its owner alone.
func makeDir() (string, error) {
	dir, err := Dir()
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", unwritable(err)
	}
	// Only where it must: the directory may be read-only, and good enough to read from.
	if st, err := os.Stat(dir); err == nil && st.Mode().Perm() == 0o700 {
		return dir, nil
	}
	return dir, unwritable(os.Chmod(dir, 0o700))
}

// unwritable adds the way out where the disk is full, or closed to who asks.
func unwritable(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return fmt.Errorf("%w: make room there", err)
	case errors.Is(err, syscall.EROFS), errors.Is(err, os.ErrPermission):
		return fmt.Errorf("%w: make it writable for you, or set XDG_CONFIG_HOME to a directory that is", err)
	}
	return err
}

// Names lists the profiles in Dir.
func Names() ([]string, error) {
	dir, err := Dir()
	if err != nil {
		return nil, err
	}
	files, err := filepath.Glob(filepath.Join(dir, "*.profile"))
	for i, f := range files {
		files[i] = strings.TrimSuffix(filepath.Base(f), ".profile")
	}
	return files, err
}

func defaultName(dir string) (string, error) {
	names, err := Names()
	if err != nil {
		return "", err
	}
	if chosen, err := os.ReadFile(filepath.Join(dir, "default")); err == nil {
		name := strings.TrimSpace(string(chosen))
		if !slices.Contains(names, name) {
			return "", fmt.Errorf("the default profile, %q, is not in %s any more: choose another: vpn use NAME (%s)", name, dir, strings.Join(names, ", "))
		}
		return name, nil
	}
	switch len(names) {
	case 1:
		return names[0], nil
	case 0:
		return "", fmt.Errorf("no profile in %s: import the one you were sent: vpn import FILE", dir)
	}
	return "", fmt.Errorf("%d profiles, and none is the default: choose one: vpn use NAME (%s)", len(names), strings.Join(names, ", "))
}

// Use makes the profile of that name the default. It is a file with the name in it and no link, so that it is the same
// on every system.
func Use(name string) error {
	if !safeName(name) {
		return fmt.Errorf("profile %q: want the name of an imported profile", name)
	}
	if _, err := LoadProfile(name); err != nil {
		return err
	}
	dir, err := makeDir()
	if err != nil {
		return err
	}
	return writePrivate(filepath.Join(dir, "default"), []byte(name+"\n"))
}

// writePrivate replaces a file whole, readable by its owner alone.
func writePrivate(file string, content []byte) error {
	f, err := os.CreateTemp(filepath.Dir(file), ".new-*") // 0600 by itself
	if err != nil {
		return fmt.Errorf("%s is not written: %w", file, unwritable(err))
	}
	defer os.Remove(f.Name()) // gone already when all went well
	if _, err = f.Write(content); err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), file)
	}
	if err != nil {
		return fmt.Errorf("%s is not written: %w", file, unwritable(err))
	}
	return syncDir(filepath.Dir(file))
}

// maxWorkFactor is the hardest scrypt passphrase that Import takes on: 2^19 costs half a gigabyte for a second. age
// itself writes 18.
const maxWorkFactor = 19

// ErrExists is returned by Import where another profile has the name already.
var ErrExists = errors.New("another profile has this name")

// OpenToOthers says how others on this machine can read a file; nil where they cannot, or the file is not there.
func OpenToOthers(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return nil // whoever reads it next says so
	}
	defer f.Close()
	return checkPrivate(f)
}

// Import reads a profile from a file, asking passphrase when it is protected by one, and keeps it in Dir. It returns
// where. A different profile of the same name is replaced only with force.
func Import(src string, passphrase func() ([]byte, error), force bool) (*Profile, string, error) {
	f, err := os.Open(src)
	if err != nil {
		return nil, "", fmt.Errorf("profile: %w", err)
	}
	defer f.Close()
	text, err := readBounded(f)
	text = bytes.TrimPrefix(text, []byte("\xef\xbb\xbf")) // some editors put a byte order mark there
	if err == nil && isEncrypted(text) {
		text, err = decrypt(text, passphrase)
	}
	if err != nil {
		return nil, "", fmt.Errorf("profile %s: %w", src, err)
	}
	p, err := ParseProfile(text)
	if err != nil {
		return nil, "", fmt.Errorf("profile %s: %w", src, err)
	}
	dir, err := makeDir()
	if err != nil {
		return nil, "", err
	}
	dst := filepath.Join(dir, p.Name()+".profile")
	waiting := ""
	if p.Key == "" {
		if p, waiting, err = p.join(dir, dst); err == nil {
			text, err = toml.Marshal(p)
		}
		if err != nil {
			return nil, "", fmt.Errorf("profile %s: %w", src, err)
		}
	}
	old, err := os.ReadFile(dst)
	switch {
	case err == nil && bytes.Equal(old, text):
		if OpenToOthers(dst) != nil {
			err = unwritable(os.Chmod(dst, 0o600))
		}
		return p, dst, err
	case err == nil && !force:
		return nil, "", fmt.Errorf("%s: %w, with other content: replace it with --force, if you mean to", dst, ErrExists)
	case err != nil && !errors.Is(err, os.ErrNotExist):
		return nil, "", err
	}
	err = writePrivate(dst, text)
	if err == nil && waiting != "" { // it is in the profile now
		err = os.Remove(waiting)
	}
	return p, dst, err
}

// OpenLog opens the file of LogFile anew.
func OpenLog(name string) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|os.O_APPEND, 0o600)
	return f, unwritable(err)
}

const ageIntro = "age-encryption.org/v1\n"

func isEncrypted(text []byte) bool {
	text = bytes.TrimLeft(text, " \t\r\n")
	return bytes.HasPrefix(text, []byte(armor.Header)) || bytes.HasPrefix(text, []byte(ageIntro))
}

func decrypt(text []byte, passphrase func() ([]byte, error)) ([]byte, error) {
	secret, err := passphrase()
	if err != nil {
		return nil, err
	}
	identity, err := age.NewScryptIdentity(string(secret))
	if err != nil {
		return nil, fmt.Errorf("passphrase: %w", err)
	}
	identity.SetMaxWorkFactor(maxWorkFactor)
	in := bufio.NewReader(bytes.NewReader(bytes.TrimLeft(text, " \t\r\n")))
	var r = armor.NewReader(in)
	if bytes.HasPrefix(text, []byte(ageIntro)) {
		r = in
	}
	plain, err := age.Decrypt(r, identity)
	if err != nil {
		var wrong *age.NoIdentityMatchError
		if errors.As(err, &wrong) {
			return nil, errors.New("wrong passphrase: try again, or ask for a new profile")
		}
		return nil, fmt.Errorf("protected by a passphrase, and %w (%w)", errNotWhole, err)
	}
	text, err = readBounded(plain)
	if err != nil {
		return nil, fmt.Errorf("protected by a passphrase, and %w (%w)", errNotWhole, err)
	}
	return text, nil
}
