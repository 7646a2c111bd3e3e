package identity

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"perimeterd/internal/statefile"
)

var now = time.Now().Truncate(time.Second)

type fixture struct {
	dir   string
	ca    *CA
	db    *statefile.DB
	users *Users
	clock time.Time
	*Verifier
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	f := &fixture{dir: t.TempDir(), clock: now}
	var err error
	if f.ca, err = NewCA("test CA", now); err != nil {
		t.Fatal(err)
	}
	if err := f.ca.Save(f.path("pki/ca.crt"), f.path("pki/ca.key")); err != nil {
		t.Fatal(err)
	}
	f.db = openState(t, f.path("state.db"))
	f.users = NewUsers(f.db)
	f.Verifier, err = NewVerifier(f.path("pki/ca.crt"), f.users, func() time.Time { return f.clock })
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func (f *fixture) path(name string) string { return filepath.Join(f.dir, name) }

func openState(t testing.TB, path string) *statefile.DB {
	t.Helper()
	db, err := OpenState(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

// enrol issues a certificate and enters it.
func (f *fixture) enrol(t *testing.T, user, device string) *Issued {
	t.Helper()
	is, err := f.ca.IssueClient(user, device, 90*24*time.Hour, now)
	if err != nil {
		t.Fatal(err)
	}
	f.enter(t, user, device, is)
	return is
}

func (f *fixture) enter(t *testing.T, user, device string, is *Issued) User {
	t.Helper()
	u, err := f.users.Add(Enrolment{Name: user, Device: device, Key: is.KeyHash, NotAfter: is.NotAfter}, now)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// issueRaw signs what IssueClient never would.
func issueRaw(t testing.TB, ca *CA, user string, edit func(*x509.Certificate)) *Issued {
	t.Helper()
	template := &x509.Certificate{
		Subject:     pkix.Name{CommonName: user},
		NotAfter:    now.Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	edit(template)
	is, err := issue(func(key crypto.PublicKey) (*x509.Certificate, error) { return ca.sign(template, key, now) })
	if err != nil {
		t.Fatal(err)
	}
	return is
}

func state(t testing.TB, is *Issued) tls.ConnectionState {
	t.Helper()
	block, _ := pem.Decode(is.Certificate)
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return tls.ConnectionState{PeerCertificates: []*x509.Certificate{c}}
}

func wantRefusal(t testing.TB, err error, code Code) {
	t.Helper()
	var r *Refusal
	if !errors.As(err, &r) || r.Code != code {
		t.Fatalf("error %v, want a refusal %q", err, code)
	}
}

func TestCertificateOfAKnownUserIsHim(t *testing.T) {
	f := newFixture(t)
	is, err := f.ca.IssueClient("alice", "mac", time.Hour, now)
	if err != nil {
		t.Fatal(err)
	}
	u, err := f.users.Add(Enrolment{Name: "alice", Groups: []string{"operators"}, Device: "mac", Key: is.KeyHash, NotAfter: is.NotAfter}, now)
	if err != nil {
		t.Fatal(err)
	}
	id, err := f.Identify(state(t, is))
	if err != nil {
		t.Fatal(err)
	}
	if id.User != "alice" || id.Device != "mac" || len(id.Groups) != 1 || id.Groups[0] != "operators" ||
		id.Credential != u.Credential || id.Certificate != is.KeyHash || !id.NotAfter.Equal(is.NotAfter) {
		t.Fatalf("identity %+v", id)
	}
}

func TestRefusals(t *testing.T) {
	f := newFixture(t)
	good := f.enrol(t, "alice", "mac")
	otherCA, err := NewCA("test CA", now)
	if err != nil {
		t.Fatal(err)
	}
	entered := func(user string, ca *CA, edit func(*x509.Certificate)) *Issued {
		is := issueRaw(t, ca, user, edit)
		f.enter(t, user, "default", is)
		return is
	}
	stranger, err := f.ca.IssueClient("bob", "mac", time.Hour, now)
	if err != nil {
		t.Fatal(err)
	}
	second, err := f.ca.IssueClient("alice", "mac", time.Hour, now)
	if err != nil {
		t.Fatal(err)
	}
	revokedUser := f.enrol(t, "carol", "mac")
	if _, err := f.users.Revoke("carol", "", now); err != nil {
		t.Fatal(err)
	}
	revokedDevice, otherDevice := f.enrol(t, "dave", "mac"), f.enrol(t, "dave", "desk")
	if _, err := f.users.Revoke("dave", "mac", now); err != nil {
		t.Fatal(err)
	}
	foreign := entered("erin", otherCA, func(*x509.Certificate) {})
	tests := []struct {
		name string
		is   *Issued
		at   time.Time
		code Code // empty: accepted
	}{
		{"good", good, now, ""},
		{"other authority of the same name, key entered", foreign, now, UnknownCA},
		{"no extended key usage", entered("f1", f.ca, func(c *x509.Certificate) { c.ExtKeyUsage = nil }), now, NoClientAuth},
		{"any extended key usage", entered("f2", f.ca, func(c *x509.Certificate) {
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageAny}
		}), now, NoClientAuth},
		{"any beside clientAuth", entered("f3", f.ca, func(c *x509.Certificate) {
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageAny}
		}), now, NoClientAuth},
		{"server certificate", entered("f4", f.ca, func(c *x509.Certificate) {
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		}), now, NoClientAuth},
		{"last second", good, good.NotAfter, ""},
		{"expired", good, good.NotAfter.Add(time.Second), Expired},
		{"not yet valid", good, now.Add(-2 * backdate), NotYetValid},
		{"unknown user", stranger, now, UnknownUser},
		{"second certificate that nobody entered", second, now, UnknownKey},
		{"known user, other letter case", issueRaw(t, f.ca, "Alice", func(*x509.Certificate) {}), now, UnknownUser},
		{"no name", issueRaw(t, f.ca, "", func(*x509.Certificate) {}), now, UnknownUser},
		{"revoked user", revokedUser, now, RevokedCert},
		{"revoked device", revokedDevice, now, RevokedCert},
		{"the same user's other device", otherDevice, now, ""},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			f.clock = test.at
			_, err := f.Identify(state(t, test.is))
			if test.code == "" {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			wantRefusal(t, err, test.code)
		})
	}
	_, err = f.Identify(tls.ConnectionState{})
	wantRefusal(t, err, NoCertificate)
	f.clock = now
	f.db.Close()
	_, err = f.Identify(state(t, good))
	wantRefusal(t, err, StateFailed)
}

func TestReaddedUserKeepsHisCredentialAndNoneOfHisCertificates(t *testing.T) {
	f := newFixture(t)
	old := f.enrol(t, "alice", "mac")
	before, _ := f.users.Get("alice")
	if _, err := f.users.Revoke("alice", "", now); err != nil {
		t.Fatal(err)
	}
	fresh := f.enrol(t, "alice", "mac")
	after, err := f.users.Get("alice")
	if err != nil {
		t.Fatal(err)
	}
	if after.Credential != before.Credential || after.Epoch != before.Epoch+1 || !after.Active() {
		t.Fatalf("before %+v, after %+v", before, after)
	}
	_, err = f.Identify(state(t, old))
	wantRefusal(t, err, RevokedCert)
	if _, err := f.Identify(state(t, fresh)); err != nil {
		t.Fatal(err)
	}
}

// The gate's listener and a client, over TCP.
func TestHandshakeLetsOnlyUsersIn(t *testing.T) {
	f := newFixture(t)
	alice := f.enrol(t, "alice", "mac")
	stranger, err := f.ca.IssueClient("bob", "mac", time.Hour, now)
	if err != nil {
		t.Fatal(err)
	}
	const id = "00112233445566778899aabbccddeeff"
	gate, err := f.ca.IssueServer(id, "bastion.example.com", now)
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.X509KeyPair(gate.Certificate, gate.Key)
	if err != nil {
		t.Fatal(err)
	}
	ln, err := tls.Listen("tcp", "127.0.0.1:0", f.TLSConfig(pair))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				if c.(*tls.Conn).Handshake() == nil {
					c.Write([]byte("in"))
				}
			}()
		}
	}()
	roots := x509.NewCertPool()
	roots.AddCert(f.ca.Certificate)
	dial := func(serverName string, is *Issued) error {
		cfg := &tls.Config{RootCAs: roots, ServerName: serverName}
		if is != nil {
			c, err := tls.X509KeyPair(is.Certificate, is.Key)
			if err != nil {
				return err
			}
			cfg.Certificates = []tls.Certificate{c}
		}
		c, err := tls.DialWithDialer(&net.Dialer{Timeout: 5 * time.Second}, "tcp", ln.Addr().String(), cfg)
		if err != nil {
			return err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(5 * time.Second))
		buf := make([]byte, 2)
		if _, err := c.Read(buf); err != nil {
			return err
		}
		if c.ConnectionState().CurveID != tls.X25519MLKEM768 {
			return fmt.Errorf("key exchange %v is not post-quantum", c.ConnectionState().CurveID)
		}
		return nil
	}
	for _, name := range []string{id, "bastion.example.com"} {
		if err := dial(name, alice); err != nil {
			t.Fatalf("a user, server name %s: %v", name, err)
		}
	}
	for name, is := range map[string]*Issued{"nobody": nil, "a stranger": stranger, "the gate's own certificate": gate} {
		if err := dial(id, is); err == nil {
			t.Errorf("%s came in", name)
		}
	}
	if err := dial("elsewhere.example.com", alice); err == nil {
		t.Error("the gate passes for another name")
	}
	if _, err := f.users.Revoke("alice", "mac", now); err != nil {
		t.Fatal(err)
	}
	if err := dial(id, alice); err == nil {
		t.Error("a revoked device came in")
	}
}

