package e2e

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pelletier/go-toml/v2"

	"perimeterd/internal/identity"
	"perimeterd/internal/lab"
	"perimeterd/internal/signer"
	"perimeterd/vpn"
	"perimeterd/vpn/client"
)

// takenOver names the signer's socket to a process that plays a gate somebody took over.
const takenOver = "E2E_TAKEN_OVER"

func TestMain(m *testing.M) {
	if socket := os.Getenv(takenOver); socket != "" {
		if err := mint(socket); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	if offset := os.Getenv(doctorOffset); offset != "" {
		if err := playDoctor(offset); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// mint tries what a gate that was taken over might: it has the daemon's uid, alice's certificate as everybody sees it in a
// handshake, and no key of hers. Its error says what it got, and should not have.
func mint(socket string) error {
	ctx := context.Background()
	sign := signer.NewClient(socket, func(uint32) bool { return true }, func() (*exec.Cmd, error) { return nil, errors.New("nobody listens") })
	text, err := os.ReadFile(os.Getenv("ALICE"))
	if err != nil {
		return err
	}
	block, _ := pem.Decode(text)
	alice, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return err
	}
	key, err := identity.NewKey()
	if err != nil {
		return err
	}
	csr, err := identity.NewRequest(key, "alice", "default")
	if err != nil {
		return err
	}
	sum := sha256.Sum256(vpn.RenewalMessage(csr.DER))
	proof, err := key.Sign(rand.Reader, sum[:], crypto.SHA256)
	if err != nil {
		return err
	}
	attempts := map[string]func() error{
		"a new name":         func() error { _, err := sign.Enrol(ctx, "mallory", "mac", false, time.Hour, csr.DER); return err },
		"alice once more":    func() error { _, err := sign.Enrol(ctx, "alice", "default", false, time.Hour, csr.DER); return err },
		"a gate certificate": func() error { _, err := sign.Server(ctx, strings.Repeat("ab", 16), "bastion", csr.DER); return err },
		"alice's renewal":    func() error { _, err := sign.Renew(ctx, alice, csr.DER, proof); return err },
		"the CA key":         func() error { _, err := os.ReadFile(os.Getenv("PKI") + "/ca.key"); return err },
		"the record":         func() error { _, err := os.ReadFile(os.Getenv("PKI") + "/" + signer.Renewable + "/alice"); return err },
		"another record": func() error {
			return os.WriteFile(os.Getenv("PKI")+"/"+signer.Renewable+"/mallory", []byte("[]"), 0o600)
		},
		"another CA key": func() error { return os.Rename(os.Getenv("ALICE"), os.Getenv("PKI")+"/ca.key") },
	}
	var got []error
	for what, try := range attempts {
		err := try()
		fmt.Printf("%s: %v\n", what, err)
		var refusal *signer.Refusal
		if !errors.Is(err, os.ErrPermission) && !errors.As(err, &refusal) {
			got = append(got, fmt.Errorf("%s: %w", what, errors.Join(errors.New("not refused"), err)))
		}
	}
	return errors.Join(got...)
}

// The numbers of the package's users.
const (
	daemonUID = 60195
	signerUID = 60196
)

// packaged gives the bastion the users that the package makes.
func packaged(t *testing.T, l *lab.Lab) {
	t.Helper()
	for file, line := range map[string]string{
		"passwd": fmt.Sprintf("perimeterd:x:%[1]d:%[1]d::/nonexistent:/bin/false\nperimeterd-signer:x:%[2]d:%[2]d::/nonexistent:/bin/false\n", daemonUID, signerUID),
		"group":  fmt.Sprintf("perimeterd:x:%d:\nperimeterd-signer:x:%d:\n", daemonUID, signerUID),
	} {
		text, err := os.ReadFile("/etc/" + file)
		if err != nil {
			t.Fatal(err)
		}
		copied := filepath.Join(l.Dir, file)
		if err := os.WriteFile(copied, append(text, line...), 0o644); err != nil {
			t.Fatal(err)
		}
		// In the bastion's own mount namespace.
		if out, err := l.Bastion.Command(context.Background(), "mount", "--bind", copied, "/etc/"+file).CombinedOutput(); err != nil {
			t.Fatalf("%v %s", err, out)
		}
	}
}

// serveSigner runs the signer on its socket, as systemd would.
func (s *stage) serveSigner() *lab.Cmd {
	s.t.Helper()
	bin, err := lab.Bin("perimeterd")
	if err != nil {
		s.t.Fatal(err)
	}
	c := s.Bastion.Command(s.ctx, bin, "--config", s.daemon.Config, "signer")
	log, err := os.Create(filepath.Join(s.Dir, "signer.log"))
	if err != nil {
		s.t.Fatal(err)
	}
	defer log.Close()
	c.Stderr = log
	if err := c.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.await("the signer's socket", func() bool { _, err := os.Stat(s.signerSocket()); return err == nil })
	return c
}

func (s *stage) signerSocket() string { return filepath.Join(s.daemon.Dir, "run", "signer.sock") }

func (s *stage) profile(file string) *client.Profile {
	s.t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		s.t.Fatal(err)
	}
	var p client.Profile
	if err := toml.Unmarshal(text, &p); err != nil {
		s.t.Fatal(err)
	}
	return &p
}

func TestAGateThatIsTakenOverMintsNobody(t *testing.T) {
	l := lab.Start(t, lab.Options{})
	packaged(t, l)
	s := newStageIn(t, l)
	pki := filepath.Join(s.daemon.Dir, "pki")
	for file, want := range map[string]uint32{"": 0, "ca.key": signerUID, signer.Renewable: signerUID, "gate.key": 0, "ca.crt": 0} {
		st, err := os.Stat(filepath.Join(pki, file))
		if err != nil {
			t.Fatal(err)
		}
		if got := st.Sys().(*syscall.Stat_t).Uid; got != want {
			t.Errorf("pki/%s belongs to %d, want %d", file, got, want)
		}
	}
	check := func() string { out, _ := s.daemon.Perimeterd(s.ctx, "check"); return out }
	if out := check(); !strings.Contains(out, "pki/ is complete and private") {
		t.Error(out)
	}
	if err := os.Chown(filepath.Join(pki, "ca.key"), 0, 0); err != nil {
		t.Fatal(err)
	}
	if out := check(); !strings.Contains(out, "belongs to the user 0, and only the signer should hold it: chown perimeterd-signer ") {
		t.Error(out)
	}
	if err := os.Chown(filepath.Join(pki, "ca.key"), signerUID, signerUID); err != nil {
		t.Fatal(err)
	}
	// Without a service, the daemon's own signer has the signer's user.
	owners := func(arg string) (uids []string) {
		procs, err := filepath.Glob("/proc/[0-9]*/cmdline")
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range procs {
			line, err := os.ReadFile(p)
			if err != nil || !strings.Contains(string(line), s.daemon.Dir) || !strings.Contains(string(line), "\x00"+arg+"\x00") {
				continue
			}
			status, err := os.ReadFile(filepath.Dir(p) + "/status")
			if err != nil {
				continue // it ended
			}
			_, after, _ := strings.Cut(string(status), "\nUid:\t")
			line1, _, _ := strings.Cut(after, "\n")
			_, after, _ = strings.Cut(string(status), "\nGroups:")
			groups, _, _ := strings.Cut(after, "\n")
			uids = append(uids, line1+strings.TrimRight(groups, "\t "))
		}
		return uids
	}
	want := fmt.Sprintf("%[1]d\t%[1]d\t%[1]d\t%[1]d", signerUID)
	if got := owners("--renewals"); len(got) != 1 || got[0] != want {
		t.Errorf("the daemon's signer runs as %q, want one of %q", got, want)
	}
	service := s.serveSigner()
	s.await("the signer's user", func() bool { got := owners("signer"); return len(got) == 2 && got[0] == want && got[1] == want })
	if _, err := s.daemon.AddUser(s.ctx, "bob"); err != nil {
		t.Error(err)
	}

	certificate := filepath.Join(s.Dir, "alice.crt")
	if err := os.WriteFile(certificate, []byte(s.profile(filepath.Join(s.Dir, "alice.profile")).Certificate), 0o644); err != nil {
		t.Fatal(err)
	}
	self := filepath.Join(s.Dir, "gate") // where the daemon's user may run it
	text, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(self, text, 0o755); err != nil {
		t.Fatal(err)
	}
	gate := s.Bastion.Command(s.ctx, self)
	gate.Env = append(os.Environ(), takenOver+"="+s.signerSocket(), "ALICE="+certificate, "PKI="+pki)
	gate.Dir = "/"
	gate.SysProcAttr.Credential = &syscall.Credential{Uid: daemonUID, Gid: daemonUID}
	t.Log(s.ok(gate))
	stranger := s.Bastion.Command(s.ctx, self)
	stranger.Env, stranger.Dir = gate.Env, "/"
	stranger.SysProcAttr.Credential = &syscall.Credential{Uid: 65534, Gid: 65534}
	t.Log(s.ok(stranger))
	if err := service.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	service.Wait()
	log, err := os.ReadFile(filepath.Join(s.Dir, "signer.log"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`"msg":"signer signed","op":"enrol","uid":0,"subject":"CN=bob,OU=default"`,
		fmt.Sprintf(`"msg":"signer refused","op":"enrol","uid":%d,"user":"mallory"`, daemonUID),
		`"code":"not_proven"`,
	} {
		if !strings.Contains(string(log), want) {
			t.Errorf("the signer did not log %s:\n%s", want, log)
		}
	}
	// Its own signer ends with the daemon, however that ends.
	if err := s.daemon.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	s.await("the end of the daemon's signer", func() bool { return len(owners("--renewals")) == 0 })
}
