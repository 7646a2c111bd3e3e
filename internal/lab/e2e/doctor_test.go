package e2e

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pelletier/go-toml/v2"
	"golang.org/x/sys/unix"

	"perimeterd/internal/lab"
	"perimeterd/vpn/client"
)

// doctorOffset has this program be `vpn doctor` on a machine whose clock is off by so much. Clocks cannot be set for a
// namespace, and a static binary asks no library for the time.
const doctorOffset = "E2E_DOCTOR_OFFSET"

func playDoctor(offset string) error {
	off, err := time.ParseDuration(offset)
	if err != nil {
		return err
	}
	p, err := client.LoadProfile("")
	if err != nil {
		return err
	}
	d := client.Doctor{Profile: p, Now: func() time.Time { return time.Now().Add(off) }, Echo: client.EchoURL}
	return json.NewEncoder(os.Stdout).Encode(d.Examine(context.Background()))
}

// clinic is a stage whose windows close soon, so that each fault meets a closed door.
func newClinic(t *testing.T) *stage {
	t.Helper()
	t.Parallel() // they wait more than they work
	s := newStage(t, lab.Options{LongLink: true}, lab.Setting{Key: "window", Value: `"2s"`})
	var cancel func()
	s.ctx, cancel = context.WithTimeout(context.Background(), 6*time.Minute)
	t.Cleanup(cancel)
	return s
}

// doctor examines as u, in whose shell there are these variables too, once no window is open.
func (s *stage) doctor(u *lab.User, environ []string, args ...string) client.Report {
	s.t.Helper()
	return s.examine(u.VPN(s.ctx, append([]string{"doctor", "--json"}, args...)...), environ)
}

// doctorAt examines by a clock that is off.
func (s *stage) doctorAt(u *lab.User, off time.Duration) client.Report {
	s.t.Helper()
	self, err := os.Executable()
	if err != nil {
		s.t.Fatal(err)
	}
	return s.examine(u.Command(s.ctx, self), []string{doctorOffset + "=" + off.String()})
}

func (s *stage) examine(c *lab.Cmd, environ []string) (r client.Report) {
	s.t.Helper()
	s.closed()
	c.Env = slices.DeleteFunc(c.Env, func(e string) bool { return strings.Contains(strings.ToLower(strings.SplitN(e, "=", 2)[0]), "_proxy") })
	c.Env = append(append(c.Env, "SSL_CERT_FILE="+s.cloud.CAFile), environ...)
	out, err := c.Output()
	if e := json.Unmarshal(out, &r); e != nil {
		s.t.Fatalf("%v: %v\n%s", c.Args, err, out)
	}
	if c.ProcessState.ExitCode() != map[bool]int{true: 0, false: 1}[r.Healthy] && !slices.ContainsFunc(environ, func(e string) bool { return strings.HasPrefix(e, doctorOffset) }) {
		s.t.Errorf("healthy is %v, and the exit status %d", r.Healthy, c.ProcessState.ExitCode())
	}
	return r
}

// closed waits until no window is open.
func (s *stage) closed() {
	s.t.Helper()
	s.patiently("all windows closed", func() bool {
		for _, m := range []string{"open4", "seq4", "open6", "seq6"} {
			out, _ := s.Bastion.Command(s.ctx, "nft", "list", "map", "inet", "perimeterd", m).CombinedOutput()
			if strings.Contains(string(out), "elements") {
				return false
			}
		}
		return true
	})
}

// diagnosed wants these codes among the report's problems and warnings, and no other problem. Warnings are written with a
// question mark, and may be there or not.
func (s *stage) diagnosed(what string, r client.Report, codes ...string) {
	s.t.Helper()
	var said []string
	good := true
	for _, f := range r.Findings {
		said = append(said, f.String())
		if f.Status != client.Well && !slices.Contains(codes, f.Code) && !slices.Contains(codes, f.Code+"?") {
			good = false
		}
	}
	for _, c := range codes {
		good = good && (strings.HasSuffix(c, "?") || slices.ContainsFunc(r.Findings, func(f client.Finding) bool { return f.Code == c }))
	}
	if text := strings.Join(said, "\n"); !good {
		s.t.Errorf("%s: want %v, and it says\n%s", what, codes, text)
	} else {
		s.t.Logf("%s:\n%s", what, text)
	}
}

