package signer

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"perimeterd/internal/identity"
	"perimeterd/vpn"
)

// maxSeconds is a century, less than a time.Duration holds.
const maxSeconds = 100 * 365 * 24 * 3600

// Rights are what somebody may ask for. The zero value is nothing.
type Rights int

// Each includes what stands before it.
const (
	Nothing    Rights = iota
	Renewals          // renew and forget
	Everything        // issue, too
)

// Signer signs. Its files are read anew for each request, so that a new CA needs no restart.
type Signer struct {
	certs, keys         *os.Root // directories, opened while they could be
	certsName, keysName string
	log                 *slog.Logger
	now                 func() time.Time

	mu sync.Mutex // one request at a time
}

// Open takes hold of the directories of the CA's certificates and its key. Nothing is read yet, so that the process may
// become the key's owner first (Become).
func Open(ca, key string, log *slog.Logger, now func() time.Time) (*Signer, error) {
	for _, file := range []*string{&ca, &key} { // a root follows no link that leads out of it
		if real, err := filepath.EvalSymlinks(*file); err == nil {
			*file = real
		} else if !errors.Is(err, fs.ErrNotExist) { // a CA key may be kept elsewhere
			return nil, err
		}
	}
	certs, err := os.OpenRoot(filepath.Dir(ca))
	if err != nil {
		return nil, err
	}
	keys, err := os.OpenRoot(filepath.Dir(key))
	if err != nil {
		return nil, errors.Join(err, certs.Close())
	}
	return &Signer{certs: certs, keys: keys, certsName: filepath.Base(ca), keysName: filepath.Base(key), log: log, now: now}, nil
}

// Close lets go of the directories.
func (s *Signer) Close() error { return errors.Join(s.certs.Close(), s.keys.Close()) }

func (s *Signer) authority() (*identity.CA, error) {
	bundle, err := s.certs.ReadFile(s.certsName)
	if err != nil {
		return nil, err
	}
	key, err := s.keys.ReadFile(s.keysName)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, refuse(Failed, "%s is not here: put the CA key back while certificates are to be issued", filepath.Join(s.keys.Name(), s.keysName))
	}
	if err != nil {
		return nil, err
	}
	return identity.ParseCA(bundle, key)
}

// do answers a request of somebody with these rights. Every error is a *Refusal.
func (s *Signer) do(req request, may Rights) (*x509.Certificate, error) {
	needs := Everything
	if req.Op == opRenew || req.Op == opForget {
		needs = Renewals
	}
	if may < needs {
		return nil, refuse(Forbidden, "%q is not for this user to ask", req.Op)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	cert, err := s.locked(req, s.now())
	var refusal *Refusal
	if err != nil && !errors.As(err, &refusal) {
		err = refuse(Failed, "%v", err)
	}
	return cert, err
}

func (s *Signer) locked(req request, now time.Time) (cert *x509.Certificate, err error) {
	known := record{s.keys}
	unlock, err := known.lock()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, unlock()) }()
	if req.Op == opForget {
		return nil, forget(known, req.Name, req.Device, now)
	}
	csr, err := identity.ParseRequest(req.Request)
	if err != nil {
		return nil, refuse(BadRequest, "%v", err)
	}
	ca, err := s.authority()
	if err != nil {
		return nil, err
	}
	switch req.Op {
	case opEnrol:
		if req.Seconds < 1 || req.Seconds > maxSeconds {
			return nil, refuse(BadRequest, "%d seconds of validity: want 1 to %d", req.Seconds, maxSeconds)
		}
		return enrol(ca, known, csr, req, now)
	case opServer:
		if id, err := hex.DecodeString(req.ServerID); err != nil || len(id) != 16 || req.Host == "" || len(req.Host) > 253 {
			return nil, refuse(BadRequest, "server id %q, host %q: want 32 hexadecimal digits, and a name or an address", req.ServerID, req.Host)
		}
		return ca.SignServer(csr.PublicKey, req.ServerID, req.Host, now)
	case opRenew:
		old, err := x509.ParseCertificate(req.Certificate)
		if err != nil {
			return nil, refuse(BadRequest, "certificate: %v", err)
		}
		return renew(ca, known, csr, old, req.Proof, now)
	}
	return nil, refuse(BadRequest, "no operation %q", req.Op)
}

// enrol issues a user's certificate, from which renewals start.
func enrol(ca *identity.CA, known record, csr *identity.Request, req request, now time.Time) (*x509.Certificate, error) {
	cert, err := ca.SignClient(csr.PublicKey, req.Name, req.Device, now.Add(time.Duration(req.Seconds)*time.Second), now)
	if err != nil {
		return nil, refuse(BadRequest, "%v", err)
	}
	list, err := known.read(req.Name)
	if err != nil {
		return nil, err
	}
	if slices.ContainsFunc(list, func(c certificate) bool { return c.Key == csr.Key }) {
		return nil, refuse(BadRequest, "user %q has a certificate with this key already: make a new key", req.Name)
	}
	if req.Replace {
		list = slices.DeleteFunc(list, func(c certificate) bool { return c.Device == req.Device })
	}
	// Nothing leaves before it is on disk.
	return cert, known.write(req.Name, append(list, certificate{Device: req.Device, Key: csr.Key, Enrolled: now, NotAfter: cert.NotAfter}), now)
}

