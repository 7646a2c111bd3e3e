package identity

import (
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"
)

// name builds a dn: "CN=alice" is an attribute, a list of them a part of several.
func name(parts ...any) (d dn) {
	one := func(s string) attribute {
		t, v, _ := strings.Cut(s, "=")
		oid, err := oidOf(t)
		if err != nil {
			panic(err)
		}
		return attribute{oid, v}
	}
	for _, p := range parts {
		var part []attribute
		if s, ok := p.(string); ok {
			part = []attribute{one(s)}
		} else {
			for _, s := range p.([]string) {
				part = append(part, one(s))
			}
		}
		d = append(d, part)
	}
	return d
}

func TestSubjectsAreReadInTheFormsInWhichTheyArePrinted(t *testing.T) {
	full := name("C=US", "ST=CA", "L=San Francisco", "O=Copyleft Certificate Co", "OU=My Organizational Unit", "CN=alice", "emailAddress=me@example.net")
	comma := name("C=US", "O=Foo, Inc.", "CN=alice")
	utf := name("O=Jürgen & Söhne", "CN=jürgen")
	multi := name("O=x", []string{"CN=alice", "UID=7"})
	for _, test := range []struct {
		line string
		want dn
	}{
		// As OpenVPN 2.6's tls-verify gave them.
		{"C=US, ST=CA, L=San Francisco, O=Copyleft Certificate Co, OU=My Organizational Unit, CN=alice, emailAddress=me@example.net", full},
		{"C=US, O=Foo, Inc., CN=alice", comma},
		{`O=A/B \\ C, CN=alice`, name(`O=A/B \ C`, "CN=alice")},
		{"O=Jürgen & Söhne, CN=jürgen", utf},
		{"O=x, CN=alice + UID=7", multi},
		{"DC=org, DC=example, OU=x;y<z>, CN=alice", name("DC=org", "DC=example", "OU=x;y<z>", "CN=alice")},
		// As OpenVPN before 2.3 and openssl -nameopt compat.
		{"/C=US/ST=CA/L=San Francisco/O=Copyleft Certificate Co/OU=My Organizational Unit/CN=alice/emailAddress=me@example.net", full},
		{"/C=US/O=Foo, Inc./CN=alice", comma},
		{`/O=A\/B \ C/CN=alice`, name(`O=A/B \ C`, "CN=alice")},
		{"/O=A/B/CN=alice", name("O=A/B", "CN=alice")},
		{`/O=J\xC3\xBCrgen & S\xC3\xB6hne/CN=j\xC3\xBCrgen`, utf},
		{"/O=x/CN=alice+UID=7", multi},
		{`/O="quoted"/CN=#hash`, name(`O="quoted"`, "CN=#hash")},
		// As openssl x509 -subject, with and without its first word.
		{"subject=C = US, O = \"Foo, Inc.\", CN = alice", comma},
		{"subject= /C=US/O=Foo, Inc./CN=alice", comma},
		{`O = J\C3\BCrgen & S\C3\B6hne, CN = j\C3\BCrgen`, utf},
		{`O = x, CN = "a+b + c=d"`, name("O=x", "CN=a+b + c=d")},
		{`O = \"quoted\", CN = "#hash"`, name(`O="quoted"`, "CN=#hash")},
		{`O = "a=b, CN=mallory", CN = alice`, name("O=a=b, CN=mallory", "CN=alice")},
		// As RFC 2253 and RFC 4514.
		{"emailAddress=me@example.net,CN=alice,OU=My Organizational Unit,O=Copyleft Certificate Co,L=San Francisco,ST=CA,C=US", full},
		{`CN=alice,O=Foo\, Inc.,C=US`, comma},
		{`CN=alice,O=Foo\2C Inc.,C=US`, comma},
		{"UID=7+CN=alice,O=x", multi},
		{`CN=\ lead and trail\ ,O=x`, name("O=x", "CN= lead and trail ")},
		{`CN=alice,OU=x\;y\<z\>,DC=example,DC=org`, name("DC=org", "DC=example", "OU=x;y<z>", "CN=alice")},
		{"2.5.4.3=#0c05616c696365,OID.2.5.4.10=x", name("O=x", "CN=alice")},
		// By hand, in LDAP's order; alone.
		{"cn=alice, o=x, c=US", name("C=US", "O=x", "CN=alice")},
		{"CN=alice", name("CN=alice")},
	} {
		list, err := parseAllowed("f", []byte(test.line))
		if err != nil {
			t.Errorf("%s: %v", test.line, err)
		} else if !list.subjects[test.want.key()] {
			t.Errorf("%s is not %q", test.line, test.want)
		}
	}
}

