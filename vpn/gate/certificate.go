package gate

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"time"

	"perimeterd/internal/identity"
	"perimeterd/internal/signer"
	"perimeterd/vpn"
)

// Signer issues the successor of a certificate. What it refuses is a *signer.Refusal.
type Signer interface {
	Renew(ctx context.Context, old *x509.Certificate, csr, proof []byte) (*x509.Certificate, error)
}

// Renewals is how certificates are renewed. The zero value renews none.
type Renewals struct {
	Signer Signer
	Users  *identity.Users
	CA     string // file of the bundle that clients get
	// Tell hears of each renewed certificate. Nil: nobody does.
	Tell func(id identity.Identity, source netip.AddrPort, until time.Time)
}

// RenewBy makes the gate renew certificates. It must be called before Run.
func (g *Gate) RenewBy(r Renewals) { g.renewals = r }

// certificate renews the one that the caller came with.
func (g *Gate) certificate(w http.ResponseWriter, r *http.Request, id identity.Identity) error {
	if g.renewals.Signer == nil {
		return &vpn.APIError{Code: vpn.CodeNoSigner, Message: "this gate renews no certificates", Fix: "ask its operator for another", RetryAfter: 3600}
	}
	var body vpn.CertificateRequest
	if err := decodeBody(r.Body, &body, `{"request": base64 of a PKCS #10 request in DER, "proof": base64}`); err != nil {
		return err
	}
	csr, err := identity.ParseRequest(body.Request)
	if err != nil {
		return badRequest("request: %v", err)
	}
	now := time.Now()
	if wait := g.renewed.wait(id.Certificate, now); wait > 0 {
		return &vpn.APIError{Code: vpn.CodeRate, Message: "too many requests for certificates in a short time", Fix: "keep the one you have", RetryAfter: int(wait.Seconds()) + 1}
	}
	cert, err := g.renewals.Signer.Renew(r.Context(), r.TLS.PeerCertificates[0], csr.DER, body.Proof)
	var refusal *signer.Refusal
	if errors.As(err, &refusal) {
		return refused(refusal)
	}
	if err != nil {
		return fmt.Errorf("renew: %w", err)
	}
	// Entered before it is given out: nobody holds one that is not known here. A user who was revoked meanwhile gets none.
	_, err = g.renewals.Users.Renew(id.User, id.Key, identity.Successor{Key: csr.Key, Issuer: identity.IssuerOf(cert), NotAfter: cert.NotAfter}, now)
	switch {
	case errors.Is(err, identity.ErrUserExists):
		return badRequest("request: its key has a certificate already: make a new key")
	case errors.Is(err, identity.ErrNotRenewed), errors.Is(err, identity.ErrNoUser):
		return &vpn.APIError{Code: vpn.CodeForbidden, Message: err.Error(), Fix: "ask the operator of this gate"}
	case err != nil:
		return err
	}
	ca, err := os.ReadFile(g.renewals.CA)
	if err != nil {
		return err
	}
	g.log.Info("certificate renewed", "user", id.User, "device", id.Device, "source", outer(r), "until", cert.NotAfter)
	if g.renewals.Tell != nil {
		g.renewals.Tell(id, outer(r), cert.NotAfter)
	}
	return writeJSON(w, http.StatusCreated, vpn.CertificateReply{Certificate: string(identity.EncodeCertificate(cert)), CA: string(ca), Expires: cert.NotAfter})
}

// refused says what the signer's refusal is to a caller.
func refused(r *signer.Refusal) error {
	e := &vpn.APIError{Message: r.Text}
	switch r.Code {
	case signer.TooEarly:
		e.Code, e.Fix = vpn.CodeTooEarly, "keep the one you have until then"
	case signer.Renewed:
		e.Code, e.Fix = vpn.CodeRenewed, "ask the operator for a new profile"
	case signer.YearOver:
		e.Code, e.Fix = vpn.CodeYearOver, "ask the operator for a new profile"
	case signer.NotRenewable:
		e.Code, e.Fix = vpn.CodeNotRenewable, "ask the operator for a new profile"
	case signer.BadRequest, signer.NotProven:
		e.Code = vpn.CodeBadRequest
	default: // for the log
		return r
	}
	return e
}

// used makes a renewed certificate the one that counts, as its owner has it now. A state that cannot be written leaves both good.
func (g *Gate) used(id identity.Identity) {
	if !id.Unused || g.renewals.Users == nil {
		return
	}
	if err := g.renewals.Users.Used(id.User, id.Key); err != nil {
		g.log.Error("a renewed certificate is used, and the one before it could not be retired", "user", id.User, "device", id.Device, "err", err)
		return
	}
	g.log.Info("renewed certificate used: the one before it is refused from now on", "user", id.User, "device", id.Device)
}
