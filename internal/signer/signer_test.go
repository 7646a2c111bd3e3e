package signer

import (
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
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"perimeterd/internal/identity"
	"perimeterd/vpn"
)

const day = 24 * time.Hour

// bench is a signer with a CA of its own, and a clock.
type bench struct {
	t   *testing.T
	dir string
	ca  *identity.CA
	*Signer
	clock time.Time
}

func newBench(t testing.TB) *bench {
	b := &bench{dir: t.TempDir(), clock: time.Now().Truncate(time.Second)}
	b.t, _ = t.(*testing.T)
	var err error
	if b.ca, err = identity.NewCA("test CA", b.clock); err != nil {
		t.Fatal(err)
	}
	if err := b.ca.Save(b.path("ca.crt"), b.path("ca.key")); err != nil {
		t.Fatal(err)
	}
	if b.Signer, err = Open(b.path("ca.crt"), b.path("ca.key"), slog.New(slog.DiscardHandler), func() time.Time { return b.clock }); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return b
}

func (b *bench) path(name string) string { return filepath.Join(b.dir, name) }

func newKey(t testing.TB) crypto.Signer {
	t.Helper()
	key, err := identity.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func csr(t testing.TB, key crypto.Signer, name string) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: name}}, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// prove signs as a client does.
func prove(t testing.TB, key crypto.Signer, der []byte) []byte {
	t.Helper()
	message, hash := vpn.RenewalMessage(der), crypto.SHA256
	if _, pure := key.(ed25519.PrivateKey); pure {
		hash = 0
	} else {
		sum := sha256.Sum256(message)
		message = sum[:]
	}
	proof, err := key.Sign(rand.Reader, message, hash)
	if err != nil {
		t.Fatal(err)
	}
	return proof
}

func (b *bench) enrol(name, device string, valid time.Duration, key crypto.Signer) *x509.Certificate {
	b.t.Helper()
	cert, err := b.do(request{Op: opEnrol, Name: name, Device: device, Seconds: int64(valid / time.Second), Request: csr(b.t, key, name)}, Everything)
	if err != nil {
		b.t.Fatal(err)
	}
	return cert
}

// renew asks as the daemon does.
func (b *bench) renew(old *x509.Certificate, oldKey, newKey crypto.Signer) (*x509.Certificate, error) {
	b.t.Helper()
	der := csr(b.t, newKey, "")
	return b.do(request{Op: opRenew, Certificate: old.Raw, Request: der, Proof: prove(b.t, oldKey, der)}, Renewals)
}

func wantCode(t testing.TB, err error, code Code) {
	t.Helper()
	var r *Refusal
	if !errors.As(err, &r) || r.Code != code {
		t.Errorf("%v, want the code %q", err, code)
	}
}

func TestARenewalHasTheOldNameDeviceAndUsagesWhateverTheRequestSays(t *testing.T) {
	b := newBench(t)
	for i, key := range []crypto.Signer{newKey(t), mustRSA(t, 2048), mustEd25519(t)} {
		name := []string{"alice", "bob", "carol"}[i]
		old := b.enrol(name, "mac", 90*day, key)
		der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
			Subject:  pkix.Name{CommonName: name, OrganizationalUnit: []string{"desk"}, Organization: []string{"operators"}},
			DNSNames: []string{"bastion.example.com"},
			ExtraExtensions: []pkix.Extension{ // basicConstraints with CA, and serverAuth
				{Id: []int{2, 5, 29, 19}, Critical: true, Value: []byte{0x30, 3, 1, 1, 0xff}},
				{Id: []int{2, 5, 29, 37}, Value: []byte{0x30, 10, 6, 8, 0x2b, 6, 1, 5, 5, 7, 3, 1}},
			},
		}, newKey(t))
		if err != nil {
			t.Fatal(err)
		}
		b.clock = b.clock.Add(61 * day)
		cert, err := b.do(request{Op: opRenew, Certificate: old.Raw, Request: der, Proof: prove(t, key, der)}, Renewals)
		if err != nil {
			t.Fatal(err)
		}
		if cert.Subject.String() != "CN="+name+",OU=mac" || cert.IsCA || len(cert.DNSNames) > 0 || len(cert.ExtKeyUsage) != 1 ||
			cert.ExtKeyUsage[0] != x509.ExtKeyUsageClientAuth || cert.KeyUsage != x509.KeyUsageDigitalSignature {
			t.Errorf("%v, CA %v, names %v, usages %v", cert.Subject, cert.IsCA, cert.DNSNames, cert.ExtKeyUsage)
		}
		if want := b.clock.Add(90 * day); !cert.NotAfter.Equal(want) {
			t.Errorf("it ends at %v, want %v", cert.NotAfter, want)
		}
		if err := cert.CheckSignatureFrom(b.ca.Certificate); err != nil {
			t.Error(err)
		}
	}
}

