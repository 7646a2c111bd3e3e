package identity

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"
)

// Identity is who a client certificate stands for.
type Identity struct {
	User       string
	Device     string
	Groups     []string
	Credential uint32
	// Certificate is the SHA-256 of the certificate's public key (SubjectPublicKeyInfo), or where it was renewed that of the
	// first one's: sessions and addresses stay with it.
	Certificate [32]byte
	Key         KeyHash // of the certificate itself
	Unused      bool    // a renewed certificate's first use: Users.Used is to be told
	NotAfter    time.Time
	Leaving     bool     // its authority is on the way out: it is to be renewed soon
	Chain       [][]byte // DER, the certificate first and what leads from it to an authority after it: for Again
	Settings    Settings
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
	RevokedCert   Code = "revoked"     // the user, this device, or the certificate by its authority's CRL
	Superseded    Code = "superseded"  // renewed, and its successor was used
	StateFailed   Code = "state_failed"
	NoCRL         Code = "no_crl"      // there is no current CRL of its issuer
	NotAllowed    Code = "not_allowed" // identity.allowed has not its subject
	BadName       Code = "bad_name"    // an external authority's certificate whose subject names no user
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
	caPath   string
	roots    atomic.Pointer[roots]
	users    *Users
	now      func() time.Time
	external *external // nil: the authority is the built-in one, whose certificates the store knows
}

// NewVerifier trusts the certificates in caPath, a PEM bundle, and the users of the store.
func NewVerifier(caPath string, users *Users, now func() time.Time) (*Verifier, error) {
	v, _, err := newVerifier(caPath, users, now)
	return v, err
}

// roots are the authorities of a bundle.
type roots struct {
	pool   *x509.CertPool
	newest *x509.Certificate // that issues from now on
	others bool              // there are more, on their way out
}

func readRoots(path string) (*roots, []*x509.Certificate, error) {
	certs, err := ReadCertificates(path)
	if err != nil {
		return nil, nil, err
	}
	r := &roots{pool: x509.NewCertPool(), newest: Newest(certs), others: len(certs) > 1}
	for _, c := range certs {
		r.pool.AddCert(c)
	}
	return r, certs, nil
}

// Newest is of a bundle the authority that was appended last: while one replaces another, it is the one that issues.
func Newest(bundle []*x509.Certificate) *x509.Certificate { return bundle[len(bundle)-1] }

// Reload takes up another bundle of authorities from the same file. With an error the old one goes on.
func (v *Verifier) Reload() error {
	r, _, err := readRoots(v.caPath)
	if err == nil {
		v.roots.Store(r)
	}
	return err
}

func newVerifier(caPath string, users *Users, now func() time.Time) (*Verifier, []*x509.Certificate, error) {
	r, certs, err := readRoots(caPath)
	if err != nil {
		return nil, nil, err
	}
	v := &Verifier{caPath: caPath, users: users, now: now}
	v.roots.Store(r)
	return v, certs, nil
}

// TLSConfig is a server's configuration, as of now, that lets nobody past the handshake whom Identify refuses.
func (v *Verifier) TLSConfig(server tls.Certificate) *tls.Config {
	return &tls.Config{
		Certificates: []tls.Certificate{server},
		MinVersion:   tls.VersionTLS13,
		NextProtos:   []string{"http/1.1"},
		Time:         v.now,
		// crypto/tls checks the chain too: it sends better alerts, and is a second lock on the same door.
		ClientAuth: tls.RequireAndVerifyClientCert,
		ClientCAs:  v.roots.Load().pool,
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

// Identify says whose connection it is, by the state of users, CRLs and lists, and of the clock, at this moment: call it at
// every request. Every error is a *Refusal.
func (v *Verifier) Identify(cs tls.ConnectionState) (Identity, error) {
	if len(cs.PeerCertificates) == 0 {
		return Identity{}, &Refusal{Code: NoCertificate, Text: "no client certificate: use the one of the profile"}
	}
	return v.judge(cs.PeerCertificates[0], cs.PeerCertificates[1:])
}

// Again judges an Identity's Chain anew, as Identify does: what made a session may be no good any more.
func (v *Verifier) Again(chain [][]byte) (Identity, error) {
	var certs []*x509.Certificate
	for _, der := range chain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return Identity{}, &Refusal{Code: Invalid, Text: err.Error(), Err: err}
		}
		certs = append(certs, c)
	}
	return v.Identify(tls.ConnectionState{PeerCertificates: certs})
}

