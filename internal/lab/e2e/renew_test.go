package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"perimeterd/internal/lab"
	"perimeterd/internal/signer"
	"perimeterd/vpn"
	"perimeterd/vpn/client"
)

func (s *stage) kept(u *lab.User, name string) string {
	return filepath.Join(u.Home, ".config", "perimeter", name+".profile")
}

// patiently waits until the stage's time is over, and asks seldom: what it asks costs a process.
func (s *stage) patiently(what string, holds func() bool) {
	s.t.Helper()
	for !holds() {
		select {
		case <-time.After(200 * time.Millisecond):
		case <-s.ctx.Done():
			s.t.Fatal("never: ", what)
		}
	}
}

// A certificate of less than a minute: it is renewed while the tunnel is up, and the tunnel outlives it.
func TestTunnelOutlivesItsCertificate(t *testing.T) {
	t.Parallel() // it waits for an expiry
	s := newStage(t, lab.Options{})
	profile, err := s.daemon.AddUser(s.ctx, "carol", "--valid", "45s")
	if err != nil {
		t.Fatal(err)
	}
	if out, err := s.daemon.Perimeterd(s.ctx, "user", "set", "carol", "--address", "10.77.7.7"); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	carol, err := s.NewUser(s.ctx, s.Client, profile)
	if err != nil {
		t.Fatal(err)
	}
	sent := s.profile(profile)
	s.ok(carol.VPN(s.ctx, "up"))
	first := s.status(carol)
	reach := func() string {
		c := carol.Command(s.ctx, "curl", "-sS", "--max-time", "10", "--cacert", s.cloud.CAFile, "https://"+cloudName+"/")
		c.Env = append(c.Env, "https_proxy=http://10.77.0.1:3128")
		out, _ := c.CombinedOutput()
		return string(out)
	}
	seen := "seen from " + s.Egress.String() + "\n"
	s.patiently("the renewed certificate", func() bool { return s.profile(s.kept(carol, "carol")).Certificate != sent.Certificate })
	if _, err := s.daemon.Await(s.ctx, "renewed certificate used: the one before it is refused from now on", 1); err != nil {
		t.Fatal(err)
	}
	if now := s.profile(s.kept(carol, "carol")); now.Key == sent.Key {
		t.Error("the key is the old one")
	}
	if got := s.status(carol); got.Session != first.Session || got.State != client.Up {
		t.Errorf("the session became %s, %s", got.Session, got.State)
	}
	if got := reach(); got != seen {
		t.Error(got)
	}
	// Who has a copy of what was sent has no use for it any more.
	thief, err := s.NewHome(s.Client, "thief")
	if err != nil {
		t.Fatal(err)
	}
	s.ok(thief.VPN(s.ctx, "import", profile))
	if out := s.fails(thief.VPN(s.ctx, "renew")); !strings.Contains(out, "does not accept this certificate") && !strings.Contains(out, "expired") {
		t.Error(out)
	}
	// A restart ends no session for the renewal of its certificate.
	if err := s.daemon.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	s.daemon.Wait()
	if err := s.daemon.Start(s.ctx); err != nil {
		t.Fatal(err)
	}
	s.patiently("the tunnel after the restart", func() bool { return reach() == seen })

	// The first session ends with the first certificate. The next has the address of the first, and goes past its end.
	s.patiently("the next session", func() bool { st := s.status(carol); return st.State == client.Up && st.Session != first.Session })
	s.patiently("the end of the first certificate", func() bool { return time.Now().After(first.Expires) })
	s.patiently("data after that", func() bool { return reach() == seen })
	last := s.status(carol)
	if last.Address != first.Address || last.Address.Addr().String() != "10.77.7.7" || !last.Expires.After(first.Expires) {
		t.Errorf("then it is %v until %v, and was %v until %v", last.Address, last.Expires, first.Address, first.Expires)
	}
	if out, err := s.daemon.Perimeterd(s.ctx, "user", "show", "carol"); err != nil || !strings.Contains(out, "active") {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestRevokedUserCannotRenew(t *testing.T) {
	s := newStage(t, lab.Options{})
	record := filepath.Join(s.daemon.Dir, "pki", signer.Renewable, "alice")
	if _, err := os.Stat(record); err != nil {
		t.Fatal(err)
	}
	if out := s.fails(s.alice.VPN(s.ctx, "renew")); !strings.Contains(out, "the certificate may be renewed from ") {
		t.Errorf("too early: %s", out)
	}
	if out, err := s.daemon.Perimeterd(s.ctx, "user", "revoke", "alice"); err != nil || strings.Contains(out, "warning") {
		t.Fatalf("%v\n%s", err, out)
	}
	if _, err := os.Stat(record); !os.IsNotExist(err) {
		t.Errorf("the signer would renew for her: %v", err)
	}
	if out := s.fails(s.alice.VPN(s.ctx, "renew")); !strings.Contains(out, "revoked") {
		t.Error(out)
	}
}

// openssl and curl suffice.
func TestStockToolsRenew(t *testing.T) {
	s := newStage(t, lab.Options{})
	profile, err := s.daemon.AddUser(s.ctx, "dave", "--valid", "10m")
	if err != nil {
		t.Fatal(err)
	}
	p := s.profile(profile)
	s.ok(s.alice.Knock(s.ctx)) // the window is the address's
	for name, text := range map[string]string{"ca.pem": p.CA, "dave.pem": p.Certificate, "dave.key": p.Key} {
		if err := os.WriteFile(filepath.Join(s.Dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	script := `cd "$DIR"
openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout new.key -subj /CN=dave -outform DER -out new.csr 2>/dev/null
proof=$( (printf 'perimeterd renewal 1\n'; cat new.csr) | openssl dgst -sha256 -sign dave.key | base64 -w0)
curl -sS --cacert ca.pem --cert dave.pem --key dave.key -d '{"request":"'$(base64 -w0 new.csr)'","proof":"'$proof'"}' https://198.18.1.1:1194/v1/certificate`
	c := s.Client.Command(s.ctx, "sh", "-c", script)
	c.Env = append(os.Environ(), "DIR="+s.Dir)
	out := s.ok(c)
	var reply vpn.CertificateReply
	if err := json.Unmarshal([]byte(out), &reply); err != nil || reply.Certificate == "" {
		t.Fatalf("%v: %s", err, out)
	}
	if err := os.WriteFile(filepath.Join(s.Dir, "new.pem"), []byte(reply.Certificate), 0o600); err != nil {
		t.Fatal(err)
	}
	with := func(cert, key string) *lab.Cmd {
		return s.Client.Command(s.ctx, "curl", "-sS", "--cacert", filepath.Join(s.Dir, "ca.pem"), "--cert", filepath.Join(s.Dir, cert), "--key", filepath.Join(s.Dir, key),
			"https://198.18.1.1:1194/v1/session")
	}
	if got := s.ok(with("new.pem", "new.key")); got != "[]\n" {
		t.Error(got)
	}
	s.fails(with("dave.pem", "dave.key"))
}
