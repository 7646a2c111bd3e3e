package e2e

import (
	"context"
	"encoding/base64"
	"encoding/hex"
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
	"perimeterd/vpn"
	"perimeterd/vpn/client"
)

// external is a stage whose CA is Debian's easy-rsa, as it served OpenVPN. Its users are alice and bob, who are on the list
// of who may come in, and carol, who is not.
type external struct {
	*stage
	ca      *lab.EasyRSA
	allowed string // file
	crl     string // the same
}

func newExternal(t *testing.T, settings ...lab.Setting) *external {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	t.Cleanup(cancel)
	s := &external{stage: &stage{Lab: lab.Start(t, lab.Options{}), t: t, ctx: ctx}}
	var err error
	if s.cloud, err = s.StartCloud(lab.CloudOptions{Names: []string{cloudName}}); err != nil {
		t.Fatal(err)
	}
	if s.ca, err = lab.NewEasyRSA(ctx, s.Dir, "EASYRSA_ALGO=ec"); err != nil {
		t.Fatal(err)
	}
	s.allowed, s.crl = filepath.Join(s.Dir, "allowed-users"), s.ca.Path("crl.pem")
	settings = append([]lab.Setting{
		{Key: "ca", Value: fmt.Sprintf("%q", s.ca.Path("ca.crt"))}, {Key: "ca_key", Value: `""`},
		{Key: "cert", Value: fmt.Sprintf("%q", s.ca.Path("issued/gate.crt"))}, {Key: "key", Value: fmt.Sprintf("%q", s.ca.Path("private/gate.key"))},
		{Key: "crl", Value: fmt.Sprintf("%q", s.crl)}, {Key: "allowed", Value: fmt.Sprintf("%q", s.allowed)},
	}, settings...)
	if s.daemon, err = s.NewDaemon(ctx, settings...); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the daemon's log:\n%s", s.daemon.Log())
		}
	})
	id := s.serverID()
	s.easyrsa("--subject-alt-name=DNS:"+id+",IP:"+s.Bastion.Addr.String(), "build-server-full", "gate", "nopass")
	for _, name := range []string{"alice", "bob", "carol"} {
		s.easyrsa("build-client-full", name, "nopass")
	}
	s.easyrsa("gen-crl")
	s.write(s.allowed, "# who may use the VPN\nCN=alice\nCN=bob\n")
	return s
}

func (s *external) start() {
	s.t.Helper()
	if err := s.daemon.Start(s.ctx); err != nil {
		s.t.Fatal(err)
	}
}

func (s *external) restart() {
	s.t.Helper()
	if err := s.daemon.Signal(syscall.SIGTERM); err != nil {
		s.t.Fatal(err)
	}
	s.daemon.Wait()
	s.start()
}

func (s *external) serverID() string {
	s.t.Helper()
	id, err := identity.ReadServerID(filepath.Join(s.daemon.Dir, "pki/server.id"))
	if err != nil {
		s.t.Fatal(err)
	}
	return hex.EncodeToString(id[:])
}

func (s *external) easyrsa(args ...string) {
	s.t.Helper()
	if err := s.ca.Run(s.ctx, args...); err != nil {
		s.t.Fatal(err)
	}
}