// The oracle is openssl: whatever it prints of a certificate is that certificate's subject.
func TestWhatOpenSSLPrintsOfASubjectIsThatSubject(t *testing.T) {
	dir := t.TempDir()
	run := func(args ...string) string {
		t.Helper()
		out, err := exec.Command("openssl", args...).CombinedOutput()
		if err != nil {
			t.Fatalf("openssl %s: %v\n%s", strings.Join(args, " "), err, out)
		}
		return strings.TrimRight(string(out), "\n")
	}
	key, csr := filepath.Join(dir, "key"), filepath.Join(dir, "crt")
	run("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key)
	for _, subject := range []string{
		"/CN=alice", "/C=US/ST=CA/O=x/CN=alice", "/DC=org/DC=example/CN=alice/UID=7", "/O=Foo, Inc./CN=alice", `/O=A\/B/CN=alice`,
		"/O=Jürgen/CN=alice", "/O=x/CN=alice+UID=7", `/O=x \\ y/CN=alice`, `/O="q" <z>;/CN=alice`, "/O= two  words /CN=alice",
		"/serialNumber=9/GN=A/SN=B/title=T/street=1 Way/postalCode=7/dnQualifier=x/initials=AB/name=n/CN=alice/emailAddress=a@example.com",
	} {
		run("req", "-x509", "-new", "-key", key, "-utf8", "-multivalue-rdn", "-subj", subject, "-out", csr)
		certs, err := ReadCertificates(csr)
		if err != nil {
			t.Fatal(err)
		}
		d, err := subjectDN(certs[0].RawSubject)
		if err != nil {
			t.Fatal(err)
		}
		const openvpn = "sname,sep_comma_plus_space,utf8,esc_ctrl"
		for _, form := range []string{"compat", "oneline", "RFC2253", openvpn} {
			if form == openvpn && strings.ContainsAny(subject[3:4], `" `) {
				continue // it does not escape these, so they cannot be told from what it means
			}
			line := run("x509", "-in", csr, "-noout", "-subject", "-nameopt", form)
			list, err := parseAllowed("f", []byte(line))
			if err != nil {
				t.Errorf("%s: %s: %v", form, line, err)
			} else if !list.subjects[d.key()] {
				t.Errorf("%s: %s is not read as %q", form, line, d)
			}
		}
		if list, err := parseAllowed("f", []byte(nameText(certs[0].RawSubject))); err != nil || !list.subjects[d.key()] {
			t.Errorf("our own %s: %v", nameText(certs[0].RawSubject), err)
		}
	}
}

func TestNoSubjectButTheListedOneIsOnTheList(t *testing.T) {
	list, err := parseAllowed("f", []byte("# of the VPN\n\n  C=US, O=x, CN=alice  \r\n; old\n/O=x/CN=bob\nCN=carol,O=x,C=US\nCN=dave\n"))
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []dn{
		name("C=US", "O=x", "CN=alice"), name("O=x", "CN=bob"), name("C=US", "O=x", "CN=carol"), name("CN=dave"),
	} {
		if !list.subjects[d.key()] {
			t.Errorf("%q is not on it", d)
		}
	}
	for _, d := range []dn{
		nil, {}, {nil}, name("CN=alice"), name("O=x", "CN=alice"), name("C=US", "O=x"), name("C=US", "O=x", "CN=alic"), name("C=US", "O=x", "CN=alice2"),
		name("C=US", "O=x", "CN=Alice"), name("C=us", "O=x", "CN=alice"), name("C=US", "O=x", "CN=alice", "CN=mallory"), name("C=US", "O=x", "OU=y", "CN=alice"),
		name("C=US, O=x, CN=alice"), name("C=US", "O=x, CN=alice"), name("O=C=US, O=x, CN=alice", "CN=mallory"), name("O=x", "C=US", "CN=alice"),
		name([]string{"C=US", "O=x", "CN=alice"}), name("C=US", "O=x", "CN=alice "), name("C=US", "O=x", "CN= alice"), name("C=US", "O=x", "CN=alice\x00"),
		name("C=US", "O=x", "UID=alice"), name("CN=bob", "O=x"), name("O=x", "CN=bob/CN=carol"), name("CN=carol", "O=x", "C=US"), name("CN=dav"), name("CN=davee"),
	} {
		if list.subjects[d.key()] {
			t.Errorf("%q is on it", d)
		}
	}
}

func TestBadLinesOfAListAreNamed(t *testing.T) {
	for line, want := range map[string]string{
		"alice":                        `f:2: "alice" is no TYPE=VALUE: write the subject as ` + "`openssl x509 -noout -subject` prints it, as in \"CN=alice\"",
		"CN=":                          `f:2: CN has the value "": want text in UTF-8`,
		"=alice":                       `f:2: "=alice" is no TYPE=VALUE`,
		"/":                            `f:2: "" is no TYPE=VALUE`,
		"OO=x, CN=alice":               `f:2: "OO" is no type of attribute that is known here: correct it, or write its number, as in 2.5.4.3 for CN`,
		"O=x, Ou2=y, CN=alice":         `f:2: "Ou2" is no type`,
		"/O=x/b=c/CN=alice":            `f:2: "b" is no type`,
		"2.5.4.99999999999=x":          `f:2: "2.5.4.99999999999" is no type`,
		"CN=alice,":                    `f:2: CN: ',' is its last character: remove it, or write \, if it is meant`,
		"/CN=alice/":                   `f:2: CN: '/' is its last character`,
		`CN=DOM\user`:                  `f:2: CN: "\\us" is no escape: write \\ for a backslash`,
		`CN=alice\`:                    `f:2: CN: "\\" is no escape`,
		`CN=\ff`:                       `f:2: CN has the value "\xff": want text in UTF-8`,
		"CN=al\xfcce":                  `f:2: CN has the value "al\xfcce": want text in UTF-8`,
		"CN=alice # her laptop":        `f:2: CN: " #" in a value: a comment has a line of its own; write \# if it is meant`,
		"CN=#alice":                    `f:2: CN: "#alice": hexadecimal digits follow a "#"; write \# if it is meant`,
		"CN=#0500":                     `f:2: CN: "#0500" encodes no text`,
		"CN=#0c05616c":                 `f:2: CN: "#0c05616c" encodes no value`,
		`CN = "alice`:                  `f:2: CN: a quote is opened and not closed`,
		`O = "x" y, CN = alice`:        `f:2: O: "y, CN = alice" follows the closing quote, where only another attribute may`,
		`O = "x"/CN=alice`:             `f:2: O: "/CN=alice" follows the closing quote`,
		strings.Repeat("x", maxLine*2): `f:2: longer than 4096 bytes: this is no subject`,
	} {
		list, err := parseAllowed("f", []byte("CN=bob\n"+line+"\nCN=carol\n"))
		if list != nil || err == nil || !strings.HasPrefix(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%.60q: %v, want %s", line, err, want)
		}
	}
	_, err := parseAllowed("f", []byte(strings.Repeat("nonsense\n", 100)))
	if lines := strings.Split(fmt.Sprint(err), "\n"); len(lines) != 6 || lines[5] != "f: 100 bad lines in all" || !strings.HasPrefix(lines[4], "f:5: ") {
		t.Errorf("%v", err)
	}
}

func TestLinesThatNameNoUserAreToldApart(t *testing.T) {
	list, err := parseAllowed("f", []byte("O=x\nCN=Alice Smith\nCN=alice, CN=bob\nCN=carol\n"))
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		`f:1: nobody comes in by this line: its subject has 0 common names [], and one must say who the user is`,
		`f:2: nobody comes in by this line: common name "Alice Smith": not a name: want 1 to 64 of a-z 0-9 . _ - with a letter or digit first`,
		`f:3: nobody comes in by this line: its subject has 2 common names ["alice" "bob"], and one must say who the user is`,
	}
	if fmt.Sprint(list.nameless) != fmt.Sprint(want) || len(list.users) != 1 || !list.users["carol"] {
		t.Errorf("%q, %v", list.nameless, list.users)
	}
}

