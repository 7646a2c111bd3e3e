package client_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"perimeterd/vpn/client"
)

func enroll(t *testing.T, user, device string) *client.Enrolment {
	t.Helper()
	e, err := client.Enroll(user, device)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// keyless is what an operator makes of a request: a profile without a key.
func keyless(t *testing.T, e *client.Enrolment, change func(*client.Profile)) string {
	t.Helper()
	block, _ := pem.Decode(e.Request)
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	if err := csr.CheckSignature(); err != nil {
		t.Fatal(err)
	}
	ca, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "alice"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, csr.PublicKey, ca)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "alice.profile")
	text := profileText(t, func(p *client.Profile) {
		p.Key, p.KeyID = "", e.KeyID
		p.Certificate = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
		if change != nil {
			change(p)
		}
	})
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestImportJoinsTheCertificateWithTheKeyThatWaits(t *testing.T) {
	t.Setenv("XDG_CONFIG_HOME", t.TempDir())
	other, e := enroll(t, "alice", "desk"), enroll(t, "alice", "")
	if again := enroll(t, "alice", ""); again.Fresh || again.KeyID != e.KeyID || !e.Fresh || other.KeyID == e.KeyID {
		t.Errorf("asked again: %+v, before: %+v", again, e)
	}
	if st, err := os.Stat(e.Key); err != nil || st.Mode() != 0o600 || strings.Contains(string(e.Request), "PRIVATE") {
		t.Errorf("%v, %v, %s", st, err, e.Request)
	}
	file := keyless(t, e, nil)
	if _, err := client.LoadProfile(file); err == nil || !strings.Contains(err.Error(), "its key is with who made the request: there, run: vpn import") {
		t.Errorf("a profile without a key is taken as it is: %v", err)
	}
	p, kept, err := client.Import(file, never, false)
	if err != nil {
		t.Fatal(err)
	}
	if p.Key == "" || p.KeyID != "" {
		t.Error("the key did not join")
	}
	if _, err := client.LoadProfile("alice"); err != nil {
		t.Error(err)
	}
	if st, err := os.Stat(kept); err != nil || st.Mode() != 0o600 {
		t.Error(st, err)
	}
	if _, err := os.Stat(e.Key); err == nil {
		t.Error("the key waits on, beside the profile that has it")
	}
	if _, err := os.Stat(other.Key); err != nil {
		t.Error("the key of another request is gone")
	}
	// Once more: nothing changes, since the profile kept has that key.
	if _, _, err := client.Import(file, never, false); err != nil {
		t.Errorf("imported again: %v", err)
	}
}

func TestProfileForAnotherKeySaysSo(t *testing.T) {
	t.Setenv("XDG_CONFIG_HOME", t.TempDir())
	e := enroll(t, "alice", "")
	file := keyless(t, e, nil)
	wrong := keyless(t, e, func(p *client.Profile) { p.KeyID = strings.Repeat("0", 64) })
	both := filepath.Join(t.TempDir(), "both")
	if err := os.WriteFile(both, profileText(t, func(p *client.Profile) { p.KeyID = e.KeyID }), 0o600); err != nil {
		t.Fatal(err)
	}
	readable := enroll(t, "bob", "")
	if err := os.Chmod(readable.Key, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, file, want string }{
		{"key_id of another", wrong, "key_id = \"" + strings.Repeat("0", 64) + "\": the certificate's key is " + e.KeyID},
		{"key and key_id", both, "key and key_id: want one of them"},
	} {
		if _, _, err := client.Import(c.file, never, false); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
	if err := os.Remove(e.Key); err != nil {
		t.Fatal(err)
	}
	if _, _, err := client.Import(file, never, false); err == nil || !strings.Contains(err.Error(), "mode 0644 lets others at the key in it") {
		t.Errorf("a key that others can read: %v", err)
	}
	if err := os.Chmod(readable.Key, 0o600); err != nil {
		t.Fatal(err)
	}
	_, _, err := client.Import(file, never, false)
	for _, want := range []string{"it is for the key " + e.KeyID, "the keys that wait here are others, made for bob", "vpn enroll alice"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	if err := os.Remove(readable.Key); err != nil {
		t.Fatal(err)
	}
	if _, _, err := client.Import(file, never, false); err == nil || !strings.Contains(err.Error(), "no key waits here") {
		t.Error(err)
	}
	if names, err := client.Names(); err != nil || len(names) > 0 {
		t.Errorf("kept all the same: %v %v", names, err)
	}
}

func TestEnrollRefusesWhatIsNoName(t *testing.T) {
	t.Setenv("XDG_CONFIG_HOME", t.TempDir())
	for _, c := range [][2]string{{"", ""}, {"../alice", ""}, {"alice", "a/b"}, {"-rf", ""}} {
		if _, err := client.Enroll(c[0], c[1]); err == nil {
			t.Errorf("%q: no error", c)
		}
	}
}
