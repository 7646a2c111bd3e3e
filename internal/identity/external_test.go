package identity

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"perimeterd/internal/statefile"
)

// outside is an external authority's gate.
type outside struct {
	t     testing.TB
	ca    *CA
	db    *statefile.DB
	users *Users
	clock time.Time
	External
	*Verifier
}

// newOutside trusts authorities; which files there are the caller says. They do not exist yet.
func newOutside(t testing.TB, crl, allowed bool, more ...*CA) *outside {
	t.Helper()
	ca, err := NewCA("Example VPN CA", now.Add(-365*24*time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	o := &outside{t: t, ca: ca, db: openState(t, filepath.Join(dir, "state.db")), clock: now}
	o.users = NewUsers(o.db)
	if crl {
		o.CRL = filepath.Join(dir, "crl.pem")
	}
	if allowed {
		o.Allowed = filepath.Join(dir, "allowed")
	}
	var bundle []byte
	for _, ca := range append([]*CA{ca}, more...) {
		bundle = append(bundle, EncodeCertificate(ca.Certificate)...)
	}
	o.write(filepath.Join(dir, "ca.crt"), bundle)
	o.Verifier, err = NewExternalVerifier(filepath.Join(dir, "ca.crt"), o.External, o.users, func() time.Time { return o.clock })
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func (o *outside) write(path string, data []byte) {
	o.t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		o.t.Fatal(err)
	}
}

// swap replaces a file as it should be done, and lets the verifier see it.
func (o *outside) swap(path string, data []byte) {
	o.t.Helper()
	o.write(path+".new", data)
	if err := os.Rename(path+".new", path); err != nil {
		o.t.Fatal(err)
	}
	o.settle()
}

// settle is as many looks as a change takes.
func (o *outside) settle() {
	o.external.look(o.clock, false)
	o.external.look(o.clock, false)
}

// client issues a certificate that the store does not know.
func (o *outside) client(subject string, edit ...func(*x509.Certificate)) *Issued {
	o.t.Helper()
	return issueRaw(o.t, o.ca, "", func(c *x509.Certificate) {
		d, _, err := parseDN(subject)
		if err != nil {
			o.t.Fatal(err)
		}
		var seq pkix.RDNSequence
		for _, part := range d {
			var set pkix.RelativeDistinguishedNameSET
			for _, a := range part {
				var oid asn1.ObjectIdentifier
				for n := range strings.SplitSeq(a.oid, ".") {
					i, _ := new(big.Int).SetString(n, 10)
					oid = append(oid, int(i.Int64()))
				}
				set = append(set, pkix.AttributeTypeAndValue{Type: oid, Value: a.value})
			}
			seq = append(seq, set)
		}
		if c.RawSubject, err = asn1.Marshal(seq); err != nil {
			o.t.Fatal(err)
		}
		for _, e := range edit {
			e(c)
		}
	})
}

func (o *outside) is(is *Issued, code Code, text string) {
	o.t.Helper()
	_, err := o.Identify(state(o.t, is))
	switch {
	case code == "" && err != nil:
		o.t.Fatal("refused: ", err)
	case code != "":
		wantRefusal(o.t, err, code)
		if !strings.Contains(err.Error(), text) {
			o.t.Fatalf("%v; want %q", err, text)
		}
	}
}

// list signs a CRL, DER.
func list(t testing.TB, ca *CA, from time.Time, life time.Duration, revoked ...*Issued) []byte {
	return listWith(t, ca, &x509.RevocationList{ThisUpdate: from, NextUpdate: from.Add(life)}, revoked...)
}

func listWith(t testing.TB, ca *CA, l *x509.RevocationList, revoked ...*Issued) []byte {
	t.Helper()
	l.Number = big.NewInt(1)
	for _, is := range revoked {
		l.RevokedCertificateEntries = append(l.RevokedCertificateEntries,
			x509.RevocationListEntry{SerialNumber: state(t, is).PeerCertificates[0].SerialNumber, RevocationTime: l.ThisUpdate})
	}
	der, err := x509.CreateRevocationList(rand.Reader, l, ca.Certificate, ca.key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func armored(ders ...[]byte) (text []byte) {
	for _, der := range ders {
		text = append(text, "a line of openssl -text\n"...)
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der})...)
	}
	return text
}

func (o *outside) problems() string {
	var all []string
	for _, p := range o.Problems() {
		all = append(all, p.Text)
	}
	return strings.Join(all, "\n")
}

func (o *outside) wantProblem(texts ...string) {
	o.t.Helper()
	got := o.problems()
	for _, text := range texts {
		if !strings.Contains(got, text) {
			o.t.Fatalf("problems %q, want %q", got, text)
		}
	}
	if len(texts) == 0 && got != "" {
		o.t.Fatalf("problems %q, want none", got)
	}
}

const week = 7 * 24 * time.Hour

func TestWithoutAListTheStoreSaysByNameWhoComesIn(t *testing.T) {
	o := newOutside(t, false, false)
	alice, bob := o.client("CN=alice,O=x"), o.client("CN=bob")
	o.is(alice, UnknownUser, "no user of this gate has that name")
	u, err := o.users.Add(Enrolment{Name: "alice", Groups: []string{"operators"}}, now)
	if err != nil {
		t.Fatal(err)
	}
	id, err := o.Identify(state(t, alice))
	if err != nil {
		t.Fatal(err)
	}
	leaf := state(t, alice).PeerCertificates[0]
	if id.User != "alice" || fmt.Sprint(id.Groups) != "[operators]" || id.Credential != u.Credential || id.Device != fmt.Sprintf("%x", leaf.SerialNumber.Bytes()) ||
		id.Certificate != alice.KeyHash || !id.NotAfter.Equal(leaf.NotAfter) || len(id.Chain) != 1 || !bytes.Equal(id.Chain[0], leaf.Raw) {
		t.Fatalf("%+v", id)
	}
	if again, err := o.Again(id.Chain); err != nil || again.User != "alice" || again.Certificate != id.Certificate {
		t.Fatalf("%+v %v", again, err)
	}
	o.is(bob, UnknownUser, "")
	if _, err := o.users.Add(Enrolment{Name: "alice"}, now); err == nil || !strings.Contains(err.Error(), `user "alice": exists already, in groups ["operators"]`) {
		t.Errorf("added twice: %v", err)
	}
	o.wantProblem()
}

func TestWithAListItSaysBySubjectWhoComesIn(t *testing.T) {
	o := newOutside(t, false, true)
	alice := o.client("CN=alice,O=x")
	o.is(alice, NotAllowed, `certificate of "alice": its subject "CN=alice,O=x" is not on the list`)
	o.wantProblem(o.Allowed + ": no such file: write it there, or name another in [identity]; until then nobody comes in")
	o.swap(o.Allowed, []byte("O=x, CN=alice\nCN=Alice\nCN=carol\n"))
	o.is(alice, "", "")
	id, _ := o.Identify(state(t, alice))
	if id.User != "alice" || len(id.Groups) != 0 || id.Credential != 0 {
		t.Errorf("%+v", id)
	}
	o.is(o.client("CN=alice"), NotAllowed, "")
	o.is(o.client("CN=alice,O=x,C=US"), NotAllowed, "")
	o.is(o.client(`CN=mallory,O=O=x\, CN=alice`), NotAllowed, "")
	o.is(o.client("CN=Alice"), BadName, `common name "Alice": not a name`)
	o.wantProblem(o.Allowed + `:2: nobody comes in by this line: common name "Alice": not a name`)
	if !o.Listed("alice") || !o.Listed("carol") || o.Listed("Alice") || o.Listed("bob") || o.Listed("") {
		t.Error("Listed is wrong")
	}

	// The store adds groups, and its revocation is above the list.
	if _, err := o.users.Add(Enrolment{Name: "alice", Groups: []string{"db"}}, now); err != nil {
		t.Fatal(err)
	}
	if id, err := o.Identify(state(t, alice)); err != nil || fmt.Sprint(id.Groups) != "[db]" || id.Credential == 0 {
		t.Errorf("%+v %v", id, err)
	}
	if _, err := o.users.Forbid("carol", now); err != nil {
		t.Fatal(err)
	}
	o.is(o.client("CN=carol"), RevokedCert, "the user was revoked")
	if _, err := o.users.Forbid("alice", now); err == nil || !strings.Contains(err.Error(), ErrUserExists.Error()) {
		t.Errorf("a known user was entered as new: %v", err)
	}
	if _, err := o.users.Forbid("Not A Name", now); err == nil {
		t.Error("a bad name was entered")
	}
	// The store does not open what the list does not.
	if _, err := o.users.Add(Enrolment{Name: "dave"}, now); err != nil {
		t.Fatal(err)
	}
	o.is(o.client("CN=dave"), NotAllowed, "")

	// Off the list.
	o.swap(o.Allowed, []byte("CN=carol\n"))
	o.is(alice, NotAllowed, "")
	o.swap(o.Allowed, nil)
	o.wantProblem(o.Allowed + ": no subject in it: nobody comes in")
}

func TestABadListLeavesTheLastGoodOne(t *testing.T) {
	o := newOutside(t, false, true)
	o.swap(o.Allowed, []byte("CN=alice\n"))
	alice := o.client("CN=alice")
	o.is(alice, "", "")
	o.swap(o.Allowed, []byte("CN=bob\nnonsense\n"))
	o.is(alice, "", "")
	o.is(o.client("CN=bob"), NotAllowed, "")
	o.wantProblem(o.Allowed + `:2: "nonsense" is no TYPE=VALUE`)
	o.wantProblem("; until then the last good list goes on")
	if err := os.Remove(o.Allowed); err != nil {
		t.Fatal(err)
	}
	o.settle()
	o.is(alice, "", "")
	o.wantProblem("no such file")
	o.swap(o.Allowed, []byte("CN=bob\n"))
	o.is(alice, NotAllowed, "")
	o.wantProblem()
	if err := os.Remove(o.Allowed); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(o.Allowed, 0o700); err != nil {
		t.Fatal(err)
	}
	o.settle()
	o.wantProblem("not a file")
	o.is(o.client("CN=bob"), "", "")
}

func TestOnlyWhoIsPlainlyAClientOfThisAuthorityComesIn(t *testing.T) {
	o := newOutside(t, false, true)
	o.swap(o.Allowed, []byte("CN=alice\nCN=alice+CN=bob\nCN=alice, CN=alice\nO=x\n"))
	usage := func(u ...x509.ExtKeyUsage) func(*x509.Certificate) {
		return func(c *x509.Certificate) { c.ExtKeyUsage = u }
	}
	o.is(o.client("CN=alice"), "", "")
	o.is(o.client("CN=alice", usage()), NoClientAuth, "")
	o.is(o.client("CN=alice", usage(x509.ExtKeyUsageAny)), NoClientAuth, "")
	o.is(o.client("CN=alice", usage(x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageAny)), NoClientAuth, "")
	o.is(o.client("CN=alice", usage(x509.ExtKeyUsageServerAuth)), NoClientAuth, "")
	o.is(o.client("CN=alice+CN=bob"), BadName, `its subject has 2 common names`)
	o.is(o.client("CN=alice,CN=alice"), BadName, `its subject has 2 common names ["alice" "alice"]`)
	o.is(o.client("O=x"), BadName, "its subject has 0 common names")
	other, err := NewCA("Example VPN CA", now)
	if err != nil {
		t.Fatal(err)
	}
	o.is(issueRaw(t, other, "alice", func(*x509.Certificate) {}), UnknownCA, "")
	o.clock = now.Add(2 * time.Hour)
	o.is(o.client("CN=alice"), Expired, "")
}

// Who is let in again after he was revoked gets none of his old certificates back: the store does not know them, but their
// date does.
func TestReaddedUserOfAnExternalAuthorityNeedsANewCertificate(t *testing.T) {
	o := newOutside(t, false, false)
	before := o.client("CN=alice")
	if _, err := o.users.Add(Enrolment{Name: "alice"}, now); err != nil {
		t.Fatal(err)
	}
	o.is(before, "", "")
	if _, err := o.users.Revoke("alice", "", now.Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	o.is(before, RevokedCert, "the user was revoked")
	u, err := o.users.Add(Enrolment{Name: "alice", Groups: []string{"db"}}, now.Add(2*time.Minute))
	if err != nil || !u.Barred.Equal(now.Add(time.Minute)) || u.Epoch != 1 {
		t.Fatalf("%+v %v", u, err)
	}
	o.is(before, RevokedCert, "before its user was revoked on "+u.Barred.Format(time.RFC3339))
	o.clock = now.Add(2 * backdate)
	after, err := issue(func(key crypto.PublicKey) (*x509.Certificate, error) {
		return o.ca.SignClient(key, "alice", "mac", now.Add(week), now.Add(backdate+2*time.Minute))
	})
	if err != nil {
		t.Fatal(err)
	}
	o.is(after, "", "")
}

// A device that was entered here, as before the authority became another's, stays what it is.
func TestDevicesOfTheStoreAreHonouredWithAnExternalAuthority(t *testing.T) {
	o := newOutside(t, false, false)
	mac, desk := o.client("CN=alice"), o.client("CN=alice")
	for name, is := range map[string]*Issued{"mac": mac, "desk": desk} {
		if _, err := o.users.Add(Enrolment{Name: "alice", Device: name, Key: is.KeyHash, NotAfter: is.NotAfter}, now); err != nil {
			t.Fatal(err)
		}
	}
	if id, err := o.Identify(state(t, mac)); err != nil || id.Device != "mac" {
		t.Errorf("%+v %v", id, err)
	}
	if _, err := o.users.Revoke("alice", "mac", now); err != nil {
		t.Fatal(err)
	}
	o.is(mac, RevokedCert, `the device "mac" was revoked`)
	o.is(desk, "", "")
}

func TestANameAloneLetsNobodyInWithTheBuiltInAuthority(t *testing.T) {
	f := newFixture(t)
	if _, err := f.users.Add(Enrolment{Name: "alice"}, now); err != nil {
		t.Fatal(err)
	}
	is, err := f.ca.IssueClient("alice", "mac", time.Hour, now)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.Identify(state(t, is))
	wantRefusal(t, err, UnknownKey)
	// A half of the rest is no name alone.
	for _, e := range []Enrolment{{Name: "bob", Device: "mac"}, {Name: "bob", Key: KeyHash{1}}, {Name: "bob", NotAfter: now.Add(time.Hour)}} {
		if _, err := f.users.Add(e, now); err == nil {
			t.Errorf("%+v was entered", e)
		}
	}
}

// An identity ends with the first certificate above it that expires.
func TestASessionDoesNotOutliveTheAuthority(t *testing.T) {
	o := newOutside(t, false, true)
	o.swap(o.Allowed, []byte("CN=alice\n"))
	end := o.ca.Certificate.NotAfter
	id, err := o.Identify(state(t, issueRaw(t, o.ca, "alice", func(c *x509.Certificate) { c.NotAfter = end.Add(time.Hour) })))
	if err != nil || !id.NotAfter.Equal(end) {
		t.Errorf("%v %v, want %v", id.NotAfter, err, end)
	}
}

func BenchmarkAgain(b *testing.B) {
	o := newOutside(b, true, true)
	o.swap(o.Allowed, []byte("CN=alice\n"))
	o.swap(o.CRL, list(b, o.ca, now, week))
	id, err := o.Identify(state(b, o.client("CN=alice")))
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := o.Again(id.Chain); err != nil {
			b.Fatal(err)
		}
	}
}
