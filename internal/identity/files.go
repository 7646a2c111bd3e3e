package identity

import (
	"crypto/ecdh"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// WriteNew creates path with mode perm, whole or not at all, and durably: a temporary file beside it, fsync, a link that
// fails where path exists (fs.ErrExist), fsync of the directory.
func WriteNew(path string, data []byte, perm fs.FileMode) (err error) {
	dir := filepath.Dir(path)
	// CreateTemp makes it 0600, so nobody reads it before perm is known to be right.
	tmp, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	defer tmp.Close()
	if _, err := tmp.Write(data); err != nil {
		return err
	}
	if err := tmp.Chmod(perm); err != nil {
		return err
	}
	if err := tmp.Sync(); err != nil {
		return err
	}
	if err := os.Link(tmp.Name(), path); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("%s exists and is not overwritten: %w", path, fs.ErrExist)
		}
		return err
	}
	return syncDir(dir)
}

// Replace writes path whole or not at all, and durably, in the place of what is there.
func Replace(path string, data []byte, perm fs.FileMode) error {
	fresh := path + ".new"
	if err := os.Remove(fresh); err != nil && !errors.Is(err, fs.ErrNotExist) { // of a crash
		return err
	}
	if err := WriteNew(fresh, data, perm); err != nil {
		return err
	}
	return Rename(fresh, path)
}

// Rename is os.Rename, durably.
func Rename(from, to string) error {
	if err := os.Rename(from, to); err != nil {
		return err
	}
	return syncDir(filepath.Dir(to))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// EncodeKey is the text of a 32-byte key in a file: base64 and a newline, as `wg genkey` writes it.
func EncodeKey(key [32]byte) []byte {
	return []byte(base64.StdEncoding.EncodeToString(key[:]) + "\n")
}

// ReadKey reads what EncodeKey wrote: the knock master and the WireGuard private key.
func ReadKey(path string) (key [32]byte, err error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return key, err
	}
	raw, err := base64.StdEncoding.DecodeString(strings.TrimSpace(string(text)))
	if err != nil || len(raw) != len(key) {
		return key, fmt.Errorf("%s: want 32 bytes in base64 on one line: restore it from a backup", path)
	}
	return [32]byte(raw), nil
}

// PublicKey is the other half of a WireGuard private key, as `wg pubkey` computes it. Any 32 bytes are a private key: the
// error is crypto/ecdh's, and does not happen.
func PublicKey(private [32]byte) (public [32]byte, err error) {
	key, err := ecdh.X25519().NewPrivateKey(private[:])
	if err != nil {
		return public, err
	}
	return [32]byte(key.PublicKey().Bytes()), nil
}

// ReadServerID reads a file of 32 hexadecimal digits.
func ReadServerID(path string) (id [16]byte, err error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return id, err
	}
	raw, err := hex.DecodeString(strings.TrimSpace(string(text)))
	if err != nil || len(raw) != len(id) {
		return id, fmt.Errorf("%s: want 32 hexadecimal digits on one line: restore it from a backup", path)
	}
	return [16]byte(raw), nil
}