func (v *Verifier) judge(leaf *x509.Certificate, others []*x509.Certificate) (Identity, error) {
	now, name, roots := v.now(), leaf.Subject.CommonName, v.roots.Load()
	refuse := func(code Code, err error, format string, a ...any) (Identity, error) {
		return Identity{}, &Refusal{Code: code, User: name, Text: fmt.Sprintf(format, a...), Err: err}
	}
	intermediates := x509.NewCertPool()
	for _, c := range others {
		intermediates.AddCert(c)
	}
	// The usage is judged below, since Verify takes an absent one and anyExtendedKeyUsage for every usage.
	chains, err := leaf.Verify(x509.VerifyOptions{
		Roots: roots.pool, Intermediates: intermediates, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
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
	if x := v.external; x != nil {
		if code, text := x.refuses(chains, now); code != "" {
			return refuse(code, nil, "%s", text)
		}
	}
	u, err := v.users.Get(name)
	switch {
	case errors.Is(err, ErrNoUser) && v.Listed(name):
		u = User{Name: name}
	case errors.Is(err, ErrNoUser):
		return refuse(UnknownUser, err, "no user of this gate has that name: ask its operator")
	case err != nil:
		return refuse(StateFailed, err, "the gate cannot read its users now")
	case !u.Active():
		return refuse(RevokedCert, nil, "the user was revoked: ask the operator")
	}
	key := HashKey(leaf)
	id := Identity{User: u.Name, Groups: u.Groups, Credential: u.Credential, Certificate: key, Key: key, Settings: u.Settings}
	switch i := slices.IndexFunc(u.Devices, func(d Device) bool { return d.has(key) }); {
	case i >= 0 && !u.Devices[i].Revoked.IsZero():
		return refuse(RevokedCert, nil, "the device %q was revoked: ask the operator", u.Devices[i].Name)
	case i >= 0:
		d := u.Devices[i]
		id.Device, id.Certificate, id.Unused = d.Name, d.ID(), d.Next != nil && d.Next.Key == key
		if d.Key != key && !id.Unused {
			return refuse(Superseded, nil, "it was renewed, and its successor used since: use that one, or ask the operator for a new profile")
		}
	case v.external == nil:
		return refuse(UnknownKey, nil, "this certificate was never given to him here: ask the operator for a new profile")
	case leaf.NotBefore.Before(u.Barred):
		return refuse(RevokedCert, nil, "it was issued on %s, before its user was revoked on %s: ask the operator for a new one",
			leaf.NotBefore.Format(time.RFC3339), u.Barred.Format(time.RFC3339))
	default:
		id.Device = serialKey(leaf.SerialNumber)
	}
	id.Chain, id.NotAfter = longest(chains)
	id.Leaving = v.external == nil && roots.others && !slices.ContainsFunc(chains, func(c []*x509.Certificate) bool { return c[len(c)-1].Equal(roots.newest) })
	return id, nil
}

// longest picks of a certificate's chains the one that is good the longest, which is until the first of its certificates
// expires, and returns it without the authority at its end.
func longest(chains [][]*x509.Certificate) (chain [][]byte, end time.Time) {
	for _, c := range chains {
		first := slices.MinFunc(c, func(a, b *x509.Certificate) int { return a.NotAfter.Compare(b.NotAfter) }).NotAfter
		if chain != nil && !first.After(end) {
			continue
		}
		chain, end = nil, first
		for _, c := range c[:max(1, len(c)-1)] {
			chain = append(chain, c.Raw)
		}
	}
	return chain, end
}
