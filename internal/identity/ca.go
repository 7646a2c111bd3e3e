package identity

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
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

const (
	// CAValidity outlives every gate certificate; a new CA means new profiles for everybody.
	CAValidity = 10 * 365 * 24 * time.Hour
	// ServerValidity is the most that Apple's TLS accepts of a server, also from a CA that its owner installed
	// (https://support.apple.com/en-us/103769), and stock clients should do.
	ServerValidity = 825 * 24 * time.Hour
	// backdate lets a machine whose clock is slow accept what was just issued.
	backdate = time.Hour
)

// CA is the built-in authority with its key.
type CA struct {
	Certificate *x509.Certificate   // whose key signs
	Bundle      []*x509.Certificate // all that are trusted: several while one CA replaces another
	key         *ecdsa.PrivateKey
}

// Issued is a new certificate with its new key, both PEM (the key PKCS #8: a secret).
type Issued struct {
	Certificate []byte
	Key         []byte
	KeyHash     KeyHash
	NotAfter    time.Time
}

// NewCA makes an authority. Name is for people.
func NewCA(name string, now time.Time) (*CA, error) {
	key, err := NewKey()
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber:          serial(),
		Subject:               pkix.Name{CommonName: name},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(CAValidity),
		IsCA:                  true,
		BasicConstraintsValid: true,
		MaxPathLenZero:        true, // no authorities below it
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &CA{Certificate: cert, Bundle: []*x509.Certificate{cert}, key: key}, nil
}

// EncodeKey writes the authority's key: a secret.
func (ca *CA) EncodeKey() ([]byte, error) { return EncodePrivateKey(ca.key) }

// Save writes the certificate (0644) and the key (0600). The key's directory is made 0700 if it is missing. Neither file
// is overwritten.
func (ca *CA) Save(certPath, keyPath string) error {
	if err := os.MkdirAll(filepath.Dir(keyPath), 0o700); err != nil {
		return err
	}
	key, err := ca.EncodeKey()
	if err != nil {
		return err
	}
	if err := WriteNew(keyPath, key, 0o600); err != nil {
		return err
	}
	return WriteNew(certPath, EncodeCertificate(ca.Certificate), 0o644)
}

// ParseCA reads an authority: the PEM bundle of its certificates, and its key. Of the bundle, the certificate that belongs
// to the key signs.
func ParseCA(bundle, key []byte) (*CA, error) {
	block, _ := pem.Decode(key)
	if block == nil {
		return nil, errors.New("the CA key: no PEM in it: restore it from a backup")
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("the CA key: %w", err)
	}
	signing, ok := parsed.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("the CA key is a %T: the built-in CA has an ECDSA key", parsed)
	}
	certs, err := parseCertificates(bundle)
	if err != nil {
		return nil, fmt.Errorf("the CA's certificates: %w", err)
	}
	for _, c := range certs {
		if signing.PublicKey.Equal(c.PublicKey) {
			return &CA{Certificate: c, Bundle: certs, key: signing}, nil
		}
	}
	return nil, errors.New("no certificate of the CA belongs to its key")
}

// ReadCertificates reads every certificate of a PEM file; a file with none is an error.
func ReadCertificates(path string) ([]*x509.Certificate, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	certs, err := parseCertificates(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return certs, nil
}

func parseCertificates(data []byte) (certs []*x509.Certificate, err error) {
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("a PEM block %q where only certificates belong", block.Type)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		certs = append(certs, c)
	}
	if len(certs) == 0 {
		return nil, errors.New("no certificate in PEM")
	}
	return certs, nil
}

