package signer

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

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

// daemonUID and strangerUID are nobody's on Debian (policy, 9.2.2).
const (
	daemonUID   = 60195
	strangerUID = 60196
	socketVar   = "SIGNER_TEST_SOCKET"
)

func TestMain(m *testing.M) {
	if socket := os.Getenv(socketVar); socket != "" {
		os.Exit(askAs(socket))
	}
	os.Exit(m.Run())
}

// askAs is a process of another user: it exits with 0 where it may do everything, 1 to renew only, 2 nothing.
func askAs(socket string) int {
	key, err := identity.NewKey()
	if err != nil {
		return 3
	}
	der, err := identity.NewRequest(key, "mallory", "mac")
	if err != nil {
		return 3
	}
	c := NewClient(socket, func(uint32) bool { return true }, func() (*exec.Cmd, error) { return nil, errors.New("nobody listens") })
	if _, err := c.Enrol(context.Background(), "mallory", "mac", false, time.Hour, der.DER); err == nil {
		return 0
	}
	var refusal *Refusal
	if err := c.Forget(context.Background(), "mallory", ""); err == nil {
		return 1
	} else if errors.As(err, &refusal) && refusal.Code == Forbidden {
		return 2
	}
	return 3
}

func TestTheKernelSaysWhoAsks(t *testing.T) {
	b := newBench(t)
	// Others may pass through: not so through t.TempDir's parent.
	open, err := os.MkdirTemp("", "signer")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(open)
	if err := os.Chmod(open, 0o711); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(open, "s")
	ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: socket, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(socket, 0o666); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- b.Serve(ctx, ln, func(uid uint32) Rights { return map[uint32]Rights{0: Everything, daemonUID: Renewals}[uid] })
	}()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	self := filepath.Join(open, "test") // where every user may run it
	text, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(self, text, 0o755); err != nil {
		t.Fatal(err)
	}
	for uid, want := range map[uint32]int{0: 0, daemonUID: 1, strangerUID: 2} {
		cmd := exec.Command(self)
		cmd.Env = append(os.Environ(), socketVar+"="+socket)
		cmd.Dir = "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		out, err := cmd.CombinedOutput()
		if got := cmd.ProcessState.ExitCode(); got != want {
			t.Errorf("user %d got %d, want %d: %v %s", uid, got, want, err, out)
		}
	}
}

func TestAStalledCallerStopsNobody(t *testing.T) {
	b := newBench(t)
	socket := b.path("s")
	ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: socket, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- b.Serve(ctx, ln, func(uint32) Rights { return Everything }) }()
	dial := func() net.Conn {
		c, err := net.Dial("unixpacket", socket)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	for range callers - 1 {
		defer dial().Close() // and says nothing
	}
	for _, packet := range [][]byte{[]byte("hello"), make([]byte, 2*maxPacket)} {
		c := dial()
		if _, err := c.Write(packet); err != nil {
			t.Fatal(err)
		}
		answer := make([]byte, maxPacket)
		c.SetReadDeadline(time.Now().Add(time.Minute))
		n, err := c.Read(answer)
		if err != nil || !strings.Contains(string(answer[:n]), `"code":"bad_request"`) {
			t.Errorf("%q %v", answer[:n], err)
		}
		c.Close()
	}
	c := NewClient(socket, func(uint32) bool { return true }, func() (*exec.Cmd, error) { return nil, errors.New("nobody listens") })
	if _, err := c.Enrol(context.Background(), "alice", "mac", false, time.Hour, csr(t, newKey(t), "alice")); err != nil {
		t.Error(err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// serveEverybody is a signer on a socket that every user of this host may connect to, until the test ends.
func serveEverybody(t *testing.T, rights func(uid uint32) Rights) (socket string) {
	t.Helper()
	b := newBench(t)
	dir, err := os.MkdirTemp("", "signer-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket = filepath.Join(dir, "s")
	ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: socket, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Chmod(dir, 0o755), os.Chmod(socket, 0o666)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- b.Serve(ctx, ln, rights) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return socket
}

func TestAnotherUsersConnectionsKeepRootFromNothing(t *testing.T) {
	socket := serveEverybody(t, func(uint32) Rights { return Everything })
	connected := make(chan struct{})
	var idle []net.Conn
	go func() {
		defer close(connected)
		runtime.LockOSThread() // and never unlocked: the thread is another user's now
		if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), 65534, ^uintptr(0)); e != 0 {
			t.Error(e)
			return
		}
		for range 2 * standing {
			if c, err := net.Dial("unixpacket", socket); err == nil {
				idle = append(idle, c)
			}
		}
	}()
	<-connected
	if len(idle) < callers {
		t.Fatalf("%d idle connections keep nobody waiting", len(idle))
	}
	c := NewClient(socket, func(uint32) bool { return true }, func() (*exec.Cmd, error) { return nil, errors.New("nobody listens") })
	if _, err := c.Enrol(context.Background(), "alice", "mac", false, time.Hour, csr(t, newKey(t), "alice")); err != nil {
		t.Error(err)
	}
	for _, c := range idle {
		c.Close()
	}
}

func TestStrangersKeepTheDaemonFromNothing(t *testing.T) {
	socket := serveEverybody(t, func(uid uint32) Rights {
		if uid == daemonUID {
			return Renewals
		}
		return Nothing
	})
	become := func(uid uintptr) {
		for _, id := range []uintptr{0, uid} { // by root, who alone may be anybody
			if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), id, ^uintptr(0)); e != 0 {
				t.Error(e)
			}
		}
	}
	asked := make(chan struct{})
	go func() {
		defer close(asked)
		runtime.LockOSThread() // and never unlocked: the thread is another user's now
		ask := func() error {
			c := NewClient(socket, func(uint32) bool { return true }, func() (*exec.Cmd, error) { return nil, errors.New("nobody listens") })
			return c.Forget(context.Background(), "alice", "")
		}
		become(strangerUID)
		wantCode(t, ask(), Forbidden)
		for i := range uintptr(2 * standing) { // each of them another
			become(100_000 + i)
			if c, err := net.Dial("unixpacket", socket); err == nil {
				defer c.Close()
			}
		}
		become(daemonUID)
		if err := ask(); err != nil {
			t.Error(err)
		}
	}()
	<-asked
}

