package identity

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
)

// MaxRequest bounds a signing request, bytes; with the largest key that is taken, one has some 1,800 in PEM.
const MaxRequest = 8 << 10

// Request is what of a signing request (PKCS #10, RFC 2986) counts: a public key, and that its holder signed. What else it
// asks for, such as usages and alternative names, is not its to say.
type Request struct {
	DER       []byte
	PublicKey crypto.PublicKey // ECDSA on P-256 or P-384, Ed25519, or RSA of 2048 to 4096 bits
	Key       KeyHash          // as HashKey will give it of the certificate
	Name      string           // common name, for a person to compare; may be empty
	Device    string           // organizational unit, likewise
}

// ParseRequest reads DER, or PEM with one block, and checks the signature.
func ParseRequest(data []byte) (*Request, error) {
	if len(data) > MaxRequest {
		return nil, fmt.Errorf("a signing request of %d bytes: want at most %d", len(data), MaxRequest)
	}
	if !bytes.HasPrefix(data, []byte{0x30}) { // DER's SEQUENCE
		block, rest := pem.Decode(data)
		if block == nil {
			return nil, errors.New("neither PEM nor DER: want a signing request, as `vpn enroll` or `openssl req -new` writes it")
		}
		// The second is the older name, of Netscape's and Microsoft's tools.
		if block.Type != "CERTIFICATE REQUEST" && block.Type != "NEW CERTIFICATE REQUEST" {
			return nil, fmt.Errorf("PEM with a %q: want a CERTIFICATE REQUEST", block.Type)
		}
		if len(bytes.TrimSpace(rest)) > 0 {
			return nil, errors.New("something follows the signing request: want it alone in the file")
		}
		data = block.Bytes
	}
	csr, err := x509.ParseCertificateRequest(data)
	if err != nil {
		return nil, fmt.Errorf("a signing request that is not understood: %w", err)
	}
	if err := checkKey(csr.PublicKey); err != nil { // before the signature: its cost grows with the key
		return nil, err
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, fmt.Errorf("the signing request is not signed by its own key: %w", err)
	}
	// Encoded anew, as it will be in the certificate: one key has one hash.
	spki, err := x509.MarshalPKIXPublicKey(csr.PublicKey)
	if err != nil {
		return nil, err
	}
	r := &Request{DER: csr.Raw, PublicKey: csr.PublicKey, Key: sha256.Sum256(spki), Name: csr.Subject.CommonName}
	if len(csr.Subject.OrganizationalUnit) > 0 {
		r.Device = csr.Subject.OrganizationalUnit[0]
	}
	return r, nil
}

func checkKey(key crypto.PublicKey) error {
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		if k.Curve == elliptic.P256() || k.Curve == elliptic.P384() {
			return nil
		}
		return fmt.Errorf("an ECDSA key on %s: want P-256 or P-384", k.Curve.Params().Name)
	case ed25519.PublicKey:
		return nil
	case *rsa.PublicKey:
		if n := k.N.BitLen(); n < 2048 || n > 4096 {
			return fmt.Errorf("an RSA key of %d bits: want 2048 to 4096", n)
		}
		return nil
	}
	return fmt.Errorf("a key of type %T: want ECDSA on P-256 or P-384, Ed25519, or RSA", key)
}

// NewRequest makes a signing request for a key.
func NewRequest(key crypto.Signer, user, device string) (*Request, error) {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: user, OrganizationalUnit: []string{device}}}, key)
	if err != nil {
		return nil, err
	}
	return ParseRequest(der)
}