func (s *external) openssl(args ...string) string {
	s.t.Helper()
	out, err := exec.CommandContext(s.ctx, "openssl", args...).CombinedOutput()
	if err != nil {
		s.t.Fatalf("openssl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// shortCRL is a new CRL of the CA that is good for some seconds.
func (s *external) shortCRL(seconds int) {
	s.t.Helper()
	s.openssl("ca", "-gencrl", "-config", s.ca.Path("safessl-easyrsa.cnf"), "-keyfile", s.ca.Path("private/ca.key"), "-cert", s.ca.Path("ca.crt"),
		"-crlexts", "crl_ext", "-crlsec", fmt.Sprint(seconds), "-out", s.crl+".new")
	if err := os.Rename(s.crl+".new", s.crl); err != nil {
		s.t.Fatal(err)
	}
}

func (s *external) write(path, text string) {
	s.t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
}

func (s *external) read(path string) []byte {
	s.t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		s.t.Fatal(err)
	}
	return data
}

func (s *external) problems() string {
	s.t.Helper()
	out, err := s.daemon.Perimeterd(s.ctx, "status")
	if err != nil {
		s.t.Fatalf("%v\n%s", err, out)
	}
	var all []string
	for line := range strings.Lines(out) {
		if p, ok := strings.CutPrefix(line, "problem"); ok {
			all = append(all, strings.TrimSpace(p))
		}
	}
	return strings.Join(all, "\n")
}

// knock is knockd's, and returns when the window is open.
func (s *external) knock(from *lab.Namespace) {
	s.t.Helper()
	n := len(s.daemon.Entries("window opened"))
	s.ok(from.Command(s.ctx, "/usr/bin/knock", append([]string{"-d", "20", s.Bastion.Addr.String()}, s.sequence()...)...))
	if _, err := s.daemon.Await(s.ctx, "window opened", n+1); err != nil {
		s.t.Fatal(err)
	}
}

// asks prepares stock curl with a certificate, asking the gate for its sessions.
func (s *external) asks(crt, key string) *lab.Cmd {
	return s.Client.Command(s.ctx, "curl", "-sS", "--max-time", "5", "--cacert", s.ca.Path("ca.crt"), "--cert", crt, "--key", key,
		fmt.Sprintf("https://%v:1194%s", s.Bastion.Addr, vpn.SessionPath))
}

func (s *external) asksAs(name string) *lab.Cmd {
	return s.asks(s.ca.Path("issued/"+name+".crt"), s.ca.Path("private/"+name+".key"))
}

// refused has stock curl ask with a certificate, and wants a line of the log that says why not.
func (s *external) refused(c *lab.Cmd, msg, want string) {
	s.t.Helper()
	before := len(s.daemon.Log())
	s.fails(c)
	s.await(fmt.Sprintf("%q for %q", msg, want), func() bool {
		for line := range strings.Lines(s.daemon.Log()[before:]) {
			if strings.Contains(line, `"msg":"`+msg+`"`) && strings.Contains(line, want) {
				return true
			}
		}
		return false
	})
}

// user makes a profile out of what the user has from the CA, and imports it at a host, in a home that is the file's.
func (s *external) user(name string, at *lab.Namespace, home string) *lab.User {
	s.t.Helper()
	raw, err := identity.ReadKey(filepath.Join(s.daemon.Dir, "pki/wireguard.key"))
	if err != nil {
		s.t.Fatal(err)
	}
	public, err := identity.PublicKey(raw)
	if err != nil {
		s.t.Fatal(err)
	}
	text, err := toml.Marshal(client.Profile{
		Version: client.ProfileVersion, User: name, Endpoints: []string{s.Bastion.Addr.String() + ":1194"}, TunnelPort: 1194,
		ServerID: s.serverID(), ServerPublicKey: base64.StdEncoding.EncodeToString(public[:]), Sequence: s.sequence(), Egress: []string{},
		CA: string(s.read(s.ca.Path("ca.crt"))), Certificate: string(s.read(s.ca.Path("issued/" + name + ".crt"))), Key: string(s.read(s.ca.Path("private/" + name + ".key"))),
	})
	if err != nil {
		s.t.Fatal(err)
	}
	file := filepath.Join(s.Dir, home+".profile")
	s.write(file, string(text))
	u, err := s.NewUser(s.ctx, at, file)
	if err != nil {
		s.t.Fatal(err)
	}
	return u
}

// download is a slow one of a user, through the tunnel.
type download struct {
	s *external
	n int // of the cloud host's requests
}

func (s *external) download(u *lab.User) download {
	s.t.Helper()
	d := download{s, len(s.cloud.Requests())}
	c := u.Command(s.ctx, "curl", "-sS", "--cacert", s.cloud.CAFile, "-x", "http://10.77.0.1:3128", "-o", os.DevNull, "--limit-rate", "100k", "https://"+cloudName+"/bytes/100000000")
	if err := c.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.await("the download begins", func() bool {
		r := s.cloud.Requests()
		return len(r) > d.n && r[d.n].Sent > 0
	})
	return d
}

func (d download) done() bool { return d.s.cloud.Requests()[d.n].Done }

func (d download) goesOn() {
	d.s.t.Helper()
	if d.done() {
		d.s.t.Fatal("the download was cut")
	}
}

func (d download) isCut() {
	d.s.t.Helper()
	d.s.await("the download is cut", d.done)
}

func TestStockCurlWithCertificatesOfAnEasyRSAAuthority(t *testing.T) {
	s := newExternal(t)
	if out, err := s.daemon.Perimeterd(s.ctx, "check"); err != nil || !strings.Contains(out, "ok       external CA: CRL of CN=Example VPN CA until ") {
		t.Errorf("check: %v\n%s", err, out)
	}
	s.start()
	if p := s.problems(); p != "" {
		t.Errorf("problems: %s", p)
	}
	s.knock(s.Client)
	for _, name := range []string{"alice", "bob"} {
		if got := strings.TrimSpace(s.ok(s.asksAs(name))); got != "[]" {
			t.Errorf("%s: %s", name, got)
		}
	}
	s.refused(s.asksAs("carol"), "certificate refused", `"reason":"not_allowed","err":"its subject \"CN=carol\" is not on the list`)
	s.refused(s.asksAs("gate"), "handshake failed", "incompatible key usage")

	// What OpenSSL makes of the same authority, and of another.
	key := filepath.Join(s.Dir, "openssl.key")
	s.openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key)
	other, err := lab.NewEasyRSA(s.ctx, filepath.Join(s.Dir, "home-other"), "EASYRSA_ALGO=ec")
	if err != nil {
		t.Fatal(err)
	}
	issue := func(ca *lab.EasyRSA, subject, usage string, args ...string) *lab.Cmd {
		t.Helper()
		csr, ext, crt := filepath.Join(s.Dir, "openssl.csr"), filepath.Join(s.Dir, "openssl.ext"), filepath.Join(s.Dir, "openssl.crt")
		s.openssl("req", "-new", "-key", key, "-subj", subject, "-out", csr)
		s.write(ext, "keyUsage=digitalSignature\n"+usage)
		s.openssl(append([]string{"x509", "-req", "-in", csr, "-CA", ca.Path("ca.crt"), "-CAkey", ca.Path("private/ca.key"), "-CAcreateserial", "-extfile", ext, "-out", crt}, args...)...)
		return s.asks(crt, key)
	}
	const good = "extendedKeyUsage=clientAuth\n"
	s.ok(issue(s.ca, "/CN=alice", good, "-days", "9"))
	s.refused(issue(s.ca, "/CN=alice", "", "-days", "9"), "certificate refused", `"user":"alice","source":"198.18.1.2:`)
	s.refused(issue(s.ca, "/CN=alice", "", "-days", "9"), "certificate refused", `"reason":"no_client_auth","err":"its extended key usage must state clientAuth`)
	s.refused(issue(s.ca, "/CN=alice", "extendedKeyUsage=anyExtendedKeyUsage\n", "-days", "9"), "certificate refused", `"reason":"no_client_auth"`)
	s.refused(issue(s.ca, "/CN=alice", good, "-days", "0"), "handshake failed", "certificate has expired")
	s.refused(issue(other, "/CN=alice", good, "-days", "9"), "handshake failed", "certificate signed by unknown authority")
	for _, subject := range []string{"/O=x/CN=alice", "/CN=alice/O=x", "/CN=Alice", "/O=CN=alice/CN=mallory", "/CN=alice, CN=bob", "/CN=alice2", "/CN=lice"} {
		s.refused(issue(s.ca, subject, good, "-days", "9"), "certificate refused", `"reason":"not_allowed"`)
	}
}

func TestANewCRLAndAShorterListCutLiveSessions(t *testing.T) {
	s := newExternal(t)
	s.start()
	laptop, err := s.AddHost(s.ctx, "laptop")
	if err != nil {
		t.Fatal(err)
	}
	alice, bob := s.user("alice", s.Client, "alice"), s.user("bob", laptop, "bob")
	s.ok(alice.VPN(s.ctx, "up"))
	s.ok(bob.VPN(s.ctx, "up"))
	hers, his := s.download(alice), s.download(bob)

	// A CRL that is written in place and stays half: the last good one goes on.
	whole := s.read(s.crl)
	s.write(s.crl, string(whole[:len(whole)/2]))
	s.await("the torn CRL is told of", func() bool {
		return strings.Contains(s.problems(), s.crl+": 1 of 1 CRLs in it are cut short or damaged")
	})
	hers.goesOn()
	his.goesOn()
	s.knock(s.Client)
	s.ok(s.asksAs("bob"))

	s.easyrsa("revoke", "bob") // which moves his certificate
	s.easyrsa("gen-crl")
	began := time.Now()
	his.isCut()
	t.Logf("cut %v after the CRL was written", time.Since(began).Round(time.Millisecond))
	e, err := s.daemon.Await(s.ctx, "session ended", 1)
	if err != nil || e[0]["user"] != "bob" || e[0]["reason"] != "revoked" {
		t.Errorf("%v %v", e, err)
	}
	if e := s.daemon.Entries("a session's certificate is not let in any more"); len(e) != 1 || e[0]["reason"] != "revoked" || !strings.HasPrefix(fmt.Sprint(e[0]["err"]), "it was revoked by CN=Example VPN CA on ") {
		t.Errorf("%v", e)
	}
	if p := s.problems(); p != "" {
		t.Errorf("problems: %s", p)
	}
	hers.goesOn()
	s.fails(bob.Command(s.ctx, "curl", "-sS", "--max-time", "3", "-x", "http://10.77.0.1:3128", "https://"+cloudName+"/"))
	s.await("his client says why", func() bool {
		out, _ := bob.VPN(s.ctx, "status").CombinedOutput()
		return strings.Contains(string(out), "revoked")
	})

	// A list with an error changes nothing; without her it ends her session.
	s.write(s.allowed, "CN=carol\nalice\n")
	s.await("the bad list is told of", func() bool { return strings.Contains(s.problems(), s.allowed+`:2: "alice" is no TYPE=VALUE`) })
	hers.goesOn()
	s.write(s.allowed, "CN=carol\n")
	began = time.Now()
	hers.isCut()
	t.Logf("cut %v after the list was written", time.Since(began).Round(time.Millisecond))
	s.refused(s.asksAs("alice"), "certificate refused", `"reason":"not_allowed"`)
	s.ok(s.asksAs("carol"))
	if out, err := s.daemon.Perimeterd(s.ctx, "sessions"); err != nil || strings.Contains(out, "10.77.") {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestExpiredCRLClosesAndANewOneOpensWithoutARestart(t *testing.T) {
	t.Parallel() // it waits for an expiry
	s := newExternal(t, lab.Setting{Key: "metrics", Value: `"127.0.0.1:9617"`})
	s.start()
	alice := s.user("alice", s.Client, "alice")
	s.ok(alice.VPN(s.ctx, "up"))
	hers := s.download(alice)
	s.shortCRL(10)
	if _, err := s.daemon.Await(s.ctx, "CRL in force", 2); err != nil {
		t.Fatal(err)
	}
	hers.isCut()
	if e := s.daemon.Entries("a session's certificate is not let in any more"); len(e) != 1 || e[0]["reason"] != "no_crl" {
		t.Errorf("%v", e)
	}
	s.knock(s.Client)
	s.refused(s.asksAs("alice"), "certificate refused", `"reason":"no_crl","err":"the gate's CRL of its issuer CN=Example VPN CA expired on `)
	want := s.crl + ": the CRL of CN=Example VPN CA expired on "
	if p := s.problems(); !strings.Contains(p, want) {
		t.Errorf("problems: %s", p)
	}
	metrics := s.ok(s.Bastion.Command(s.ctx, "curl", "-sS", "http://127.0.0.1:9617/metrics"))
	for _, want := range []string{"\nperimeterd_identity_problems 1\n", "\nperimeterd_crl_next_update_timestamp_seconds{issuer=\"CN=Example VPN CA\"} "} {
		if !strings.Contains(metrics, want) {
			t.Errorf("no %q in the metrics", want)
		}
	}
	if e := s.daemon.Entries("problem of an identity file"); len(e) != 1 || e[0]["level"] != "ERROR" || !strings.HasPrefix(fmt.Sprint(e[0]["err"]), want) {
		t.Errorf("%v", e)
	}

	// A start finds it expired: the door is up, and closed, and says why.
	s.restart()
	s.knock(s.Client)
	s.refused(s.asksAs("alice"), "certificate refused", `"reason":"no_crl"`)
	if p := s.problems(); !strings.Contains(p, want) {
		t.Errorf("problems: %s", p)
	}
	if out, err := s.daemon.Perimeterd(s.ctx, "check"); err == nil || !strings.Contains(out, "problem  external CA: "+want) {
		t.Errorf("check: %v\n%s", err, out)
	}
	s.easyrsa("gen-crl")
	s.await("the new CRL opens", func() bool { return s.asksAs("alice").Run() == nil })
	if p := s.problems(); p != "" {
		t.Errorf("problems: %s", p)
	}
}

func TestWhatTheFilesSayMeanwhileCountsAtTheStart(t *testing.T) {
	s := newExternal(t)
	s.start()
	laptop, err := s.AddHost(s.ctx, "laptop")
	if err != nil {
		t.Fatal(err)
	}
	alice, bob := s.user("alice", s.Client, "alice"), s.user("bob", laptop, "bob")
	s.ok(alice.VPN(s.ctx, "up"))
	s.ok(bob.VPN(s.ctx, "up"))
	sessions := func() string {
		t.Helper()
		out, err := s.daemon.Perimeterd(s.ctx, "sessions")
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return out
	}
	if err := s.daemon.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	s.daemon.Wait()
	s.easyrsa("revoke", "bob")
	s.easyrsa("gen-crl")
	s.start()
	if out := sessions(); strings.Contains(out, "bob") || !strings.Contains(out, "alice") {
		t.Errorf("sessions after the start:\n%s", out)
	}
}

// The operator's word is above the CA's: nobody need find the CA's key at three in the morning.
func TestUserRevokeActsOnUsersThatOnlyTheListKnows(t *testing.T) {
	s := newExternal(t)
	s.start()
	alice := s.user("alice", s.Client, "alice")
	s.ok(alice.VPN(s.ctx, "up"))
	hers := s.download(alice)
	if out, err := s.daemon.Perimeterd(s.ctx, "user", "revoke", "mallory"); err == nil || !strings.Contains(out, `user "mallory" is not known here`) {
		t.Errorf("%v\n%s", err, out)
	}
	if out, err := s.daemon.Perimeterd(s.ctx, "user", "revoke", "alice"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	revoked := time.Now()
	hers.isCut()
	s.knock(s.Client)
	s.refused(s.asksAs("alice"), "certificate refused", `"reason":"revoked","err":"the user was revoked`)
	s.restart()
	s.knock(s.Client)
	s.refused(s.asksAs("alice"), "certificate refused", `"reason":"revoked"`)

	// In again: with a new certificate only.
	if out, err := s.daemon.Perimeterd(s.ctx, "user", "add", "alice", "--group", "operators"); err != nil || !strings.Contains(out, "certificates issued before then stay out") {
		t.Fatalf("%v\n%s", err, out)
	}
	s.refused(s.asksAs("alice"), "certificate refused", `"reason":"revoked","err":"it was issued on `)
	s.easyrsa("revoke", "alice")
	s.await("the next second", func() bool { return time.Now().Truncate(time.Second).After(revoked) }) // certificates count whole ones
	s.easyrsa("build-client-full", "alice", "nopass")
	s.easyrsa("gen-crl")
	s.await("her new certificate is let in", func() bool { return s.asksAs("alice").Run() == nil })
	s.ok(alice.VPN(s.ctx, "down"))
	s.ok(s.user("alice", s.Client, "again").VPN(s.ctx, "up"))
	if out, err := s.daemon.Perimeterd(s.ctx, "sessions", "--json"); err != nil || !strings.Contains(out, `"operators"`) {
		t.Errorf("%v\n%s", err, out)
	}
}

// The guide's commands are run as they stand there, in the lab's directories, with its addresses.
func TestTheMigrationGuideIsRight(t *testing.T) {
	s := &external{stage: &stage{Lab: lab.Start(t, lab.Options{}), t: t}}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	t.Cleanup(cancel)
	s.ctx = ctx
	var err error
	// What is there before.
	openvpn := filepath.Join(s.Dir, "openvpn")
	if err := os.Mkdir(openvpn, 0o700); err != nil {
		t.Fatal(err)
	}
	if s.ca, err = lab.NewEasyRSA(s.ctx, openvpn); err != nil {
		t.Fatal(err)
	}
	s.write(filepath.Join(openvpn, "allowed-users"), "# OpenVPN's\nCN=alice\nCN=carol\n")
	for _, name := range []string{"alice", "carol"} {
		s.easyrsa("build-client-full", name, "nopass")
	}
	if s.daemon, err = s.NewDaemon(s.ctx); err != nil { // init, with the lab's addresses
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the daemon's log:\n%s", s.daemon.Log())
		}
	})
	laptop := filepath.Join(s.Dir, "home-laptop")
	if err := os.Mkdir(laptop, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{"ca.crt", "issued/alice.crt", "private/alice.key"} {
		s.write(filepath.Join(laptop, filepath.Base(file)), string(s.read(s.ca.Path(file))))
	}

	bin, err := lab.Bin("perimeterd")
	if err != nil {
		t.Fatal(err)
	}
	vpnBin, err := lab.Bin("vpn")
	if err != nil {
		t.Fatal(err)
	}
	guide := strings.NewReplacer(
		`"31204", "55773", "4393", "19712"`, `"`+strings.Join(s.sequence(), `", "`)+`"`, "    vpn ", "    "+vpnBin+" ",
		"/etc/openvpn", openvpn, "/etc/perimeterd", s.daemon.Dir, "DNS:bastion.example.com", "IP:"+s.Bastion.Addr.String(), "bastion.example.com", s.Bastion.Addr.String(),
		"31204 55773 4393 19712", strings.Join(s.sequence(), " "), "    knock ", "    /usr/bin/knock -d 20 ", "    perimeterd ", "    "+bin+" --config "+s.daemon.Config+" ",
		"./easyrsa ", "./easyrsa --batch ", "curl --", "curl -sS --max-time 5 --",
	).Replace(string(s.read("../../../docs/migrate-openvpn.md")))
	run := func(at *lab.Namespace, block string) string {
		t.Helper()
		c := at.Command(s.ctx, "bash", "-euo", "pipefail", "-c", block)
		c.Dir, c.Env = laptop, append(os.Environ(), "HOME="+laptop, "XDG_CONFIG_HOME="+laptop+"/.config", "XDG_RUNTIME_DIR="+laptop)
		return s.ok(c)
	}
	blocks := map[string][]string{}
	section, inside := "", false
	for line := range strings.Lines(guide) {
		code, is := strings.CutPrefix(line, "    ")
		switch title, heading := strings.CutPrefix(line, "## "); {
		case heading:
			section = strings.TrimSpace(title)
		case is && !inside:
			blocks[section] = append(blocks[section], code)
		case is:
			blocks[section][len(blocks[section])-1] += code
		}
		inside = is
	}
	bastion, atLaptop, client, then := blocks["On the bastion"], blocks["On a laptop"], blocks["Our client"], blocks["From then on"]
	if len(bastion) != 4 || len(atLaptop) != 1 || len(client) != 2 || len(then) != 1 || !strings.Contains(bastion[0], " init ") || strings.Count(bastion[3], "\n") != 3 {
		t.Fatalf("the guide has other blocks: %q", blocks)
	}
	run(s.Bastion, bastion[1])
	var settings []lab.Setting
	for line := range strings.Lines(strings.TrimPrefix(bastion[2], "[identity]\n")) {
		key, value, _ := strings.Cut(line, "=")
		settings = append(settings, lab.Setting{Key: strings.TrimSpace(key), Value: strings.TrimSpace(value)})
	}
	if err := s.daemon.Set(settings...); err != nil || len(settings) != 6 {
		t.Fatal(settings, err)
	}
	before, isRun := strings.CutSuffix(bastion[3], s.daemon.Config+" run\n")
	if !isRun {
		t.Fatalf("the last command is not run: %s", bastion[3])
	}
	if out := run(s.Bastion, strings.TrimSuffix(before, bin+" --config ")); strings.Contains(out, "problem") {
		t.Errorf("check: %s", out)
	}
	s.start()
	if out := run(s.Client, atLaptop[0]); !strings.Contains(out, `"user":"alice"`) {
		t.Errorf("%s", out)
	}
	run(s.Bastion, client[0])
	run(s.Client, client[1])
	run(s.Bastion, then[0])
	s.await("alice is out, bob is in", func() bool {
		return len(s.daemon.Entries("session ended")) == 2 && s.asksAs("bob").Run() == nil
	})
	s.refused(s.asks(filepath.Join(laptop, "alice.crt"), filepath.Join(laptop, "alice.key")), "certificate refused", `"reason":"revoked"`)
	s.refused(s.asksAs("carol"), "certificate refused", `"reason":"revoked"`)
}
