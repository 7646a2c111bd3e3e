package awscred

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/rogpeppe/go-internal/lockedfile"
)

// Credentials are keys of AWS, as a credential_process prints them. Their text, in logs and errors, is the public half.
type Credentials struct {
	AccessKeyID     string `json:"AccessKeyId"`
	SecretAccessKey string
	SessionToken    string    `json:",omitempty"`
	Expiration      time.Time `json:",omitzero"` // of a session
}

func (c Credentials) String() string { return c.AccessKeyID }

func (c Credentials) GoString() string { return c.AccessKeyID }

// margin is how long before its end a session is replaced.
const margin = 5 * time.Minute

// Cache keeps sessions on disk, each encrypted in a file of its own, mode 0600.
type Cache struct {
	dir  string
	aead cipher.AEAD
}

// NewCache keeps sessions in dir, under a key derived from secret: the private key of the tunnel's profile, so that a file that got
// out alone, in a backup or a synchronised home, is worth nothing, on a machine without a keyring too.
func NewCache(dir string, secret []byte) (*Cache, error) {
	if len(secret) < 32 {
		return nil, errors.New("the sessions' key would come from nothing")
	}
	key, err := hkdf.Key(sha256.New, secret, nil, "perimeter aws sessions 1", 32)
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	return &Cache{dir, aead}, os.Chmod(dir, 0o700)
}

// get finds a session that was kept for the same request; whatever is wrong with the file, it is asked for anew.
func (c *Cache) get(name string, request []byte, now time.Time) (s Credentials, ok bool) {
	sealed, err := readFile(c.file(name))
	if err != nil {
		return s, false
	}
	text, err := c.aead.Open(nil, nil, sealed, append([]byte(name+"\n"), request...))
	if err != nil || json.Unmarshal(text, &s) != nil {
		return Credentials{}, false
	}
	return s, s.SessionToken != "" && now.Add(margin).Before(s.Expiration)
}

func (c *Cache) put(name string, request []byte, s Credentials) error {
	text, err := json.Marshal(s)
	if err != nil {
		return err
	}
	return writePrivate(c.file(name), c.aead.Seal(nil, nil, text, append([]byte(name+"\n"), request...)))
}

func (c *Cache) drop(name string) { os.Remove(c.file(name)) }

func (c *Cache) file(name string) string { return filepath.Join(c.dir, name+".session") }

// lock is for one process at a time, so that several which start at once ask a person once. It goes with the process.
func (c *Cache) lock(ctx context.Context, name string) (unlock func(), err error) {
	type result struct {
		unlock func()
		err    error
	}
	got := make(chan result, 1)
	go func() {
		unlock, err := lockedfile.MutexAt(filepath.Join(c.dir, name+".lock")).Lock()
		got <- result{unlock, err}
	}()
	select {
	case r := <-got:
		return r.unlock, r.err
	case <-ctx.Done():
		go func() {
			if r := <-got; r.err == nil {
				r.unlock()
			}
		}()
		return nil, fmt.Errorf("another process is still asking for this session: %w", context.Cause(ctx))
	}
}