func TestCAFilesKeepTheirSecrets(t *testing.T) {
	f := newFixture(t)
	for name, want := range map[string]fs.FileMode{"pki": 0o700 | fs.ModeDir, "pki/ca.key": 0o600, "pki/ca.crt": 0o644, "state.db": 0o600} {
		st, err := os.Stat(f.path(name))
		if err != nil {
			t.Fatal(err)
		}
		if st.Mode() != want {
			t.Errorf("%s has mode %v, want %v", name, st.Mode(), want)
		}
	}
	before, _ := os.ReadFile(f.path("pki/ca.key"))
	if err := f.ca.Save(f.path("pki/ca.crt"), f.path("pki/ca.key")); !errors.Is(err, fs.ErrExist) {
		t.Fatalf("a second Save: %v, want fs.ErrExist", err)
	}
	if after, _ := os.ReadFile(f.path("pki/ca.key")); string(after) != string(before) {
		t.Fatal("the key was overwritten")
	}
	left, err := filepath.Glob(f.path("pki/.*"))
	if err != nil || len(left) > 0 {
		t.Fatalf("temporary files stay: %v %v", left, err)
	}
	certs, err := os.ReadFile(f.path("pki/ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	loaded, err := ParseCA(certs, before)
	if err != nil {
		t.Fatal(err)
	}
	is, err := loaded.IssueClient("alice", "mac", time.Hour, now)
	if err != nil {
		t.Fatal(err)
	}
	f.enter(t, "alice", "mac", is)
	if _, err := f.Identify(state(t, is)); err != nil {
		t.Fatal(err)
	}
	other, _ := NewCA("other", now)
	if err := other.Save(f.path("other/ca.crt"), f.path("other/ca.key")); err != nil {
		t.Fatal(err)
	}
	others, err := os.ReadFile(f.path("other/ca.key"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ParseCA(certs, others); err == nil || !strings.Contains(err.Error(), "no certificate of the CA belongs to its key") {
		t.Fatalf("ParseCA with another's key: %v", err)
	}
}

func TestIssuedCertificateMayBeAClientOnly(t *testing.T) {
	f := newFixture(t)
	is, err := f.ca.IssueClient("alice", "mac", time.Hour, now)
	if err != nil {
		t.Fatal(err)
	}
	c := state(t, is).PeerCertificates[0]
	if c.Subject.String() != "CN=alice,OU=mac" || c.IsCA || c.KeyUsage != x509.KeyUsageDigitalSignature ||
		len(c.ExtKeyUsage) != 1 || c.ExtKeyUsage[0] != x509.ExtKeyUsageClientAuth || len(c.UnknownExtKeyUsage) > 0 {
		t.Fatalf("subject %v, CA %v, usage %v, extended %v", c.Subject, c.IsCA, c.KeyUsage, c.ExtKeyUsage)
	}
	if c.PublicKey.(*ecdsa.PublicKey).Curve.Params().Name != "P-256" {
		t.Fatal("not P-256")
	}
	for _, bad := range []struct {
		user, device string
		valid        time.Duration
		want         string
	}{
		{"Alice", "mac", time.Hour, `user "Alice": not a name: want 1 to 64 of a-z 0-9 . _ - with a letter or digit first`},
		{"alice", "../mac", time.Hour, `device "../mac": not a name: want 1 to 64 of a-z 0-9 . _ - with a letter or digit first`},
		{strings.Repeat("a", 65), "mac", time.Hour, "not a name"},
		{"alice\n", "mac", time.Hour, "not a name"},
		{"", "mac", time.Hour, "not a name"},
		{"alice", "mac", 0, "validity 0s of a certificate: want more than nothing"},
		{"alice", "mac", 2 * CAValidity, "is past the CA's own end on"},
	} {
		if _, err := f.ca.IssueClient(bad.user, bad.device, bad.valid, now); err == nil || !strings.Contains(err.Error(), bad.want) {
			t.Errorf("IssueClient(%q, %q, %v): %v, want %q", bad.user, bad.device, bad.valid, err, bad.want)
		}
	}
}