// FuzzAnswer is a gate that was taken over: whatever it sends, no certificate comes back.
func FuzzAnswer(f *testing.F) {
	b := newBench(f)
	key, err := identity.NewKey()
	if err != nil {
		f.Fatal(err)
	}
	der := csr(f, key, "alice")
	cert, err := b.do(request{Op: opEnrol, Name: "alice", Device: "mac", Seconds: 3600, Request: der}, Everything)
	if err != nil {
		f.Fatal(err)
	}
	for _, req := range []request{
		{Op: opEnrol, Name: "alice", Device: "mac", Seconds: 3600, Request: der},
		{Op: opRenew, Certificate: cert.Raw, Request: der, Proof: []byte{1}},
		{Op: opForget, Name: "bob"},
	} {
		f.Add(mustJSON(f, req))
	}
	f.Fuzz(func(t *testing.T, packet []byte) {
		req, err := parse(packet)
		if err != nil {
			wantCode(t, err, BadRequest)
			return
		}
		if cert, err := b.do(req, Renewals); cert != nil || err == nil && req.Op != opForget {
			t.Errorf("%v, %v", cert, err)
		}
	})
}

func decodePEM(t testing.TB, text []byte) []byte {
	t.Helper()
	block, _ := pem.Decode(text)
	if block == nil {
		t.Fatal("no PEM")
	}
	return block.Bytes
}

func mustJSON(t testing.TB, v any) []byte {
	t.Helper()
	text, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// A daemon that was taken over listens in the signer's place.
func TestOthersAtTheSignersSocketAreNotAsked(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: socket, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	asked := make(chan error, 1)
	go func() {
		c, err := ln.AcceptUnix()
		if err == nil {
			_, err = c.Read(make([]byte, 1))
			c.Close()
		}
		asked <- err
	}()
	c := NewClient(socket, func(uid uint32) bool { return int(uid) != os.Geteuid() }, func() (*exec.Cmd, error) { return nil, errors.New("nobody listens") })
	if err := c.Forget(context.Background(), "alice", ""); err == nil || !strings.Contains(err.Error(), "who is not the signer") {
		t.Error(err)
	}
	if err := <-asked; !errors.Is(err, io.EOF) {
		t.Errorf("it was asked: %v", err)
	}
}

// Its answer for another key is no answer.
func TestAnswerForAnotherKeyIsRefused(t *testing.T) {
	b := newBench(t)
	other, err := b.ca.SignClient(newKey(t).Public(), "alice", "mac", b.clock.Add(time.Hour), b.clock)
	if err != nil {
		t.Fatal(err)
	}
	socket := b.path("s")
	ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: socket, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		c, err := ln.AcceptUnix()
		if err != nil {
			return
		}
		defer c.Close()
		c.Read(make([]byte, maxPacket))
		c.Write(mustJSON(t, reply{Certificate: other.Raw}))
	}()
	c := NewClient(socket, func(uint32) bool { return true }, func() (*exec.Cmd, error) { return nil, errors.New("nobody listens") })
	if _, err := c.Enrol(context.Background(), "alice", "mac", false, time.Hour, csr(t, newKey(t), "alice")); err == nil || !strings.Contains(err.Error(), "for another key") {
		t.Error(err)
	}
}
