package identity

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"fmt"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
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

func TestCRLRevokesAndItsAbsenceCloses(t *testing.T) {
	o := newOutside(t, true, true)
	o.swap(o.Allowed, []byte("CN=alice\nCN=bob\n"))
	alice, bob := o.client("CN=alice"), o.client("CN=bob")
	o.is(alice, NoCRL, "the gate has no CRL of its issuer CN=Example VPN CA")
	o.wantProblem(o.CRL+": no such file", o.CRL+": no CRL of CN=Example VPN CA: nobody comes in")

	o.swap(o.CRL, armored(list(t, o.ca, now, 4*week)))
	o.is(alice, "", "")
	o.is(bob, "", "")
	o.wantProblem()
	o.swap(o.CRL, list(t, o.ca, now, 4*week, bob)) // DER; the same second
	o.is(alice, "", "")
	o.is(bob, RevokedCert, "it was revoked by CN=Example VPN CA on "+now.UTC().Format(time.RFC3339))

	// What becomes of it with time.
	for _, step := range []struct {
		left time.Duration
		want string
	}{{week + time.Second, ""}, {week, "within a week"}, {25 * time.Hour, "within a week"}, {24 * time.Hour, "within a day"}, {time.Hour, "within an hour"}, {1, "within an hour"}} {
		o.clock = now.Add(4*week - step.left)
		if got := o.problems(); (got == "") != (step.want == "") || !strings.Contains(got, step.want) {
			t.Errorf("%v before its end: %q, want %q", step.left, got, step.want)
		}
		if soon := o.Problems(); step.want != "" && !soon[0].Soon {
			t.Error("it keeps nobody out yet")
		}
	}
	o.clock = now.Add(4 * week)
	// The clients' certificates have expired as well by then.
	late := issueRaw(t, o.ca, "alice", func(c *x509.Certificate) { c.NotAfter = now.Add(8 * week) })
	o.is(late, NoCRL, "the gate's CRL of its issuer CN=Example VPN CA expired on "+now.Add(4*week).UTC().Format(time.RFC3339))
	o.wantProblem(o.CRL + ": the CRL of CN=Example VPN CA expired on " + now.Add(4*week).UTC().Format(time.RFC3339) + ": nobody comes in with a certificate that it issued: write a new one there (easyrsa gen-crl)")
	o.swap(o.CRL, armored(list(t, o.ca, o.clock, 4*week)))
	o.is(late, "", "")
	o.wantProblem()
}

func TestAListThatIsWrittenAnewEveryDayIsNotAlwaysNearItsEnd(t *testing.T) {
	o := newOutside(t, true, false)
	o.swap(o.CRL, list(t, o.ca, now, 48*time.Hour))
	o.wantProblem()
	o.clock = now.Add(23 * time.Hour)
	o.wantProblem()
	o.clock = now.Add(24 * time.Hour)
	o.wantProblem("within a day")
	o.swap(o.CRL, list(t, o.ca, o.clock, time.Hour))
	o.wantProblem()
}