func mustRSA(t testing.TB, bits int) crypto.Signer {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func mustEd25519(t testing.TB) crypto.Signer {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func TestTheDaemonMintsNothing(t *testing.T) {
	b := newBench(t)
	key := newKey(t)
	der := csr(t, key, "mallory")
	for _, req := range []request{
		{Op: opEnrol, Name: "mallory", Device: "mac", Seconds: 3600, Request: der},
		{Op: opServer, ServerID: strings.Repeat("ab", 16), Host: "bastion.example.com", Request: der},
		{Op: "", Request: der}, {Op: "Renew", Request: der}, {Op: "rotate"},
	} {
		_, err := b.do(req, Renewals)
		wantCode(t, err, Forbidden)
		_, err = b.do(req, Nothing)
		wantCode(t, err, Forbidden)
	}
	_, err := b.do(request{Op: opRenew}, Nothing)
	wantCode(t, err, Forbidden)
	_, err = b.do(request{Op: opForget, Name: "alice"}, Nothing)
	wantCode(t, err, Forbidden)
	if left, err := os.ReadDir(b.path(Renewable)); err == nil && len(left) > 0 {
		t.Errorf("on record: %v", left)
	}
}

func TestRefusedRenewals(t *testing.T) {
	b := newBench(t)
	began := b.clock
	alice, bob, other := newKey(t), newKey(t), newKey(t)
	old, bobs := b.enrol("alice", "mac", 90*day, alice), b.enrol("bob", "mac", 90*day, bob)
	b.clock = began.Add(61 * day)
	foreignCA, err := identity.NewCA("test CA", began)
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := foreignCA.SignClient(alice.Public(), "alice", "mac", old.NotAfter, began)
	if err != nil {
		t.Fatal(err)
	}
	// One that this CA signed, as a thief of its key would have, and that nobody enrolled.
	unrecorded, err := b.ca.SignClient(other.Public(), "alice", "mac", old.NotAfter, began)
	if err != nil {
		t.Fatal(err)
	}
	server, err := b.ca.SignServer(other.Public(), strings.Repeat("ab", 16), "alice", began)
	if err != nil {
		t.Fatal(err)
	}
	der := csr(t, newKey(t), "")
	weak := csr(t, mustRSA(t, 1024), "")
	p521, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	forged := append([]byte{}, der...)
	forged[len(forged)-1] ^= 1
	bobsName := csr(t, newKey(t), "bob")
	own := csr(t, alice, "alice")
	taken := csr(t, bob, "")
	for _, test := range []struct {
		name string
		old  *x509.Certificate
		csr  []byte
		key  crypto.Signer // that signs the proof
		code Code
	}{
		{"the gate's own key as the new one, proven by nobody", old, der, other, NotProven},
		{"another user's proof", old, der, bob, NotProven},
		{"another's certificate", bobs, der, alice, NotProven},
		{"a certificate of a CA of the same name", foreign, der, alice, NotRenewable},
		{"a certificate that was not issued here", unrecorded, der, other, NotRenewable},
		{"the gate's certificate", server, der, other, NotRenewable},
		{"the CA's own certificate", b.ca.Certificate, der, other, NotRenewable},
		{"a request for another name", old, bobsName, alice, BadRequest},
		{"the same key", old, own, alice, BadRequest},
		{"a request that its key did not sign", old, forged, alice, BadRequest},
		{"a short RSA key", old, weak, alice, BadRequest},
		{"a key on another curve", old, csr(t, p521, ""), alice, BadRequest},
		{"no request", old, nil, alice, BadRequest},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := b.do(request{Op: opRenew, Certificate: test.old.Raw, Request: test.csr, Proof: prove(t, test.key, test.csr)}, Renewals)
			wantCode(t, err, test.code)
		})
	}
	_, err = b.do(request{Op: opRenew, Certificate: old.Raw[:100], Request: der, Proof: prove(t, alice, der)}, Renewals)
	wantCode(t, err, BadRequest)
	_, err = b.do(request{Op: opRenew, Certificate: old.Raw, Request: der}, Renewals)
	wantCode(t, err, NotProven)
	// A proof is of one request.
	_, err = b.do(request{Op: opRenew, Certificate: old.Raw, Request: der, Proof: prove(t, alice, taken)}, Renewals)
	wantCode(t, err, NotProven)

	b.clock = vpn.RenewFrom(old.NotBefore, old.NotAfter).Add(-time.Second)
	_, err = b.renew(old, alice, newKey(t))
	wantCode(t, err, TooEarly)
	b.clock = old.NotAfter.Add(time.Second)
	_, err = b.renew(old, alice, newKey(t))
	wantCode(t, err, NotRenewable)
	b.clock = began.Add(61 * day)
	if _, err := b.renew(old, alice, newKey(t)); err != nil {
		t.Errorf("the good one: %v", err)
	}
}

