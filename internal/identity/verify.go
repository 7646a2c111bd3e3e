package identity

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"
)

// Identity is who a client certificate stands for.
type Identity struct {
	User        string
	Device      string
	Groups      []string
	Credential  uint32
	Certificate [32]byte // SHA-256 of the certificate's public key (SubjectPublicKeyInfo)
	NotAfter    time.Time
}

// Code says why a certificate was refused. Codes are stable: logs, metrics and the audit show them.
type Code string

// The reasons for a refusal.
const (
	NoCertificate Code = "no_certificate"
	UnknownCA     Code = "unknown_ca"
	Invalid       Code = "invalid_certificate" // the chain breaks a rule of X.509
	NotYetValid   Code = "not_yet_valid"
	Expired       Code = "expired"
	NoClientAuth  Code = "no_client_auth" // the extended key usage does not name clientAuth
	UnknownUser   Code = "unknown_user"
	UnknownKey    Code = "unknown_key" // the user is known, this certificate is not his
	RevokedCert   Code = "revoked"     // the user, or this device
	StateFailed   Code = "state_failed"
)

// Refusal is the error of every certificate that does not open the gate.
type Refusal struct {
	Code Code
	User string // common name as the certificate states it; unverified where the chain is not
	Text string
	Err  error // cause, or nil
}

func (r *Refusal) Error() string {
	if r.User == "" {
		return r.Text
	}
	return fmt.Sprintf("certificate of %q: %s", r.User, r.Text)
}

func (r *Refusal) Unwrap() error { return r.Err }

// Verifier checks client certificates against the authority and the users.
type Verifier struct {
	roots *x509.CertPool
	users *Users
	now   func() time.Time
}

// NewVerifier trusts the certificates in caPath, a PEM bundle, and the users of the store.
func NewVerifier(caPath string, users *Users, now func() time.Time) (*Verifier, error) {
	certs, err := ReadCertificates(caPath)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	for _, c := range certs {
		roots.AddCert(c)
	}
	return &Verifier{roots: roots, users: users, now: now}, nil
}

// TLSConfig is a server's configuration that lets nobody past the handshake whom Identify refuses.
func (v *Verifier) TLSConfig(server tls.Certificate) *tls.Config {
	return &tls.Config{
		Certificates: []tls.Certificate{server},
		MinVersion:   tls.VersionTLS13,
		NextProtos:   []string{"http/1.1"},
		Time:         v.now,
		// crypto/tls checks the chain too: it sends better alerts, and is a second lock on the same door.
		ClientAuth: tls.RequireAndVerifyClientCert,
		ClientCAs:  v.roots,
		// VerifyConnection, not VerifyPeerCertificate, which resumption skips.
		VerifyConnection:       v.VerifyConnection,
		SessionTicketsDisabled: true,
	}
}

// VerifyConnection is Identify as crypto/tls wants it.
func (v *Verifier) VerifyConnection(cs tls.ConnectionState) error {
	_, err := v.Identify(cs)
	return err
}

// Identify says whose connection it is, by the state of users and of the clock at this moment: call it at every request.
// Every error is a *Refusal.
func (v *Verifier) Identify(cs tls.ConnectionState) (Identity, error) {
	if len(cs.PeerCertificates) == 0 {
		return Identity{}, &Refusal{Code: NoCertificate, Text: "no client certificate: use the one of the profile"}
	}
	leaf, now := cs.PeerCertificates[0], v.now()
	name := leaf.Subject.CommonName
	refuse := func(code Code, err error, format string, a ...any) (Identity, error) {
		return Identity{}, &Refusal{Code: code, User: name, Text: fmt.Sprintf(format, a...), Err: err}
	}
	intermediates := x509.NewCertPool()
	for _, c := range cs.PeerCertificates[1:] {
		intermediates.AddCert(c)
	}
	// The usage is judged below, since Verify takes an absent one and anyExtendedKeyUsage for every usage.
	_, err := leaf.Verify(x509.VerifyOptions{
		Roots: v.roots, Intermediates: intermediates, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	var unknown x509.UnknownAuthorityError
	var invalid x509.CertificateInvalidError
	switch {
	case err == nil:
	case errors.As(err, &unknown):
		return refuse(UnknownCA, err, "issued by an authority that this gate does not know: ask its operator for a profile")
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired && now.Before(leaf.NotBefore):
		return refuse(NotYetValid, err, "valid from %s only: is a clock wrong?", leaf.NotBefore.Format(time.RFC3339))
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return refuse(Expired, err, "it or its authority expired (the certificate's end is %s): ask the operator for a new profile",
			leaf.NotAfter.Format(time.RFC3339))
	default:
		return refuse(Invalid, err, "%v", err)
	}
	if !slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageClientAuth) || slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageAny) {
		return refuse(NoClientAuth, nil, "its extended key usage must state clientAuth, and not anyExtendedKeyUsage")
	}
	u, err := v.users.Get(name)
	if errors.Is(err, ErrNoUser) {
		return refuse(UnknownUser, err, "no user of this gate has that name: ask its operator")
	}
	if err != nil {
		return refuse(StateFailed, err, "the gate cannot read its users now")
	}
	if !u.Active() {
		return refuse(RevokedCert, nil, "the user was revoked: ask the operator")
	}
	key := HashKey(leaf)
	i := slices.IndexFunc(u.Devices, func(d Device) bool { return d.Key == key })
	if i < 0 {
		return refuse(UnknownKey, nil, "this certificate was never given to him here: ask the operator for a new profile")
	}
	d := u.Devices[i]
	if !d.Revoked.IsZero() {
		return refuse(RevokedCert, nil, "the device %q was revoked: ask the operator", d.Name)
	}
	return Identity{
		User: u.Name, Device: d.Name, Groups: u.Groups, Credential: u.Credential, Certificate: key, NotAfter: leaf.NotAfter,
	}, nil
}
