package gate

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"perimeterd/internal/identity"
	"perimeterd/internal/signer"
	"perimeterd/vpn"
)

// holder is a user's machine: his certificate, and its key.
type holder struct {
	*http.Client
	cert *x509.Certificate
	key  crypto.Signer
}

// renewing gives the bench a signer behind a socket.
func renewing(b *bench) *signer.Client {
	b.t.Helper()
	dir := filepath.Dir(b.caFile)
	s, err := signer.Open(b.caFile, filepath.Join(dir, "ca.key"), slog.New(slog.DiscardHandler), time.Now)
	if err != nil {
		b.t.Fatal(err)
	}
	socket := filepath.Join(dir, "s")
	ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: socket, Net: "unixpacket"})
	if err != nil {
		b.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, ln, func(uint32) signer.Rights { return signer.Everything }) }()
	b.t.Cleanup(func() {
		cancel()
		if err := errors.Join(<-done, s.Close()); err != nil {
			b.t.Error(err)
		}
	})
	c := signer.NewClient(socket, func(uint32) bool { return true }, func() (*exec.Cmd, error) { return nil, errors.New("nobody listens") })
	b.gate.RenewBy(Renewals{Signer: c, Users: b.users, CA: b.caFile})
	return c
}

func request(t *testing.T, key crypto.Signer, name string) []byte {
	t.Helper()
	r, err := identity.NewRequest(key, name, "")
	if err != nil {
		t.Fatal(err)
	}
	return r.DER
}

func newKey(t *testing.T) crypto.Signer {
	t.Helper()
	key, err := identity.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func (b *bench) holder(cert *x509.Certificate, key crypto.Signer) *holder {
	b.t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		b.t.Fatal(err)
	}
	return &holder{b.client(identity.EncodeCertificate(cert), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})), cert, key}
}

// enrol is `user add`.
func (b *bench) enrol(sign *signer.Client, name, device string, valid time.Duration) *holder {
	b.t.Helper()
	key := newKey(b.t)
	cert, err := sign.Enrol(context.Background(), name, device, false, valid, request(b.t, key, name))
	if err != nil {
		b.t.Fatal(err)
	}
	e := identity.Enrolment{Name: name, Device: device, Key: identity.HashKey(cert), NotAfter: cert.NotAfter}
	if _, err := b.users.Add(e, time.Now()); err != nil {
		b.t.Fatal(err)
	}
	return b.holder(cert, key)
}

// renew posts, with a proof by a key, and returns the status with the new certificate or the refusal's code.
func (b *bench) renew(h *holder, csr []byte, by crypto.Signer) (int, *x509.Certificate, string) {
	b.t.Helper()
	sum := sha256.Sum256(vpn.RenewalMessage(csr))
	proof, err := by.Sign(rand.Reader, sum[:], crypto.SHA256)
	if err != nil {
		b.t.Fatal(err)
	}
	body, err := json.Marshal(vpn.CertificateRequest{Request: csr, Proof: proof})
	if err != nil {
		b.t.Fatal(err)
	}
	status, answer, err := b.do(h.Client, "POST", vpn.CertificatePath, string(body))
	if err != nil {
		return 0, nil, err.Error()
	}
	if status != http.StatusCreated {
		var e vpn.ErrorReply
		if err := json.Unmarshal(answer, &e); err != nil {
			b.t.Fatalf("%d %s", status, answer)
		}
		return status, nil, e.Error.Code
	}
	var reply vpn.CertificateReply
	if err := json.Unmarshal(answer, &reply); err != nil {
		b.t.Fatal(err)
	}
	block, _ := pem.Decode([]byte(reply.Certificate))
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil || !cert.NotAfter.Equal(reply.Expires) || !strings.Contains(reply.CA, "BEGIN CERTIFICATE") {
		b.t.Fatalf("%v: %s", err, answer)
	}
	return status, cert, ""
}

// quarter of an hour: a certificate that may be renewed at once, as it began an hour ago for slow clocks.
const soonOver = 15 * time.Minute

func TestRenewalKeepsSessionAndAddressAndRetiresTheOldWithTheFirstUse(t *testing.T) {
	b := newBench(t, nil)
	sign := renewing(b)
	old := b.enrol(sign, "alice", "mac", soonOver)
	_, public := keyPair(t)
	session := b.post(old.Client, public)
	key := newKey(t)
	csr := request(t, key, "alice")
	status, cert, code := b.renew(old, csr, old.key)
	if status != http.StatusCreated || cert.Subject.String() != "CN=alice,OU=mac" || !cert.NotAfter.After(old.cert.NotAfter) && !cert.NotAfter.Equal(old.cert.NotAfter) {
		t.Fatalf("%d %s %v", status, code, cert)
	}
	fresh := b.holder(cert, key)
	path := vpn.SessionPath + "/" + session.ID
	get := func(h *holder) int {
		t.Helper()
		h.CloseIdleConnections() // another handshake
		status, _, err := b.do(h.Client, "GET", path, "")
		if err != nil {
			return 0
		}
		return status
	}
	// The answer may be lost: the old one holds, and asks again.
	if get(old) != 200 {
		t.Error("the old certificate is refused before the new one was used")
	}
	if status, again, code := b.renew(old, csr, old.key); status != http.StatusCreated || !again.NotAfter.Equal(cert.NotAfter) {
		t.Errorf("asked again: %d %s", status, code)
	}
	if status, _, code := b.renew(old, request(t, newKey(t), ""), old.key); status != 409 || code != vpn.CodeRenewed {
		t.Errorf("with another key: %d %s", status, code)
	}
	if get(fresh) != 200 {
		t.Error("the new certificate's session is not the old one's")
	}
	if get(old) != 0 {
		t.Error("the old certificate comes in after the new one was used")
	}
	if get(fresh) != 200 {
		t.Error("the new certificate does not come in twice")
	}
	if s := b.store.List(); len(s) != 1 || s[0].ID.String() != session.ID {
		t.Errorf("sessions: %+v", s)
	}
	// Whose connection stands from before is refused as well.
	if status, answer, _ := b.do(fresh.Client, "DELETE", path, ""); status != 204 {
		t.Errorf("%d %s", status, answer)
	}
	_, public = keyPair(t)
	if next := b.post(fresh.Client, public); next.Address != session.Address {
		t.Errorf("the next session has %v, before it was %v", next.Address, session.Address)
	}
	u, err := b.users.Get("alice")
	if err != nil || len(u.Devices) != 1 || u.Devices[0].Next != nil || u.Devices[0].Key != identity.HashKey(cert) {
		t.Errorf("%+v %v", u, err)
	}
	// Revoking the device revokes them all.
	if _, err := b.users.Revoke("alice", "mac", time.Now()); err != nil {
		t.Fatal(err)
	}
	if get(fresh) != 0 || get(old) != 0 {
		t.Error("a certificate of a revoked device comes in")
	}
}