// lose drops what the client sends and is true of a packet's protocol, destination port and length from the IP header on.
func (s *stage) lose(rule func(proto byte, port uint16, length int) bool) {
	s.Link.SetLoss(func(p lab.Packet) bool {
		b := p.Data
		if p.Direction != lab.FromClient || len(b) < 28 || b[0] != 0x45 {
			return false
		}
		return rule(b[9], uint16(b[22])<<8|uint16(b[23]), len(b))
	})
}

func gateUDP(proto byte, port uint16, _ int) bool { return proto == unix.IPPROTO_UDP && port == 1194 }

func TestDoctorSaysWhereTheWayEnds(t *testing.T) {
	s := newClinic(t)
	s.diagnosed("healthy, tunnel down", s.doctor(s.alice, nil))
	if out := s.perimeterd("sessions", "--json"); strings.Contains(out, "alice") {
		t.Errorf("the doctor left a session: %s", out)
	}
	ordinary := s.alice.VPN(s.ctx, "doctor", "--json")
	s.ok(s.Client.Command(s.ctx, "chown", "-R", "65534:65534", s.alice.Home))
	ordinary.SysProcAttr.Credential = &syscall.Credential{Uid: 65534, Gid: 65534}
	s.diagnosed("healthy, as an ordinary user", s.examine(ordinary, nil))
	s.ok(s.Client.Command(s.ctx, "chown", "-R", "0:0", s.alice.Home))

	// Both families in turn, through one socket of the bastion's.
	six := s.edited("six", func(p *client.Profile) {
		p.Endpoints, p.KnockSecret, p.KnockStep = []string{"[2001:db8:18:1::1]:1194"}, "", ""
	})
	four := s.edited("four", func(p *client.Profile) { p.KnockSecret, p.KnockStep = "", "" })
	for range 2 {
		s.diagnosed("healthy, over IPv6", s.doctor(six, nil))
		s.diagnosed("healthy, over IPv4", s.doctor(four, nil))
	}

	s.lose(gateUDP)
	s.diagnosed("UDP blocked", s.doctor(s.alice, nil), client.CodeUDP)
	// Where tokens pass, a handshake finds out.
	s.lose(func(proto byte, port uint16, length int) bool { return gateUDP(proto, port, length) && length != 28+16 })
	s.diagnosed("WireGuard blocked, tokens not", s.doctor(s.alice, nil), client.CodeUDP)

	s.lose(func(proto byte, _ uint16, _ int) bool { return proto != unix.IPPROTO_ICMP })
	s.diagnosed("nothing answers", s.doctor(s.alice, nil), client.CodeUnanswered)
	s.Link.SetLoss(nil)

	if err := s.daemon.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	s.diagnosed("daemon frozen", s.doctor(s.alice, nil), client.CodeGateSilent)
	s.daemon.Signal(syscall.SIGCONT)
	s.daemon.Signal(syscall.SIGKILL)
	s.daemon.Wait()
	s.diagnosed("daemon killed", s.doctor(s.alice, nil), client.CodeGateDown)
	if err := s.daemon.Start(s.ctx); err != nil {
		t.Fatal(err)
	}
	s.ok(s.Client.Command(s.ctx, "ip", "link", "set", "outside", "down"))
	s.diagnosed("no network", s.doctor(s.alice, nil), client.CodeNoNetwork)
	s.ok(s.Client.Command(s.ctx, "ip", "link", "set", "outside", "up"))

	for what, rule := range map[string]string{"drops everything": "ip daddr 198.18.1.1", "drops UDP": "udp dport 1194"} {
		s.ok(s.Client.Command(s.ctx, "nft", "add table inet own; add chain inet own out { type filter hook output priority 0; }; add rule inet own out "+rule+" drop"))
		s.diagnosed("a firewall here "+what, s.doctor(s.alice, nil), client.CodeLocalDrop, client.CodeUDP+"?")
		s.ok(s.Client.Command(s.ctx, "nft", "delete table inet own"))
	}
	lost := s.edited("lost", func(p *client.Profile) { p.Endpoints = []string{"no-such-name.example.com:1194"} })
	s.diagnosed("a name that nobody knows", s.doctor(lost, nil), client.CodeNoName)
	two := s.edited("two", func(p *client.Profile) { p.Endpoints = []string{"198.18.1.99:1194", p.Endpoints[0]} })
	r := s.doctor(two, nil)
	s.diagnosed("the first of two endpoints is gone", r, client.CodeNoNetwork+"?", client.CodeUnanswered+"?")
	if !r.Healthy || !slices.ContainsFunc(r.Findings, func(f client.Finding) bool { return f.Status == client.Warning }) {
		t.Errorf("where the second endpoint does, the first is worth a warning: %+v", r)
	}
	s.diagnosed("healthy again", s.doctor(s.alice, nil))
}