// SignServer issues the gate's certificate for the server id (32 hexadecimal digits) and the endpoint's host, a name or
// an address, for ServerValidity or until the authority ends.
func (ca *CA) SignServer(key crypto.PublicKey, serverID, host string, now time.Time) (*x509.Certificate, error) {
	template := &x509.Certificate{
		Subject:     pkix.Name{CommonName: "perimeterd gate"},
		DNSNames:    []string{serverID},
		NotAfter:    now.Add(ServerValidity),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	if ip := net.ParseIP(host); ip != nil {
		template.IPAddresses = []net.IP{ip}
	} else {
		template.DNSNames = append(template.DNSNames, host)
	}
	if template.NotAfter.After(ca.Certificate.NotAfter) {
		template.NotAfter = ca.Certificate.NotAfter
	}
	return ca.sign(template, key, now)
}

// SignClient issues a user's certificate for one device, until end.
func (ca *CA) SignClient(key crypto.PublicKey, user, device string, end, now time.Time) (*x509.Certificate, error) {
	if err := CheckName("user", user); err != nil {
		return nil, err
	}
	if err := CheckName("device", device); err != nil {
		return nil, err
	}
	if !end.After(now) {
		return nil, fmt.Errorf("validity %v of a certificate: want more than nothing", end.Sub(now))
	}
	if end.After(ca.Certificate.NotAfter) {
		return nil, fmt.Errorf("validity until %s is past the CA's own end on %s: choose a shorter one",
			end.Format(time.DateOnly), ca.Certificate.NotAfter.Format(time.DateOnly))
	}
	return ca.sign(&x509.Certificate{
		Subject:     pkix.Name{CommonName: user, OrganizationalUnit: []string{device}},
		NotAfter:    end,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, key, now)
}

func (ca *CA) sign(template *x509.Certificate, key crypto.PublicKey, now time.Time) (*x509.Certificate, error) {
	template.SerialNumber = serial()
	template.NotBefore = now.Add(-backdate)
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.BasicConstraintsValid = true // and not a CA
	der, err := x509.CreateCertificate(rand.Reader, template, ca.Certificate, key, ca.key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// IssueServer is SignServer with a new key.
func (ca *CA) IssueServer(serverID, host string, now time.Time) (*Issued, error) {
	return issue(func(key crypto.PublicKey) (*x509.Certificate, error) { return ca.SignServer(key, serverID, host, now) })
}

// IssueClient is SignClient with a new key.
func (ca *CA) IssueClient(user, device string, validity time.Duration, now time.Time) (*Issued, error) {
	return issue(func(key crypto.PublicKey) (*x509.Certificate, error) {
		return ca.SignClient(key, user, device, now.Add(validity), now)
	})
}

func issue(sign func(crypto.PublicKey) (*x509.Certificate, error)) (*Issued, error) {
	key, err := NewKey()
	if err != nil {
		return nil, err
	}
	cert, err := sign(key.Public())
	if err != nil {
		return nil, err
	}
	text, err := EncodePrivateKey(key)
	if err != nil {
		return nil, err
	}
	return &Issued{Certificate: EncodeCertificate(cert), Key: text, KeyHash: HashKey(cert), NotAfter: cert.NotAfter}, nil
}

// Validity is how long a certificate of SignClient was issued for.
func Validity(c *x509.Certificate) time.Duration { return c.NotAfter.Sub(c.NotBefore) - backdate }

// IssuerOf names the authority that issued a certificate, by AuthorityID.
func IssuerOf(c *x509.Certificate) string { return hex.EncodeToString(c.AuthorityKeyId) }

// AuthorityID names an authority by its key.
func AuthorityID(c *x509.Certificate) string { return hex.EncodeToString(c.SubjectKeyId) }

// HashKey is the SHA-256 of a certificate's SubjectPublicKeyInfo.
func HashKey(c *x509.Certificate) KeyHash { return sha256.Sum256(c.RawSubjectPublicKeyInfo) }

// serial draws 127 random bits: positive, and within the 20 octets of RFC 5280, 4.1.2.2.
func serial() *big.Int {
	b := make([]byte, 16)
	rand.Read(b) // never fails since Go 1.24
	b[0] = b[0]&0x7f | 0x40
	return new(big.Int).SetBytes(b)
}

// NewKey makes a private key as all of ours are: ECDSA on P-256.
func NewKey() (*ecdsa.PrivateKey, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) }

// EncodeCertificate writes PEM.
func EncodeCertificate(c *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
}

// EncodePrivateKey writes PEM, PKCS #8: a secret.
func EncodePrivateKey(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}
