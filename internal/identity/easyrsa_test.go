package identity

import (
	"crypto/tls"
	"crypto/x509"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"perimeterd/internal/lab"
)

// An authority as its owners have it, in easy-rsa's two ways of naming people, with the list that openssl prints for them.
func TestARealEasyRSAAuthorityIsRead(t *testing.T) {
	for mode, settings := range map[string][]string{
		"cn_only": {"EASYRSA_DN=cn_only"},
		"org": {"EASYRSA_DN=org", "EASYRSA_ALGO=ec", "EASYRSA_REQ_COUNTRY=US", "EASYRSA_REQ_PROVINCE=California", "EASYRSA_REQ_CITY=San Francisco",
			"EASYRSA_REQ_ORG=Example, Inc.", "EASYRSA_REQ_EMAIL=me@example.net", "EASYRSA_REQ_OU=My Unit"},
	} {
		t.Run(mode, func(t *testing.T) {
			dir, ctx := t.TempDir(), t.Context()
			ca, err := lab.NewEasyRSA(ctx, dir, settings...)
			if err != nil {
				t.Fatal(err)
			}
			run := func(args ...string) {
				t.Helper()
				if err := ca.Run(ctx, args...); err != nil {
					t.Fatal(err)
				}
			}
			allowed := ""
			for _, name := range []string{"alice", "bob", "carol"} {
				run("build-client-full", name, "nopass")
				if name == "carol" {
					continue
				}
				out, err := exec.Command("openssl", "x509", "-in", ca.Path("issued/"+name+".crt"), "-noout", "-subject").Output()
				if err != nil {
					t.Fatal(err)
				}
				allowed += string(out)
			}
			run("build-server-full", "gate", "nopass")
			run("gen-crl")
			o := &outside{t: t, clock: time.Now(), users: NewUsers(openState(t, filepath.Join(dir, "state.db"))),
				External: External{CRL: ca.Path("crl.pem"), Allowed: filepath.Join(dir, "allowed")}}
			o.write(o.Allowed, []byte(allowed))
			if o.Verifier, err = NewExternalVerifier(ca.Path("ca.crt"), o.External, o.users, func() time.Time { return time.Now() }); err != nil {
				t.Fatal(err)
			}
			o.wantProblem()
			is := func(name string, code Code) {
				t.Helper()
				pair, err := tls.LoadX509KeyPair(ca.Path("issued/"+name+".crt"), ca.Path("private/"+name+".key"))
				if err != nil {
					t.Fatal(err)
				}
				id, err := o.Identify(tls.ConnectionState{PeerCertificates: []*x509.Certificate{pair.Leaf}})
				if code != "" {
					wantRefusal(t, err, code)
				} else if err != nil || id.User != name {
					t.Fatalf("%+v %v", id, err)
				}
			}
			is("alice", "")
			is("bob", "")
			is("carol", NotAllowed)
			is("gate", NoClientAuth)
			serial := ""
			index, err := os.ReadFile(ca.Path("index.txt"))
			if err != nil {
				t.Fatal(err)
			}
			for line := range strings.Lines(string(index)) {
				if f := strings.Split(line, "\t"); strings.HasSuffix(strings.TrimSpace(f[5]), "bob") || strings.Contains(f[5], "/CN=bob/") {
					serial = f[3]
				}
			}
			bob, err := ReadCertificates(ca.Path("issued/bob.crt"))
			if err != nil || !strings.EqualFold(serial, serialKey(bob[0].SerialNumber)) {
				t.Errorf("bob's device is not the serial %s of index.txt: %v", serial, err)
			}
			chain := [][]byte{bob[0].Raw}
			run("revoke", "bob")
			run("gen-crl")
			o.settle()
			o.wantProblem()
			is("alice", "")
			_, err = o.Again(chain)
			wantRefusal(t, err, RevokedCert)
		})
	}
}

// OpenSSL leaves a CRL at version 1 where its configuration asks for no extensions.
func TestACRLOfVersion1SaysHowToGetVersion2(t *testing.T) {
	ca, err := lab.NewEasyRSA(t.Context(), t.TempDir(), "EASYRSA_ALGO=ec")
	if err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(ca.Dir, "v1.cnf")
	text := "[ca]\ndefault_ca=x\n[x]\ndatabase=" + ca.Path("index.txt") + "\ndefault_md=sha256\ndefault_crl_days=9\n"
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	der := filepath.Join(ca.Dir, "v1.pem")
	if out, err := exec.Command("openssl", "ca", "-gencrl", "-config", config, "-keyfile", ca.Path("private/ca.key"), "-cert", ca.Path("ca.crt"), "-out", der).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	data, err := os.ReadFile(der)
	if err != nil {
		t.Fatal(err)
	}
	authorities, err := ReadCertificates(ca.Path("ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	good, bad := parseCRLs(data, authorities, time.Now())
	if len(good) != 0 || len(bad) != 1 || !strings.Contains(bad[0].Error(), "X.509 version 1: let `openssl ca -gencrl` write version 2, by `-crlexts`") {
		t.Errorf("%v %v", good, bad)
	}
}