// edited is a user with a changed copy of a profile: that of his name, or alice's.
func (s *stage) edited(name string, change func(*client.Profile)) *lab.User {
	s.t.Helper()
	file := filepath.Join(s.Dir, name+".profile")
	source := file
	if _, err := os.Stat(file); err != nil {
		source = filepath.Join(s.Dir, "alice.profile")
	}
	p := s.profile(source)
	change(p)
	text, err := toml.Marshal(p)
	if err != nil {
		s.t.Fatal(err)
	}
	if err := os.WriteFile(file, text, 0o600); err != nil {
		s.t.Fatal(err)
	}
	u, err := s.NewUser(s.ctx, s.Client, file)
	if err != nil {
		s.t.Fatal(err)
	}
	return u
}

func TestDoctorTellsClockFromCertificate(t *testing.T) {
	s := newClinic(t)
	for _, off := range []time.Duration{4 * time.Minute, -time.Hour} {
		r := s.doctorAt(s.alice, off)
		s.diagnosed(fmt.Sprintf("clock off by %v", off), r, client.CodeClock, client.CodeTokens)
		if r.Offset == nil || *r.Offset < off.Seconds()-10 || *r.Offset > off.Seconds()+10 {
			t.Errorf("off by %v, and it says %v s", off, r.Offset)
		}
	}
	// To a clock that is years off neither certificate is valid, and both are.
	s.diagnosed("clock years slow", s.doctorAt(s.alice, -3*365*24*time.Hour), client.CodeClock, client.CodeTokens)
	s.diagnosed("clock years fast", s.doctorAt(s.alice, 30*365*24*time.Hour), client.CodeClock, client.CodeTokens)
	// Without a sequence, tokens of earlier times open. Each has a user's of his own, of which none is spent.
	for i, off := range []time.Duration{7 * time.Minute, 2 * time.Hour} {
		name := fmt.Sprintf("bare%d", i)
		if _, err := s.daemon.AddUser(s.ctx, name); err != nil {
			t.Fatal(err)
		}
		bare := s.edited(name, func(p *client.Profile) { p.Sequence = nil })
		s.diagnosed(fmt.Sprintf("clock off by %v, no sequence", off), s.doctorAt(bare, off), client.CodeClock, client.CodeTokens)
		s.diagnosed("clock right", s.doctorAt(bare, 0), client.CodeTokens+"?")
		if i == 0 { // by hours, the certificate tells
			s.diagnosed("clock slow, no sequence", s.doctorAt(bare, -off), client.CodeUnanswered)
		}
	}

	early := s.edited("early", func(p *client.Profile) { p.Certificate = s.resigned(p.Certificate, time.Hour, 2*time.Hour) })
	s.diagnosed("certificate of tomorrow", s.doctor(early, nil), client.CodeNotYet, client.CodeTokens+"?")
	late := s.edited("late", func(p *client.Profile) { p.Certificate = s.resigned(p.Certificate, -2*time.Hour, -time.Hour) })
	s.diagnosed("certificate of yesterday", s.doctor(late, nil), client.CodeExpired, client.CodeTokens+"?")
	soon := s.edited("soon", func(p *client.Profile) { p.Certificate = s.resigned(p.Certificate, -100*time.Hour, time.Hour) })
	if r := s.doctor(soon, nil); !r.Healthy {
		s.diagnosed("certificate of an hour more", r, client.CodeEndsSoon)
	}
	if out, err := s.daemon.Perimeterd(s.ctx, "user", "revoke", "alice"); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	s.diagnosed("revoked", s.doctor(s.alice, nil), client.CodeRevoked, client.CodeTokens+"?")
}