// forget takes a user's certificates, or those of one device, out of what may be renewed.
func forget(known record, name, device string, now time.Time) error {
	if err := identity.CheckName("user", name); err != nil {
		return refuse(BadRequest, "%v", err)
	}
	if device == "" {
		return known.write(name, nil, now)
	}
	list, err := known.read(name)
	if err != nil {
		return err
	}
	return known.write(name, slices.DeleteFunc(list, func(c certificate) bool { return c.Device == device }), now)
}

// renew issues the successor of a certificate.
func renew(ca *identity.CA, known record, csr *identity.Request, old *x509.Certificate, proof []byte, now time.Time) (*x509.Certificate, error) {
	roots := x509.NewCertPool()
	for _, c := range ca.Bundle {
		roots.AddCert(c)
	}
	if _, err := old.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		return nil, refuse(NotRenewable, "the certificate does not hold: %v", err)
	}
	// Verify takes an absent usage, and anyExtendedKeyUsage, for every usage.
	if !slices.Equal(old.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}) || len(old.UnknownExtKeyUsage) > 0 || old.IsCA {
		return nil, refuse(NotRenewable, "the certificate is not a user's")
	}
	name := old.Subject.CommonName
	if err := identity.CheckName("user", name); err != nil {
		return nil, refuse(NotRenewable, "the certificate's name: %v", err)
	}
	if err := proven(old, vpn.RenewalMessage(csr.DER), proof); err != nil {
		return nil, refuse(NotProven, "the request for the new key is not signed by the old one: %v", err)
	}
	if csr.Name != "" && csr.Name != name {
		return nil, refuse(BadRequest, "the request is for %q, the certificate is that of %q", csr.Name, name)
	}
	list, err := known.read(name)
	if err != nil {
		return nil, err
	}
	of := func(key identity.KeyHash) int {
		return slices.IndexFunc(list, func(c certificate) bool { return c.Key == key })
	}
	i := of(identity.HashKey(old))
	if i < 0 {
		return nil, refuse(NotRenewable, "the certificate is not on record as renewable: it was revoked or replaced")
	}
	was := &list[i]
	if was.Next == csr.Key && csr.Key != (identity.KeyHash{}) { // the answer was lost
		next := of(csr.Key)
		if next < 0 {
			return nil, refuse(NotRenewable, "the renewed certificate was revoked")
		}
		return sign(ca, csr, name, list[next], now)
	}
	if was.Next != (identity.KeyHash{}) {
		return nil, refuse(Renewed, "the certificate was renewed before, with another key: "+
			"if that was not its owner, somebody else has a copy of it: revoke the device")
	}
	if of(csr.Key) >= 0 {
		return nil, refuse(BadRequest, "the key of the request has, or had, a certificate: make a new key")
	}
	leaving := old.CheckSignatureFrom(ca.Certificate) != nil
	if from := vpn.RenewFrom(old.NotBefore, old.NotAfter); now.Before(from) && !leaving {
		return nil, refuse(TooEarly, "the certificate may be renewed from %s on", from.UTC().Format(time.RFC3339))
	}
	end, limit := now.Add(identity.Validity(old)).Truncate(time.Second), was.Enrolled.Add(identity.Renewals).Truncate(time.Second)
	if ca.Certificate.NotAfter.Before(limit) {
		limit = ca.Certificate.NotAfter
	}
	if limit.Before(end) {
		if end = limit; !end.After(now) || !end.After(old.NotAfter) && !leaving {
			return nil, refuse(YearOver, "renewals end on %s, a year after the enrolment or with the CA", limit.UTC().Format(time.DateOnly))
		}
	}
	next := certificate{Device: was.Device, Key: csr.Key, Enrolled: was.Enrolled, NotAfter: end}
	cert, err := sign(ca, csr, name, next, now)
	if err != nil {
		return nil, err
	}
	was.Next = csr.Key
	return cert, known.write(name, append(list, next), now)
}

func sign(ca *identity.CA, csr *identity.Request, name string, c certificate, now time.Time) (*x509.Certificate, error) {
	cert, err := ca.SignClient(csr.PublicKey, name, c.Device, c.NotAfter, now)
	if err != nil {
		return nil, refuse(NotRenewable, "%v", err)
	}
	return cert, nil
}

// proven checks that the certificate's key signed the message.
func proven(c *x509.Certificate, message, signature []byte) error {
	algorithm := x509.UnknownSignatureAlgorithm
	switch c.PublicKey.(type) {
	case *ecdsa.PublicKey:
		algorithm = x509.ECDSAWithSHA256
	case *rsa.PublicKey:
		algorithm = x509.SHA256WithRSA
	case ed25519.PublicKey:
		algorithm = x509.PureEd25519
	}
	return c.CheckSignature(algorithm, message, signature)
}