func TestAWindowsEditorsMarkAndNoLastNewlineAreNoObstacle(t *testing.T) {
	list, err := parseAllowed("f", []byte("\xEF\xBB\xBFCN=alice\r\nCN=bob"))
	if err != nil || len(list.users) != 2 {
		t.Errorf("%v %v", list, err)
	}
}

func FuzzAllowed(f *testing.F) {
	for _, s := range []string{"CN=alice", "C=US, O=Foo, Inc., CN=a + UID=7", `/O=A\/B\xC3\xBC/CN=b`, `CN=a\2C\,b,O="x"`, `O = "a\"b", CN = #0c0161`, "# x\n\n;\n\xEF\xBB\xBF", "1.2.3=x,CN=#", "CN=a+,=\\"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		list, err := parseAllowed("f", data)
		if (list == nil) == (err == nil) {
			t.Fatalf("list %v with error %v", list, err)
		}
		if list == nil {
			return
		}
		// Nobody is let in by a name that does not stand in the file, escapes aside.
		for user := range list.users {
			if CheckName("user", user) != nil || !strings.ContainsAny(string(data), `\#`) && !strings.Contains(string(data), user) {
				t.Fatalf("%q lets %q in", data, user)
			}
		}
	})
}

// What RFC 4514 writes is read back as the same name, and as no other.
func FuzzNamesAreReadBack(f *testing.F) {
	f.Add("US", "Foo, Inc.", "alice", false)
	f.Add(" a ", `\"+;<>#`, "#x", true)
	f.Add("CN=x", "a+CN=b", "/CN=c", true)
	f.Fuzz(func(t *testing.T, a, b, c string, set bool) {
		for _, s := range []string{a, b, c} {
			// A " #" is taken for a comment that has no place there, and refused.
			if s == "" || !utf8.ValidString(s) || strings.Contains(s, " #") {
				return
			}
		}
		at := func(oid int, v string) pkix.AttributeTypeAndValue {
			return pkix.AttributeTypeAndValue{Type: asn1.ObjectIdentifier{2, 5, 4, oid}, Value: v}
		}
		seq := pkix.RDNSequence{{at(6, a)}, {at(10, b)}, {at(3, c)}}
		if set {
			seq = pkix.RDNSequence{{at(6, a)}, {at(10, b), at(3, c)}}
		}
		raw, err := asn1.Marshal(seq)
		if err != nil {
			return
		}
		want, err := subjectDN(raw)
		if err != nil {
			t.Fatal(err)
		}
		got, either, err := parseDN(seq.String())
		if err != nil || either || got.key() != want.key() {
			t.Fatalf("%s is read as %q, either %v, %v; want %q", seq, got, either, err, want)
		}
	})
}