func TestACertificateWithOtherUsagesIsNotRenewed(t *testing.T) {
	b := newBench(t)
	key := newKey(t)
	b.enrol("alice", "mac", 90*day, key)
	b.clock = b.clock.Add(61 * day)
	der := csr(t, newKey(t), "")
	caKey := b.caKey(t)
	for _, usages := range [][]x509.ExtKeyUsage{nil, {x509.ExtKeyUsageAny}, {x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}} {
		raw, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: "alice"},
			NotBefore: b.clock.Add(-day), NotAfter: b.clock.Add(time.Hour), ExtKeyUsage: usages}, b.ca.Certificate, key.Public(), caKey)
		if err != nil {
			t.Fatal(err)
		}
		_, err = b.do(request{Op: opRenew, Certificate: raw, Request: der, Proof: prove(t, key, der)}, Renewals)
		wantCode(t, err, NotRenewable)
	}
}

func (b *bench) caKey(t *testing.T) crypto.Signer {
	t.Helper()
	text, err := os.ReadFile(b.path("ca.key"))
	if err != nil {
		t.Fatal(err)
	}
	key, err := x509.ParsePKCS8PrivateKey(decodePEM(t, text))
	if err != nil {
		t.Fatal(err)
	}
	return key.(crypto.Signer)
}

func TestACertificateHasOneSuccessor(t *testing.T) {
	b := newBench(t)
	key, next, thief := newKey(t), newKey(t), newKey(t)
	old := b.enrol("alice", "mac", 90*day, key)
	b.clock = b.clock.Add(61 * day)
	first, err := b.renew(old, key, next)
	if err != nil {
		t.Fatal(err)
	}
	_, err = b.renew(old, key, thief)
	wantCode(t, err, Renewed)
	// Whose answer was lost asks again, and wins no time by it.
	b.clock = b.clock.Add(day)
	again, err := b.renew(old, key, next)
	if err != nil {
		t.Fatal(err)
	}
	if !again.NotAfter.Equal(first.NotAfter) || identity.HashKey(again) != identity.HashKey(first) {
		t.Errorf("asked again: until %v, was %v", again.NotAfter, first.NotAfter)
	}
	_, err = b.renew(first, next, newKey(t))
	wantCode(t, err, TooEarly)
	// The old key comes back as nobody's new one.
	b.clock = b.clock.Add(60 * day)
	_, err = b.renew(first, next, next)
	wantCode(t, err, BadRequest)
	if _, err := b.renew(first, next, newKey(t)); err != nil {
		t.Error(err)
	}
}

