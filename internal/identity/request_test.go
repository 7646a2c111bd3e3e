package identity

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestRequestsOfOurOwnAndOfOpenSSL(t *testing.T) {
	dir := t.TempDir()
	ca, err := NewCA("test", now)
	if err != nil {
		t.Fatal(err)
	}
	take := func(name string, data []byte) {
		t.Helper()
		r, err := ParseRequest(data)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			return
		}
		cert, err := ca.SignClient(r.PublicKey, "alice", "mac", now.Add(time.Hour), now)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			return
		}
		if r.Name != "alice" || r.Device != "mac" || r.Key != HashKey(cert) {
			t.Errorf("%s: name %q, device %q, key %x, in the certificate %x", name, r.Name, r.Device, r.Key, HashKey(cert))
		}
	}
	for name, arguments := range map[string]string{
		"p256": "-newkey ec -pkeyopt ec_paramgen_curve:P-256", "p384": "-newkey ec -pkeyopt ec_paramgen_curve:P-384",
		"ed25519": "-newkey ed25519", "rsa": "-newkey rsa:2048", "rsa4096": "-newkey rsa:4096",
	} {
		for _, form := range []string{"PEM", "DER"} {
			out := filepath.Join(dir, name+form)
			args := strings.Fields("req -new " + arguments + " -nodes -keyout " + out + ".key -out " + out + " -outform " + form + " -subj /OU=mac/CN=alice")
			if text, err := exec.Command("openssl", args...).CombinedOutput(); err != nil {
				t.Fatalf("openssl: %v\n%s", err, text)
			}
			take(name+" "+form, fileText(t, out))
		}
	}
	key, err := NewKey()
	if err != nil {
		t.Fatal(err)
	}
	r, err := NewRequest(key, "alice", "mac")
	if err != nil {
		t.Fatal(err)
	}
	take("ours", r.DER)
	take("ours, older name", pem.EncodeToMemory(&pem.Block{Type: "NEW CERTIFICATE REQUEST", Bytes: r.DER}))
}

func TestRefusedRequests(t *testing.T) {
	key, err := NewKey()
	if err != nil {
		t.Fatal(err)
	}
	good := unchecked(t, key)
	forged := bytes.Clone(good)
	forged[len(forged)-1] ^= 1
	short, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	block := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: good})
	for _, test := range []struct {
		name string
		data []byte
		want string
	}{
		{"nothing", nil, "neither PEM nor DER"},
		{"text", []byte("please"), "neither PEM nor DER"},
		{"a key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: good}), `PEM with a "PRIVATE KEY": want a CERTIFICATE REQUEST`},
		{"two", append(bytes.Clone(block), block...), "something follows"},
		{"a byte more", append(bytes.Clone(good), 0), "not understood"},
		{"cut", good[:len(good)-9], "not understood"},
		{"a signature of another", forged, "not signed by its own key"},
		{"a short RSA key", unchecked(t, short), "an RSA key of 1024 bits: want 2048 to 4096"},
		{"a curve that is not taken", unchecked(t, p224), "an ECDSA key on P-224"},
		{"too much", make([]byte, MaxRequest+1), "bytes: want at most"},
	} {
		if _, err := ParseRequest(test.data); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want %q", test.name, err, test.want)
		}
	}
}

// unchecked makes a request that ParseRequest may refuse.
func unchecked(t *testing.T, key crypto.Signer) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "alice"}}, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func fileText(t *testing.T, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func FuzzParseRequest(f *testing.F) {
	key, err := NewKey()
	if err != nil {
		f.Fatal(err)
	}
	_, edwards, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	for _, k := range []crypto.Signer{key, edwards} {
		r, err := NewRequest(k, "alice", "mac")
		if err != nil {
			f.Fatal(err)
		}
		f.Add(r.DER)
		f.Add(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: r.DER}))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := ParseRequest(data)
		if err != nil {
			return
		}
		if err := checkKey(r.PublicKey); err != nil {
			t.Error(err)
		}
		again, err := ParseRequest(r.DER)
		if err != nil || again.Key != r.Key || again.Name != r.Name {
			t.Errorf("read again: %+v, %v", again, err)
		}
	})
}
