package client_test

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pelletier/go-toml/v2"

	"perimeterd/vpn"
	"perimeterd/vpn/client"
	"perimeterd/vpn/client/clienttest"
)

// keepProfile puts the rig's profile into a file and loads it from there, as every command does.
func (r *rig) keepProfile() (file string) {
	r.Helper()
	text, err := toml.Marshal(r.profile)
	if err != nil {
		r.Fatal(err)
	}
	file = filepath.Join(r.TempDir(), "alice.profile")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		r.Fatal(err)
	}
	r.load(file)
	return file
}

func (r *rig) load(file string) *client.Profile {
	r.Helper()
	p, err := client.LoadProfile(file)
	if err != nil {
		r.Fatal(err)
	}
	r.profile = p
	return p
}

func (r *rig) renew() (*client.Profile, error) {
	r.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	o := r.options()
	return client.Renew(ctx, o.Profile, o.Tokens)
}

// secrets are the private keys that lie around besides the profile's.
func (r *rig) secrets() (names []string) {
	r.Helper()
	for _, pattern := range []string{os.Getenv("XDG_CONFIG_HOME") + "/perimeter/*.next", os.Getenv("XDG_CONFIG_HOME") + "/perimeter/*.key"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			r.Fatal(err)
		}
		names = append(names, found...)
	}
	return names
}

func TestRenewedProfileIsInTheFileAndTheOldOneIsNot(t *testing.T) {
	r := newRig(t, nil, nil)
	file := r.keepProfile()
	old := r.profile
	q, err := r.renew()
	if err != nil {
		t.Fatal(err)
	}
	p := r.load(file)
	if p.Key == old.Key || p.Certificate == old.Certificate || p.Certificate != q.Certificate || p.KnockSecret != old.KnockSecret || !p.Expires().After(old.Expires()) {
		t.Error("the file does not have the new certificate, or lost something else")
	}
	st, err := os.Stat(file)
	if err != nil || st.Mode() != 0o600 {
		t.Error(st, err)
	}
	left, err := os.ReadDir(filepath.Dir(file))
	if err != nil || len(left) != 1 || len(r.secrets()) > 0 {
		t.Errorf("left beside it: %v %v %v", left, r.secrets(), err)
	}
	if _, err := r.open(10 * time.Second); err != nil {
		t.Error(err)
	}
	r.profile = old
	if _, err := r.open(10 * time.Second); err == nil || !strings.Contains(err.Error(), "does not accept this certificate") {
		t.Errorf("with the old one: %v", err)
	}
	// Who still has the old one in memory gets what the file has.
	if again, err := r.renew(); err != nil || again.Certificate != p.Certificate || r.gate.Renewals != 1 {
		t.Errorf("%v, %d certificates issued", err, r.gate.Renewals)
	}
}

func TestLostAnswerIsAskedForAgainWithTheSameKey(t *testing.T) {
	r := newRig(t, func(g *clienttest.Gate) { g.LoseRenewals = 1 }, nil)
	file := r.keepProfile()
	before, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.renew(); err == nil {
		t.Fatal("no error, and no answer came")
	}
	if after, err := os.ReadFile(file); err != nil || string(after) != string(before) {
		t.Errorf("the profile changed: %v", err)
	}
	waiting := r.secrets()
	if len(waiting) != 1 {
		t.Fatalf("waiting keys: %v", waiting)
	}
	if st, err := os.Stat(waiting[0]); err != nil || st.Mode() != 0o600 {
		t.Error(st, err)
	}
	if _, err := r.open(10 * time.Second); err != nil {
		t.Errorf("the old certificate meanwhile: %v", err)
	}
	if _, err := r.renew(); err != nil { // the gate takes no other key
		t.Fatal(err)
	}
	r.load(file)
	if _, err := r.open(10 * time.Second); err != nil {
		t.Error(err)
	}
	if left := r.secrets(); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestUselessAnswersLeaveTheProfileAsItWas(t *testing.T) {
	other, err := clienttest.NewGate()
	if err != nil {
		t.Fatal(err)
	}
	bob, err := other.Profile("bob", "b:1", 1, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		change func(*vpn.CertificateReply, *x509.Certificate)
		want   string
	}{
		{"the old certificate", func(r *vpn.CertificateReply, old *x509.Certificate) {
			r.Certificate = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: old.Raw}))
		}, "certificate and key: "},
		{"another's certificate", func(r *vpn.CertificateReply, _ *x509.Certificate) { r.Certificate = bob.Certificate }, "it is for CN=bob, not for CN=alice"},
		{"no certificate", func(r *vpn.CertificateReply, _ *x509.Certificate) { r.Certificate = "please" }, "want one in PEM"},
		{"two certificates", func(r *vpn.CertificateReply, _ *x509.Certificate) { r.Certificate += r.Certificate }, "want one in PEM"},
		{"no CA", func(r *vpn.CertificateReply, _ *x509.Certificate) { r.CA = "" }, "ca: no certificate"},
		{"a CA that does not know the gate", func(r *vpn.CertificateReply, _ *x509.Certificate) { r.CA = bob.CA }, "does not know the gate that sent it"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, func(g *clienttest.Gate) { g.Renewal = c.change }, nil)
			file := r.keepProfile()
			before, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := r.renew(); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
			if after, err := os.ReadFile(file); err != nil || string(after) != string(before) {
				t.Errorf("the profile changed: %v", err)
			}
			r.load(file)
			if _, err := r.open(10 * time.Second); err != nil {
				t.Errorf("with the old certificate: %v", err)
			}
		})
	}
}

func TestRefusedRenewalSaysWhy(t *testing.T) {
	r := newRig(t, func(g *clienttest.Gate) {
		g.RefuseRenewal = &vpn.APIError{Code: vpn.CodeTooEarly, Message: "the certificate may be renewed from May on", Fix: "keep the one you have until then"}
	}, nil)
	r.keepProfile()
	if _, err := r.renew(); err == nil || err.Error() != "the certificate may be renewed from May on: keep the one you have until then" {
		t.Error(err)
	}
	r.profile = parsed(t, r.profile)
	if _, err := r.renew(); err == nil || !strings.Contains(err.Error(), "in no file") {
		t.Error(err)
	}
}

// The gate refuses what it has issued a moment ago: its state was put back from a backup, say.
func TestProfileBeforeComesBackWhereTheNewOneIsRefused(t *testing.T) {
	r := newRig(t, nil, nil)
	file := r.keepProfile()
	before, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	r.gate.Renewal = func(*vpn.CertificateReply, *x509.Certificate) { r.gate.RefuseCert = true }
	if _, err := r.renew(); err == nil || !strings.Contains(err.Error(), "the one before is kept") {
		t.Error(err)
	}
	if after, err := os.ReadFile(file); err != nil || string(after) != string(before) {
		t.Errorf("another profile: %v", err)
	}
	left, err := os.ReadDir(filepath.Dir(file))
	if err != nil || len(left) != 1 {
		t.Errorf("left beside it: %v %v", left, err)
	}
}

func TestTwoAtOnceRenewOnce(t *testing.T) {
	r := newRig(t, nil, nil)
	file := r.keepProfile()
	o := r.options()
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			if _, err := client.Renew(ctx, o.Profile, o.Tokens); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	r.load(file)
	if _, err := r.open(10 * time.Second); err != nil || r.gate.Renewals != 1 {
		t.Errorf("%v, %d certificates issued", err, r.gate.Renewals)
	}
}