func TestRevokedCertificatesAreNotRenewed(t *testing.T) {
	b := newBench(t)
	mac, desk, phone := newKey(t), newKey(t), newKey(t)
	macs, desks, phones := b.enrol("alice", "mac", 90*day, mac), b.enrol("alice", "desk", 90*day, desk), b.enrol("bob", "phone", 90*day, phone)
	b.clock = b.clock.Add(61 * day)
	if _, err := b.do(request{Op: opForget, Name: "alice", Device: "mac"}, Renewals); err != nil {
		t.Fatal(err)
	}
	_, err := b.renew(macs, mac, newKey(t))
	wantCode(t, err, NotRenewable)
	next := newKey(t)
	fresh, err := b.renew(desks, desk, next)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.do(request{Op: opForget, Name: "alice"}, Renewals); err != nil {
		t.Fatal(err)
	}
	_, err = b.renew(desks, desk, next)
	wantCode(t, err, NotRenewable)
	b.clock = b.clock.Add(61 * day)
	_, err = b.renew(fresh, next, newKey(t))
	wantCode(t, err, NotRenewable)
	b.clock = b.clock.Add(-61 * day)
	if _, err := b.renew(phones, phone, newKey(t)); err != nil {
		t.Errorf("bob: %v", err)
	}
	// To forget what is not known is well, and so is a name that leads elsewhere refused.
	if _, err := b.do(request{Op: opForget, Name: "carol"}, Renewals); err != nil {
		t.Error(err)
	}
	for _, name := range []string{"", "..", "../ca.key", ".bob", "bob/../bob"} {
		_, err := b.do(request{Op: opForget, Name: name}, Renewals)
		wantCode(t, err, BadRequest)
	}
}

func TestRenewalsEndAYearAfterTheEnrolment(t *testing.T) {
	b := newBench(t)
	began := b.clock
	key := newKey(t)
	cert := b.enrol("alice", "mac", 90*day, key)
	renewed := 0
	for {
		b.clock = vpn.RenewFrom(cert.NotBefore, cert.NotAfter)
		next := newKey(t)
		fresh, err := b.renew(cert, key, next)
		if err != nil {
			wantCode(t, err, YearOver)
			break
		}
		if !fresh.NotAfter.After(cert.NotAfter) {
			t.Fatalf("renewal %d ends at %v, its predecessor at %v", renewed, fresh.NotAfter, cert.NotAfter)
		}
		cert, key, renewed = fresh, next, renewed+1
	}
	if want := began.Add(365 * day); !cert.NotAfter.Equal(want) || renewed < 4 {
		t.Errorf("after %d renewals it ends at %v, want %v", renewed, cert.NotAfter, want)
	}
	list, err := record{b.keys}.read("alice")
	if err != nil || len(list) > 3 {
		t.Errorf("%d certificates on record, those that ended included: %v", len(list), err)
	}
}

