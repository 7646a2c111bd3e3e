package identity

import (
	"bytes"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"os"
	"strings"
	"testing"
	"time"
)

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