func TestRefusedRequestsForCertificates(t *testing.T) {
	b := newBench(t, nil)
	none := b.user("dave", "mac", time.Hour)
	if status, answer, _ := b.do(none, "POST", vpn.CertificatePath, "{}"); status != 503 || !strings.Contains(string(answer), `"code":"no_signer"`) {
		t.Errorf("without a signer: %d %s", status, answer)
	}
	sign := renewing(b)
	alice, bob, early := b.enrol(sign, "alice", "mac", soonOver), b.enrol(sign, "bob", "mac", soonOver), b.enrol(sign, "carol", "mac", 90*24*time.Hour)
	if _, err := b.users.Add(identity.Enrolment{Name: "erin", Device: "mac", Key: identity.KeyHash{9}, NotAfter: time.Now().Add(time.Hour)}, time.Now()); err != nil {
		t.Fatal(err)
	}
	daves := &holder{none, nil, newKey(t)} // enrolled without the signer
	for _, c := range []struct {
		name   string
		who    *holder
		csr    []byte
		by     crypto.Signer
		status int
		code   string
	}{
		{"too early", early, request(t, newKey(t), ""), early.key, 409, vpn.CodeTooEarly},
		{"another's name", alice, request(t, newKey(t), "bob"), alice.key, 400, vpn.CodeBadRequest},
		{"another's proof", alice, request(t, newKey(t), ""), bob.key, 400, vpn.CodeBadRequest},
		{"the same key", alice, request(t, alice.key, ""), alice.key, 400, vpn.CodeBadRequest},
		{"another's key", alice, request(t, bob.key, ""), alice.key, 400, vpn.CodeBadRequest},
		{"no request", alice, []byte("please"), alice.key, 400, vpn.CodeBadRequest},
		{"not on the signer's record", daves, request(t, newKey(t), ""), daves.key, 400, vpn.CodeBadRequest}, // another key than the certificate's
	} {
		if status, _, code := b.renew(c.who, c.csr, c.by); status != c.status || code != c.code {
			t.Errorf("%s: %d %s, want %d %s", c.name, status, code, c.status, c.code)
		}
	}
	for body, want := range map[string]string{
		"":                              "bad_request",
		`{"request":"AAAA","name":"x"}`: `unknown field`,
		`{"request":1}`:                 "bad_request",
		`{}{}`:                          "something follows",
		`{"request":"` + strings.Repeat("A", 5000) + `"}`: "too_large",
	} {
		if _, answer, err := b.do(bob.Client, "POST", vpn.CertificatePath, body); err != nil || !strings.Contains(string(answer), want) {
			t.Errorf("%.30q: %s %v, want %q", body, answer, err, want)
		}
	}
	if status, _, _ := b.do(bob.Client, "GET", vpn.CertificatePath, ""); status != 405 {
		t.Errorf("GET: %d", status)
	}
	if err := sign.Forget(context.Background(), "alice", ""); err != nil {
		t.Fatal(err)
	}
	if status, _, code := b.renew(alice, request(t, newKey(t), ""), alice.key); status != 403 || code != vpn.CodeNotRenewable {
		t.Errorf("forgotten by the signer: %d %s", status, code)
	}
}

// revoking is a signer in whose time the user is revoked.
type revoking struct {
	Signer
	users *identity.Users
}

func (r revoking) Renew(ctx context.Context, old *x509.Certificate, csr, proof []byte) (*x509.Certificate, error) {
	cert, err := r.Signer.Renew(ctx, old, csr, proof)
	if err == nil {
		_, err = r.users.Revoke(old.Subject.CommonName, "", time.Now())
	}
	return cert, err
}

func TestUserRevokedWhileHisCertificateIsRenewedGetsNone(t *testing.T) {
	b := newBench(t, nil)
	sign := renewing(b)
	alice := b.enrol(sign, "alice", "mac", soonOver)
	b.gate.RenewBy(Renewals{Signer: revoking{sign, b.users}, Users: b.users, CA: b.caFile})
	if status, cert, code := b.renew(alice, request(t, newKey(t), ""), alice.key); status != 403 || cert != nil {
		t.Errorf("%d %s", status, code)
	}
	u, err := b.users.Get("alice")
	if err != nil || u.Active() || u.Devices[0].Next != nil {
		t.Errorf("%+v %v", u, err)
	}
}
