package client

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/pelletier/go-toml/v2"

	"perimeterd/vpn"
)

// RenewFrom is when the certificate may be renewed.
func (p *Profile) RenewFrom() time.Time {
	leaf := p.typed.identity.Leaf
	return vpn.RenewFrom(leaf.NotBefore, leaf.NotAfter)
}

// before is where the profile lies that a renewed one replaced, until the gate has accepted that.
func (p *Profile) before() string { return p.file + ".old" }

// accepted notes that the gate took the certificate: the one before it is of no use any more.
func (p *Profile) accepted() {
	if p.file != "" {
		os.Remove(p.before()) // as a rule it is not there
	}
}

// Renew asks the gate for a certificate for a new key, and puts both into the profile's file. The key never leaves this
// machine. It is kept before it is asked for, so that a lost answer can be asked for again; the profile before it is kept until
// the gate has accepted the new one. Where another process was faster, it returns that one's.
func Renew(ctx context.Context, p *Profile, tokens *Tokens) (*Profile, error) {
	if p.file == "" {
		return nil, errors.New("a profile that is in no file cannot be renewed")
	}
	unlock, err := lockState(p, ".renew")
	if err != nil {
		return nil, err
	}
	defer unlock()
	now, err := LoadProfile(p.file)
	if err != nil || now.Certificate != p.Certificate {
		return now, err
	}
	key, waiting, err := p.nextKey()
	if err != nil {
		return nil, err
	}
	reply, err := p.askRenewal(ctx, tokens, key)
	if err != nil {
		return nil, err
	}
	q, err := p.renewed(reply, key)
	if err != nil {
		return nil, fmt.Errorf("the gate's answer: %w: tell the operator", err)
	}
	if err := q.prove(ctx, tokens); err != nil {
		return nil, err
	}
	return q, os.Remove(waiting)
}

// lockState waits for the lock of a file beside the profile's state.
func lockState(p *Profile, suffix string) (unlock func() error, err error) {
	name, err := stateFile(p, suffix)
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, unwritable(err)
	}
	if err := lockFile(f, true); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", name, err), f.Close())
	}
	return f.Close, nil
}

// nextKey is the key that the certificate will be renewed with: the gate takes one for each certificate, and no other.
func (p *Profile) nextKey() (key crypto.Signer, file string, err error) {
	id, err := keyID(p.typed.identity.Leaf.PublicKey)
	if err != nil {
		return nil, "", err
	}
	if file, err = stateFile(p, "-"+id[:16]+".next"); err != nil {
		return nil, "", err
	}
	key, err = readKey(file)
	if errors.Is(err, os.ErrNotExist) {
		// Those for certificates before this one are nobody's.
		others, _ := filepath.Glob(file[:len(file)-len(id[:16]+".next")] + "*.next")
		for _, o := range others {
			os.Remove(o)
		}
		key, err = newKey(file)
	}
	return key, file, err
}

func (p *Profile) askRenewal(ctx context.Context, tokens *Tokens, key crypto.Signer) (reply renewal, err error) {
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: p.typed.identity.Leaf.Subject.CommonName}}, key)
	if err != nil {
		return reply, err
	}
	proof, err := signProof(p.typed.identity.PrivateKey.(crypto.Signer), vpn.RenewalMessage(csr))
	if err != nil {
		return reply, err
	}
	g, err := p.connect(ctx, tokens)
	if err != nil {
		return reply, err
	}
	defer g.Close()
	reply.gate = g.ConnectionState().PeerCertificates
	return reply, g.do(ctx, http.MethodPost, vpn.CertificatePath, vpn.CertificateRequest{Request: csr, Proof: proof}, &reply.CertificateReply)
}

// renewal is the gate's reply, and the certificate of the gate that gave it.
type renewal struct {
	vpn.CertificateReply
	gate []*x509.Certificate
}

// signProof signs as vpn.RenewalMessage says.
func signProof(key crypto.Signer, message []byte) ([]byte, error) {
	if _, pure := key.Public().(ed25519.PublicKey); pure {
		return key.Sign(rand.Reader, message, crypto.Hash(0))
	}
	sum := sha256.Sum256(message)
	return key.Sign(rand.Reader, sum[:], crypto.SHA256)
}

// renewed is the profile with what the gate sent, checked as if it came from a stranger.
func (p *Profile) renewed(r renewal, key crypto.Signer) (*Profile, error) {
	block, rest := pem.Decode([]byte(r.Certificate))
	if block == nil || block.Type != "CERTIFICATE" || len(bytes.TrimSpace(rest)) > 0 {
		return nil, errors.New("certificate: want one in PEM")
	}
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("certificate: %w", err)
	}
	old := p.typed.identity.Leaf
	if leaf.Subject.String() != old.Subject.String() {
		return nil, fmt.Errorf("certificate: it is for %v, not for %v", leaf.Subject, old.Subject)
	}
	if now := time.Now(); now.After(leaf.NotAfter) || now.Before(leaf.NotBefore) {
		return nil, fmt.Errorf("certificate: it holds from %v to %v, and here it is %v", leaf.NotBefore, leaf.NotAfter, now)
	}
	text, err := encodeKey(key)
	if err != nil {
		return nil, err
	}
	q := *p
	q.Certificate, q.Key, q.CA, q.typed = r.Certificate, string(text), r.CA, typed{}
	if err := q.decode(); err != nil { // certificate and key are a pair
		return nil, err
	}
	// With this CA the gate that sent it must be known again, or nobody here would come in any more.
	if len(r.gate) == 0 {
		return nil, errors.New("ca: the gate showed no certificate")
	}
	if _, err := r.gate[0].Verify(x509.VerifyOptions{Roots: q.typed.roots, DNSName: q.ServerID}); err != nil {
		return nil, fmt.Errorf("ca: it does not know the gate that sent it: %w", err)
	}
	return &q, nil
}

// prove replaces the profile's file, and asks the gate for something with the new one. Where the gate refuses it, the one
// before comes back; where it gives no answer, the new one stays, since the gate knows it.
func (p *Profile) prove(ctx context.Context, tokens *Tokens) error {
	old, err := os.ReadFile(p.file)
	if err != nil {
		return err
	}
	text, err := toml.Marshal(p)
	if err != nil {
		return err
	}
	if err := writePrivate(p.before(), old); err != nil {
		return err
	}
	if err := writePrivate(p.file, text); err != nil {
		return err
	}
	g, err := p.connect(ctx, tokens)
	if err == nil {
		err = g.do(ctx, http.MethodGet, vpn.SessionPath, nil, nil)
		g.Close()
	}
	switch {
	case err == nil:
		p.accepted()
	case certificateRefused(err):
		return errors.Join(fmt.Errorf("the gate refuses the certificate that it has just issued, and the one before is kept: %w", err),
			writePrivate(p.file, old), os.Remove(p.before()))
	}
	return nil
}

// connect knocks and authenticates.
func (p *Profile) connect(ctx context.Context, tokens *Tokens) (*gateConn, error) {
	if err := p.checkDates(time.Now()); err != nil {
		return nil, err
	}
	conn, err := (&Dialer{Profile: p, Tokens: tokens}).Dial(ctx)
	if err != nil {
		return nil, err
	}
	return p.handshake(ctx, conn)
}
