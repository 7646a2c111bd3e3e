package client

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// Enrolment is a key that was made here and waits for its certificate.
type Enrolment struct {
	Name    string // user, or user-device
	Key     string // its file in Dir, 0600
	KeyID   string // SHA-256 of the public key, hexadecimal, for people to compare
	Request []byte // for the operator, PEM: no secret
	Fresh   bool   // the key was made by this call, and did not wait already
}

// nameForm is that of users and devices of the built-in CA, which is what a request goes to.
var nameForm = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,63}$`)

// Enroll makes a key, and a request for its certificate. A key that waits already is asked for again.
func Enroll(user, device string) (*Enrolment, error) {
	for what, name := range map[string]string{"user": user, "device": device} {
		if !nameForm.MatchString(name) && (what == "user" || name != "") {
			return nil, fmt.Errorf("%s %q: want 1 to 64 of a-z 0-9 . _ - with a letter or digit first", what, name)
		}
	}
	dir, err := makeDir()
	if err != nil {
		return nil, err
	}
	e := &Enrolment{Name: (&Profile{User: user, Device: device}).Name()}
	e.Key = filepath.Join(dir, e.Name+".key")
	key, err := readKey(e.Key)
	if errors.Is(err, os.ErrNotExist) {
		e.Fresh = true
		key, err = newKey(e.Key)
	}
	if err != nil {
		return nil, err
	}
	if e.KeyID, err = keyID(key.Public()); err != nil {
		return nil, err
	}
	subject := pkix.Name{CommonName: user}
	if device != "" {
		subject.OrganizationalUnit = []string{device}
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: subject}, key)
	if err != nil {
		return nil, err
	}
	e.Request = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
	return e, nil
}

// SameKey says whether two requests in PEM are for the same key.
func SameKey(a, b []byte) bool {
	var ids [2]string
	for i, text := range [][]byte{a, b} {
		block, _ := pem.Decode(text)
		if block == nil {
			return false
		}
		request, err := x509.ParseCertificateRequest(block.Bytes)
		if err != nil {
			return false
		}
		if ids[i], err = keyID(request.PublicKey); err != nil {
			return false
		}
	}
	return ids[0] == ids[1]
}

// newKey keeps a new private key in a file that is not there yet.
func newKey(file string) (crypto.Signer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	text, err := encodeKey(key)
	if err != nil {
		return nil, err
	}
	return key, writePrivate(file, text)
}

func encodeKey(key crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

func readKey(file string) (crypto.Signer, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := checkPrivate(f); err != nil {
		return nil, fmt.Errorf("%s: %w: run: chmod 600 %s", file, err, shellQuote(file))
	}
	text, err := readBounded(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	key, err := parsePrivateKey(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w: remove it, and enroll again", file, err)
	}
	return key, nil
}

// parsePrivateKey takes what `vpn enroll` and openssl write. It never has the key's text in its errors.
func parsePrivateKey(text []byte) (crypto.Signer, error) {
	var parsed any
	var err error
	for block, rest := pem.Decode(text); ; block, rest = pem.Decode(rest) {
		if block == nil {
			return nil, errors.New("no private key in it")
		}
		switch block.Type {
		case "EC PARAMETERS":
			continue
		case "PRIVATE KEY":
			parsed, err = x509.ParsePKCS8PrivateKey(block.Bytes)
		case "EC PRIVATE KEY":
			parsed, err = x509.ParseECPrivateKey(block.Bytes)
		case "RSA PRIVATE KEY":
			if block.Headers["DEK-Info"] != "" {
				return nil, errors.New("protected by a passphrase: write it without one: openssl pkey -in OLD -out NEW")
			}
			parsed, err = x509.ParsePKCS1PrivateKey(block.Bytes)
		case "ENCRYPTED PRIVATE KEY":
			return nil, errors.New("protected by a passphrase: write it without one: openssl pkey -in OLD -out NEW")
		default:
			return nil, fmt.Errorf("no private key in it, but a %q", block.Type)
		}
		break
	}
	if err != nil {
		return nil, errors.New("the private key in it is damaged, or of a kind that is not known here")
	}
	key, ok := parsed.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("a %T, which signs nothing", parsed)
	}
	return key, nil
}

// AwaitProfile keeps a key that another tool made, as Enroll keeps its own, until the profile for it is imported.
func AwaitProfile(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return fmt.Errorf("key: %w", err)
	}
	defer f.Close()
	if err := checkPrivate(f); err != nil {
		return fmt.Errorf("key %s: %w: run: chmod 600 %s", file, err, shellQuote(file))
	}
	text, err := readBounded(f)
	var key crypto.Signer
	if err == nil {
		key, err = parsePrivateKey(text)
	}
	if err != nil {
		return fmt.Errorf("key %s: %w", file, err)
	}
	id, err := keyID(key.Public())
	if err != nil {
		return fmt.Errorf("key %s: %w", file, err)
	}
	if text, err = encodeKey(key); err != nil {
		return fmt.Errorf("key %s: %w", file, err)
	}
	dir, err := makeDir()
	if err != nil {
		return err
	}
	return writePrivate(filepath.Join(dir, "of-"+id[:16]+".key"), text)
}

func keyID(public crypto.PublicKey) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:]), nil
}

// decodeKeyless checks a profile whose key is elsewhere.
func (p *Profile) decodeKeyless() error {
	block, _ := pem.Decode([]byte(p.Certificate))
	if block == nil {
		return errors.New("certificate: no PEM in it")
	}
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return fmt.Errorf("certificate: %w", err)
	}
	id, err := keyID(leaf.PublicKey)
	if err != nil {
		return fmt.Errorf("certificate: %w", err)
	}
	if id != p.KeyID {
		return fmt.Errorf("key_id = %q: the certificate's key is %s: ask the operator for the profile again", p.KeyID, id)
	}
	p.typed.identity.Leaf = leaf
	return nil
}

// join finds the profile's key, among those that wait in dir and in the profile that has its place already, and returns
// the whole, and the file where the key waited.
func (p *Profile) join(dir, kept string) (whole *Profile, waiting string, err error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.key"))
	if err != nil {
		return nil, "", err
	}
	var others []string
	try := func(key crypto.Signer) (*Profile, error) {
		if id, err := keyID(key.Public()); err != nil || id != p.KeyID {
			return nil, err
		}
		text, err := encodeKey(key)
		if err != nil {
			return nil, err
		}
		q := *p
		q.Key, q.KeyID, q.typed = string(text), "", typed{}
		return &q, q.decode()
	}
	for _, file := range files {
		key, err := readKey(file)
		if err != nil {
			return nil, "", err
		}
		if whole, err := try(key); whole != nil || err != nil {
			return whole, file, err
		}
		others = append(others, strings.TrimSuffix(filepath.Base(file), ".key"))
	}
	if text, err := os.ReadFile(kept); err == nil {
		if old, err := ParseProfile(text); err == nil && old.Key != "" {
			if whole, err := try(old.typed.identity.PrivateKey.(crypto.Signer)); whole != nil || err != nil {
				return whole, "", err
			}
		}
	}
	hint := "no key waits here"
	if len(others) > 0 {
		hint = fmt.Sprintf("the keys that wait here are others, made for %s", strings.Join(others, ", "))
	}
	return nil, "", fmt.Errorf("it is for the key %s, which was made elsewhere or for somebody else; %s: "+
		"import it on that machine, as that user, or with the key of another tool: vpn import --key FILE, or begin again: vpn enroll %s", p.KeyID, hint, p.User)
}