func TestBadCRLsAreNamedAndLeaveTheLastGoodOne(t *testing.T) {
	other, err := NewCA("another CA", now)
	if err != nil {
		t.Fatal(err)
	}
	twin, err := NewCA("Example VPN CA", now)
	if err != nil {
		t.Fatal(err)
	}
	o := newOutside(t, true, true)
	o.swap(o.Allowed, []byte("CN=alice\nCN=bob\n"))
	alice, bob := o.client("CN=alice"), o.client("CN=bob")
	good := list(t, o.ca, now, 4*week, bob)
	o.swap(o.CRL, armored(good))
	date := now.UTC().Format(time.RFC3339)
	goesOn := "that of CN=Example VPN CA of " + date + " goes on until " + now.Add(4*week).UTC().Format(time.RFC3339)
	unsigned := bytes.Clone(good)
	unsigned[len(unsigned)-1] ^= 1
	critical := pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 27}, Critical: true, Value: []byte{2, 1, 1}}
	entry := pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 29}, Critical: true, Value: []byte{0x30, 0}}
	for _, test := range []struct {
		name string
		data []byte
		want string
	}{
		{"empty", nil, "empty: write a CRL there"},
		{"truncated PEM", armored(good)[:300], "1 of 1 CRLs in it are cut short or damaged: write the file again"},
		{"truncated DER", good[:len(good)-1], "cut short, or no CRL in PEM or DER: write the file again"},
		{"nonsense", []byte("nonsense\n"), "cut short, or no CRL in PEM or DER"},
		{"a certificate", EncodeCertificate(o.ca.Certificate), `a PEM block "CERTIFICATE" where only CRLs belong: take it out`},
		{"a certificate, DER", o.ca.Certificate.Raw, "a CRL that cannot be read: "},
		{"another issuer", armored(list(t, other, now, week)), "the CRL of CN=another CA of " + date + " is from an issuer that identity.ca does not hold"},
		{"another's key", armored(list(t, twin, now, week)), "the CRL of CN=Example VPN CA of " + date + " is not signed by the CA of that name in identity.ca ("},
		{"unsigned", armored(unsigned), "is not signed by the CA of that name"},
		{"expired", armored(list(t, o.ca, now, time.Nanosecond)), "the CRL of CN=Example VPN CA of " + date + " expired already, on " + date + ": issue a new one"},
		{"older", armored(list(t, o.ca, now.Add(-time.Minute), 4*week)), "is older than the one in force, of " + date + ", which stays: write the newest there, or restart the daemon"},
		{"of the future", armored(list(t, o.ca, now.Add(time.Hour), 4*week)), "is of the future; it is "},
		{"a delta", armored(listWith(t, o.ca, &x509.RevocationList{ThisUpdate: now, NextUpdate: now.Add(week), ExtraExtensions: []pkix.Extension{critical}})),
			"has the critical extension 2.5.29.27, as partial lists have: issue a whole one"},
		{"an indirect one", armored(listWith(t, o.ca, &x509.RevocationList{ThisUpdate: now, NextUpdate: now.Add(week),
			RevokedCertificateEntries: []x509.RevocationListEntry{{SerialNumber: big.NewInt(7), RevocationTime: now, ExtraExtensions: []pkix.Extension{entry}}}})),
			"has an entry with the critical extension 2.5.29.29, as indirect lists have"},
	} {
		t.Run(test.name, func(t *testing.T) {
			o.t = t
			o.swap(o.CRL, test.data)
			o.wantProblem(o.CRL+": ", test.want, goesOn)
			o.is(alice, "", "")
			o.is(bob, RevokedCert, "")
			o.swap(o.CRL, armored(good))
			o.wantProblem()
		})
	}
	o.t = t

	// What is good of a file is taken, whatever else is wrong with it.
	o.clock = now.Add(time.Hour)
	o.swap(o.CRL, append(armored(list(t, o.ca, o.clock, week, alice, bob)), armored(good)[:200]...))
	o.is(alice, RevokedCert, "")
	o.wantProblem("1 of 2 CRLs in it are cut short or damaged")
}