func TestALeavingCAsCertificatesAreRenewedEarly(t *testing.T) {
	b := newBench(t)
	key := newKey(t)
	old := b.enrol("alice", "mac", 90*day, key)
	fresh, err := identity.NewCA("the next CA", b.clock)
	if err != nil {
		t.Fatal(err)
	}
	if err := fresh.Save(b.path("next.crt"), b.path("next.key")); err != nil {
		t.Fatal(err)
	}
	both := append(identity.EncodeCertificate(b.ca.Certificate), identity.EncodeCertificate(fresh.Certificate)...)
	if err := os.WriteFile(b.path("ca.crt"), both, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(b.path("next.key"), b.path("ca.key")); err != nil {
		t.Fatal(err)
	}
	next := newKey(t)
	cert, err := b.renew(old, key, next)
	if err != nil {
		t.Fatal(err)
	}
	if err := cert.CheckSignatureFrom(fresh.Certificate); err != nil {
		t.Error(err)
	}
	_, err = b.renew(cert, next, newKey(t))
	wantCode(t, err, TooEarly)
}

// What cannot be put on record is not signed, and a record that cannot be read renews nothing.
func TestNothingIsSignedWithoutTheRecord(t *testing.T) {
	b := newBench(t)
	key := newKey(t)
	old := b.enrol("alice", "mac", 90*day, key)
	b.clock = b.clock.Add(61 * day)
	file := b.path(Renewable + "/alice")
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{"", string(good[:len(good)/2]), "[]", "{}", `[{"device":"mac","key":"00"}]`} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if cert, err := b.renew(old, key, newKey(t)); err == nil {
			t.Errorf("with the record %q: %v", text, cert.Subject)
		}
	}
	if err := os.WriteFile(file, good, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(b.path(Renewable+"/.alice"), 0o700); err != nil { // in the way of the new file
		t.Fatal(err)
	}
	_, err = b.renew(old, key, newKey(t))
	wantCode(t, err, Failed)
	if err := os.Remove(b.path(Renewable + "/.alice")); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(b.path("ca.key"), b.path("elsewhere")); err != nil {
		t.Fatal(err)
	}
	_, err = b.renew(old, key, newKey(t))
	wantCode(t, err, Failed)
	if _, err := b.do(request{Op: opForget, Name: "alice"}, Renewals); err != nil {
		t.Errorf("revoking without the CA key: %v", err)
	}
}

// The service and a command's signer work on one record.
func TestTwoSignersKeepOneRecord(t *testing.T) {
	b := newBench(t)
	second, err := Open(b.path("ca.crt"), b.path("ca.key"), slog.New(slog.DiscardHandler), time.Now)
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	var wg sync.WaitGroup
	for _, s := range []*Signer{b.Signer, second} {
		for range 20 {
			der := csr(t, newKey(t), "alice")
			wg.Go(func() {
				if _, err := s.do(request{Op: opEnrol, Name: "alice", Device: "mac", Seconds: 3600, Request: der}, Everything); err != nil {
					t.Error(err)
				}
			})
		}
	}
	wg.Wait()
	list, err := record{b.keys}.read("alice")
	if err != nil || len(list) != 40 {
		t.Errorf("%d certificates on record, want 40: %v", len(list), err)
	}
}

func TestEnrolmentsAreBounded(t *testing.T) {
	b := newBench(t)
	der := csr(t, newKey(t), "alice")
	for _, req := range []request{
		{Op: opEnrol, Name: "Alice", Device: "mac", Seconds: 60, Request: der},
		{Op: opEnrol, Name: "alice", Device: "../mac", Seconds: 60, Request: der},
		{Op: opEnrol, Name: "alice", Device: "mac", Seconds: 0, Request: der},
		{Op: opEnrol, Name: "alice", Device: "mac", Seconds: -60, Request: der},
		{Op: opEnrol, Name: "alice", Device: "mac", Seconds: 1 << 62, Request: der},
		{Op: opEnrol, Name: "alice", Device: "mac", Seconds: maxSeconds, Request: der}, // past the CA's end
		{Op: opServer, ServerID: "xx", Host: "bastion", Request: der},
		{Op: opServer, ServerID: strings.Repeat("ab", 16), Request: der},
	} {
		_, err := b.do(req, Everything)
		wantCode(t, err, BadRequest)
	}
	if _, err := b.do(request{Op: opEnrol, Name: "alice", Device: "mac", Seconds: 60, Request: der}, Everything); err != nil {
		t.Fatal(err)
	}
	_, err := b.do(request{Op: opEnrol, Name: "alice", Device: "desk", Seconds: 60, Request: der}, Everything)
	wantCode(t, err, BadRequest) // a key has one certificate
}

func decodePEM(t testing.TB, text []byte) []byte {
	t.Helper()
	block, _ := pem.Decode(text)
	if block == nil {
		t.Fatal("no PEM")
	}
	return block.Bytes
}