// resigned is a certificate of the same key, valid from and until so long after now.
func (s *stage) resigned(cert string, from, until time.Duration) string {
	s.t.Helper()
	read := func(file string) *pem.Block {
		text, err := os.ReadFile(filepath.Join(s.daemon.Dir, "pki", file))
		if err != nil {
			s.t.Fatal(err)
		}
		block, _ := pem.Decode(text)
		return block
	}
	ca, err := x509.ParseCertificate(read("ca.crt").Bytes)
	if err != nil {
		s.t.Fatal(err)
	}
	key, err := x509.ParsePKCS8PrivateKey(read("ca.key").Bytes)
	if err != nil {
		s.t.Fatal(err)
	}
	block, _ := pem.Decode([]byte(cert))
	old, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		s.t.Fatal(err)
	}
	old.SerialNumber = new(big.Int).Add(old.SerialNumber, big.NewInt(1))
	old.NotBefore, old.NotAfter = time.Now().Add(from), time.Now().Add(until)
	der, err := x509.CreateCertificate(rand.Reader, old, ca, old.PublicKey, key)
	if err != nil {
		s.t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

func TestDoctorLooksThroughTheTunnel(t *testing.T) {
	s := newClinic(t)
	// It is asked more often than there are tokens.
	diagnosed := func(what string, r client.Report, codes ...string) {
		t.Helper()
		s.diagnosed(what, r, append(codes, client.CodeTokens+"?")...)
	}
	s.ok(s.alice.VPN(s.ctx, "up"))
	s.awaitTransport("udp") // a busy machine may take the stream's packets first, and then for some seconds all
	before := s.status(s.alice)
	diagnosed("healthy, tunnel up", s.doctor(s.alice, nil, cloudName))
	if after := s.status(s.alice); after.Session != before.Session || strings.Count(s.perimeterd("sessions"), "alice") != 1 {
		t.Errorf("the session is another, or one of several:\n%s", s.perimeterd("sessions"))
	}
	diagnosed("a destination that no rule names", s.doctor(s.alice, nil, "evil.example.com"), client.CodeProxyRefused)
	diagnosed("a destination that does not exist", s.doctor(s.alice, nil, "nobody.us-east-1.amazonaws.com"), client.CodeProxyRefused)
	r := s.doctor(s.alice, nil, "evil.example.com")
	if i := slices.IndexFunc(r.Findings, func(f client.Finding) bool { return f.Code == client.CodeProxyRefused }); !strings.Contains(r.Findings[i].Text, "no-rule") ||
		!strings.Contains(r.Findings[i].Fix, "perimeterd why ") {
		t.Errorf("%+v", r.Findings[i])
	}
	right := "https_proxy=http://10.77.0.1:3128"
	diagnosed("the environment of vpn env", s.doctor(s.alice, []string{right, "HTTPS_PROXY=http://10.77.0.1:3128", "NO_PROXY=localhost,127.0.0.1,::1,169.254.169.254,169.254.170.2"}))
	diagnosed("the environment that vpn env prints", s.doctor(s.alice, []string{"https_proxy=" + s.status(s.alice).Listen.String()}))
	diagnosed("NO_PROXY leaks", s.doctor(s.alice, []string{right, "NO_PROXY=localhost,.amazonaws.com"}), client.CodeLeak)
	diagnosed("another proxy", s.doctor(s.alice, []string{"HTTPS_PROXY=http://me:secret@proxy.corp.example:8080"}), client.CodeBypass)
	if r := s.doctor(s.alice, []string{"HTTPS_PROXY=http://me:secret@proxy.corp.example:8080"}); strings.Contains(fmt.Sprint(r), "secret") {
		t.Errorf("it shows a password: %+v", r)
	}
	if err := os.MkdirAll(filepath.Join(s.alice.Home, ".aws"), 0o700); err != nil {
		t.Fatal(err)
	}
	keys := filepath.Join(s.alice.Home, ".aws", "credentials")
	if err := os.WriteFile(keys, []byte("[prod]\naws_access_key_id = AKIAEXAMPLE\naws_secret_access_key = example\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if r := s.doctor(s.alice, nil); !r.Healthy {
		t.Error("keys in plain text are a warning")
	} else {
		diagnosed("keys in plain text", r, client.CodeKeys)
	}
	os.Remove(keys)

	// The bastion leaves from another address than the profile promises.
	if err := s.daemon.Set(lab.Setting{Key: "bind", Value: `"198.19.1.1"`}); err != nil {
		t.Fatal(err)
	}
	s.perimeterd("apply")
	diagnosed("another egress address", s.doctor(s.alice, nil), client.CodeEgress)
	s.lose(gateUDP)
	s.curl("--max-time", "5", "https://"+cloudName+"/").Run() // what is not answered shows it
	s.awaitTransport("tls")
	diagnosed("UDP blocked while the tunnel is up", s.doctor(s.alice, nil), client.CodeUDP, client.CodeEgress)
	s.Link.SetLoss(nil)
	s.ok(s.alice.VPN(s.ctx, "down"))
}