func TestATornCRLHurtsNobodyAtAnyByte(t *testing.T) {
	o := newOutside(t, true, true)
	o.swap(o.Allowed, []byte("CN=alice\nCN=bob\n"))
	alice, bob := o.client("CN=alice"), o.client("CN=bob")
	o.swap(o.CRL, armored(list(t, o.ca, now, week)))
	next := list(t, o.ca, now, week, bob)
	for kind, data := range map[string][]byte{"PEM": armored(next), "DER": next} {
		for n := range len(data) {
			good, bad := parseCRLs(data[:n], o.external.authorities, now)
			// The last newline of the armor says nothing.
			if whole := len(bytes.TrimSpace(data[:n])) == len(bytes.TrimSpace(data)); whole == (len(bad) > 0) || whole == (len(good) == 0) {
				t.Fatalf("%s cut at %d of %d: %d good, %v", kind, n, len(data), len(good), bad)
			}
		}
	}
	// In place, a piece at a time: between two looks it changes, so it is not read.
	f, err := os.OpenFile(o.CRL, os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	data := armored(next)
	for i := 0; i < len(data); i += 100 {
		if _, err := f.Write(data[i:min(i+100, len(data))]); err != nil {
			t.Fatal(err)
		}
		o.external.look(now, false)
		if i < 200 {
			// A writer who stalls leaves half a file for any time.
			o.settle()
			o.wantProblem("cut short")
		}
		o.is(alice, "", "")
		o.is(bob, "", "")
	}
	o.settle()
	o.is(bob, RevokedCert, "")
	o.is(alice, "", "")
	o.wantProblem()
}

func TestWhileRotatingEachIssuerHasItsOwnCRL(t *testing.T) {
	old, err := NewCA("Example VPN CA", now.Add(-time.Hour)) // of the same name, with another key
	if err != nil {
		t.Fatal(err)
	}
	o := newOutside(t, true, true, old)
	o.swap(o.Allowed, []byte("CN=alice\nCN=bob\n"))
	ofOld := func(name string) *Issued { return issueRaw(t, old, name, func(*x509.Certificate) {}) }
	alice, bob, oldAlice, oldBob := o.client("CN=alice"), o.client("CN=bob"), ofOld("alice"), ofOld("bob")
	o.swap(o.CRL, armored(list(t, o.ca, now, week, bob)))
	o.is(alice, "", "")
	o.is(bob, RevokedCert, "")
	o.is(oldAlice, NoCRL, "")
	o.wantProblem("no CRL of CN=Example VPN CA")
	for _, data := range [][]byte{
		armored(list(t, o.ca, now, week, bob), list(t, old, now, week, oldBob)),
		append(list(t, o.ca, now, week, bob), list(t, old, now, week, oldBob)...),
	} {
		o.swap(o.CRL, data)
		o.wantProblem()
		o.is(alice, "", "")
		o.is(bob, RevokedCert, "")
		o.is(oldAlice, "", "")
		o.is(oldBob, RevokedCert, "")
	}
	// One of them expires: its issuer's users are out, the others are not.
	o.clock = now.Add(time.Minute)
	o.swap(o.CRL, armored(list(t, o.ca, o.clock, week), list(t, old, o.clock, 10*time.Minute)))
	o.clock = now.Add(20 * time.Minute)
	o.is(alice, "", "")
	o.is(oldAlice, NoCRL, "expired")
	if got := len(o.CRLs()); got != 2 {
		t.Errorf("%d CRLs in force", got)
	}
}

// subAuthority is one below o's.
func (o *outside) subAuthority(name string) *CA {
	o.t.Helper()
	sub, err := NewCA(name, now.Add(-time.Hour))
	if err != nil {
		o.t.Fatal(err)
	}
	template := *sub.Certificate
	template.SerialNumber, template.MaxPathLenZero, template.SignatureAlgorithm = serial(), false, 0
	parent := *o.ca.Certificate
	der, err := x509.CreateCertificate(rand.Reader, &template, &parent, sub.key.Public(), o.ca.key)
	if err != nil {
		o.t.Fatal(err)
	}
	if sub.Certificate, err = x509.ParseCertificate(der); err != nil {
		o.t.Fatal(err)
	}
	return sub
}

func TestARevokedAuthorityTakesItsUsersAlong(t *testing.T) {
	root, err := NewCA("root", now.Add(-time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	template := *root.Certificate
	template.MaxPathLenZero, template.MaxPathLen, template.SignatureAlgorithm = false, 1, 0
	der, err := x509.CreateCertificate(rand.Reader, &template, &template, root.key.Public(), root.key)
	if err != nil {
		t.Fatal(err)
	}
	if root.Certificate, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	sub := (&outside{t: t, ca: root}).subAuthority("sub")
	for name, trusted := range map[string][]*CA{"root": {root}, "both": {root, sub}} {
		o := newOutside(t, true, false, trusted...)
		if _, err := o.users.Add(Enrolment{Name: "alice"}, now); err != nil {
			t.Fatal(err)
		}
		alice := issueRaw(t, sub, "alice", func(*x509.Certificate) {})
		st := state(t, alice)
		st.PeerCertificates = append(st.PeerCertificates, sub.Certificate)
		own, ofRoot, ofSub := list(t, o.ca, now, week), list(t, root, now, week), list(t, sub, now, week)
		o.swap(o.CRL, armored(own, ofRoot, ofSub))
		id, err := o.Identify(st)
		if name == "root" {
			wantRefusal(t, err, NoCRL) // of sub, which is not in the bundle, no CRL can be checked
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if _, err := o.Again(id.Chain); err != nil {
			t.Fatal(err)
		}
		subIssued := &Issued{Certificate: EncodeCertificate(sub.Certificate)}
		o.swap(o.CRL, armored(own, list(t, root, now, week, subIssued), ofSub))
		_, err = o.Identify(st)
		wantRefusal(t, err, RevokedCert)
		if !strings.Contains(err.Error(), "the authority CN=sub above it was revoked by CN=root") {
			t.Error(err)
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

func TestFollowTellsEachChangeOnce(t *testing.T) {
	o := newOutside(t, true, true)
	o.swap(o.Allowed, []byte("CN=alice\n"))
	var b bytes.Buffer
	log, calls := slog.New(slog.NewTextHandler(&b, nil)), 0
	var f follower
	step := func(wantCalls int, want ...string) {
		t.Helper()
		b.Reset()
		calls = 0
		f.step(o.Verifier, log, func() { calls++ })
		lines := strings.Split(strings.TrimSuffix(b.String(), "\n"), "\n")
		if b.Len() == 0 {
			lines = nil
		}
		if calls != wantCalls || len(lines) != len(want) {
			t.Fatalf("%d calls, want %d; %d lines, want %d:\n%s", calls, wantCalls, len(lines), len(want), b.String())
		}
		for i := range want {
			if !strings.Contains(lines[i], want[i]) {
				t.Fatalf("line %q, want %q", lines[i], want[i])
			}
		}
	}
	step(1, "allowed list in force", "level=ERROR msg=\"problem of an identity file\" err=\""+o.CRL+": no such file", "no CRL of CN=Example VPN CA")
	step(0)
	o.swap(o.CRL, list(t, o.ca, now, 4*week))
	step(1, "level=INFO msg=\"CRL in force\" file="+o.CRL+" issuer=\"CN=Example VPN CA\"", "identity files are in order again")
	step(0)
	for _, at := range []struct {
		left time.Duration
		want string
	}{{week, "level=WARN msg=\"problem of an identity file\" err=\"" + o.CRL + ": the CRL of CN=Example VPN CA expires within a week"}, {24 * time.Hour, "within a day"}, {time.Hour, "within an hour"}} {
		o.clock = now.Add(4*week - at.left)
		step(0, at.want)
		step(0)
	}
	o.clock = now.Add(4 * week)
	step(1, "level=ERROR") // whoever is inside must be looked at
	step(0)
	o.swap(o.CRL, list(t, o.ca, o.clock, 4*week))
	step(1, "CRL in force", "in order again")
	o.write(o.CRL, []byte("torn"))
	o.settle()
	step(0, "cut short")
	o.swap(o.Allowed, []byte("CN=bob\n"))
	step(1, "allowed list in force")
}

func TestFollowActsWithinASecondAndEndsWithItsContext(t *testing.T) {
	o := newOutside(t, false, true)
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		calls, done := make(chan struct{}, 10), make(chan error)
		go func() { done <- o.Follow(ctx, slog.New(slog.DiscardHandler), func() { calls <- struct{}{} }) }()
		<-calls
		o.write(o.Allowed, []byte("CN=alice\n"))
		began := time.Now()
		<-calls
		if took := time.Since(began); took > time.Second {
			t.Errorf("after %v", took)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	f := newFixture(t)
	if err := f.Follow(context.Background(), slog.New(slog.DiscardHandler), nil); err != nil || f.Problems() != nil || f.CRLs() != nil || f.Listed("alice") {
		t.Error("the built-in authority has files to follow")
	}
}

// A file that was bad for a reason outside it is read again by and by.
func TestACRLOfTheFutureIsTakenUpWhenItsTimeComes(t *testing.T) {
	o := newOutside(t, true, false)
	o.swap(o.CRL, list(t, o.ca, now.Add(time.Hour), week))
	o.wantProblem("is of the future")
	o.clock = now.Add(time.Hour)
	o.settle()
	o.wantProblem()
}

func FuzzCRLs(f *testing.F) {
	ca, err := NewCA("CA", now)
	if err != nil {
		f.Fatal(err)
	}
	der, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: now, NextUpdate: now.Add(week),
		RevokedCertificateEntries: []x509.RevocationListEntry{{SerialNumber: big.NewInt(7), RevocationTime: now}}}, ca.Certificate, ca.key)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(der)
	f.Add(armored(der, der))
	f.Add(append(der, der...))
	f.Add([]byte("-----BEGIN X509 CRL-----\nMAA=\n-----END X509 CRL-----\n"))
	authorities := []*x509.Certificate{ca.Certificate}
	f.Fuzz(func(t *testing.T, data []byte) {
		good, bad := parseCRLs(data, authorities, now)
		if len(good) == 0 && len(bad) == 0 {
			t.Fatal("neither a CRL nor an error")
		}
		for _, c := range good {
			// Only the key could have signed another.
			if c.revoked["07"].IsZero() || len(c.revoked) != 1 {
				t.Fatalf("%+v", c)
			}
		}
	})
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
