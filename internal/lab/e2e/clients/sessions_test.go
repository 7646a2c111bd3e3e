package clients

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"perimeterd/internal/lab"
)

// person is an ordinary user of the client, without root, who was sent a profile.
type person struct {
	*stage
	home, vpn string
	uid       int
}

func (s *stage) person(name string) *person {
	s.t.Helper()
	s.run(s.alice.VPN(s.ctx, "down")) // there is one way to the proxy
	p := &person{s, filepath.Join(s.Dir, "person"), filepath.Join(s.Dir, "person", "vpn"), 4242}
	profile, err := s.daemon.AddUser(s.ctx, name, "--group", "operators")
	if err != nil {
		s.t.Fatal(err)
	}
	bin, err := lab.Bin("vpn")
	if err != nil {
		s.t.Fatal(err)
	}
	program, err := os.ReadFile(bin)
	if err == nil {
		err = os.MkdirAll(p.home, 0o755)
	}
	if err == nil {
		err = os.WriteFile(p.vpn, program, 0o755)
	}
	if err != nil {
		s.t.Fatal(err)
	}
	s.run(s.Client.Command(s.ctx, "setcap", "cap_net_admin+ep", p.vpn))
	for _, f := range []string{profile, p.home} {
		if err := os.Chown(f, p.uid, p.uid); err != nil {
			s.t.Fatal(err)
		}
	}
	s.run(p.command(p.vpn, "import", profile))
	return p
}

func (p *person) command(name string, args ...string) *lab.Cmd {
	c := p.Client.Command(p.ctx, name, args...)
	c.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(p.uid), Gid: uint32(p.uid)}
	c.Dir = p.home
	c.Env = []string{"HOME=" + p.home, "PATH=/usr/bin:/bin", "AWS_CA_BUNDLE=" + p.cloud.CAFile, "SSL_CERT_FILE=" + p.cloud.CAFile, "AWS_EC2_METADATA_DISABLED=true", "AWS_PAGER="}
	return c
}

// up raises the tunnel with the device as udev makes it, whatever its mode on this machine is.
func (p *person) up() {
	p.t.Helper()
	c := p.command("unshare", "--mount", "sh", "-c", `mount -t tmpfs tun /dev/net && mknod -m 666 /dev/net/tun c 10 200 && exec "$@"`, "sh",
		"setpriv", fmt.Sprint("--reuid=", p.uid), fmt.Sprint("--regid=", p.uid), "--clear-groups", p.vpn, "up")
	c.SysProcAttr.Credential = nil
	p.run(c)
}

func (p *person) file(path ...string) string {
	return filepath.Join(append([]string{p.home}, path...)...)
}

// write makes a file of the person's own.
func (p *person) write(name, text string) {
	p.t.Helper()
	c := p.command("sh", "-c", `umask 077; mkdir -p "$(dirname "$0")"; cat >"$0"`, name)
	c.Stdin = strings.NewReader(text)
	p.run(c)
}

// session is what `vpn aws credentials` printed.
func (p *person) session(out string) (k key) {
	p.t.Helper()
	if err := json.Unmarshal([]byte(out), &k); err != nil || k.SessionToken == "" {
		p.t.Fatalf("%v: %s", err, out)
	}
	return k
}

// forget removes the kept sessions.
func (p *person) forget(which string) {
	p.t.Helper()
	files, err := filepath.Glob(p.file(".cache", "perimeter", "aws", which+".session"))
	if err != nil || len(files) == 0 {
		p.t.Fatalf("no session %s is kept: %v", which, err)
	}
	for _, f := range files {
		if err := os.Remove(f); err != nil {
			p.t.Fatal(err)
		}
	}
}

// atTerminal runs a command at a terminal of its own and answers its question. It returns all that was shown, how the command
// ended, and whether the terminal shows what is typed afterwards.
func (s *stage) atTerminal(c *lab.Cmd, question, answer string) (screen string, ended error, echo bool) {
	s.t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		s.t.Fatal(err)
	}
	defer master.Close()
	var n uint32
	conn, err := master.SyscallConn()
	if err != nil {
		s.t.Fatal(err)
	}
	if err2 := conn.Control(func(fd uintptr) {
		if err = unix.IoctlSetPointerInt(int(fd), unix.TIOCSPTLCK, 0); err == nil {
			n, err = unix.IoctlGetUint32(int(fd), unix.TIOCGPTN)
		}
	}); err != nil || err2 != nil {
		s.t.Fatal(err, err2)
	}
	tty, err := os.OpenFile(fmt.Sprint("/dev/pts/", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		s.t.Fatal(err)
	}
	c.Stdin, c.Stdout, c.Stderr = tty, tty, tty
	c.SysProcAttr.Setpgid, c.SysProcAttr.Setsid, c.SysProcAttr.Setctty = false, true, true
	if err := c.Start(); err != nil {
		s.t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		ended := c.Wait()
		mode, err := unix.IoctlGetTermios(int(tty.Fd()), unix.TCGETS)
		echo = err == nil && mode.Lflag&unix.ECHO != 0
		tty.Close() // the last one: reading ends
		done <- ended
	}()
	asked := false
	for buf := make([]byte, 4096); ; {
		n, err := master.Read(buf)
		if screen += string(buf[:n]); !asked && strings.Contains(screen, question) {
			asked = true
			if _, err := master.WriteString(answer); err != nil {
				s.t.Fatal(err)
			}
		}
		if err != nil {
			break
		}
	}
	if ended = <-done; !asked {
		s.t.Fatalf("%s: %v, and did not ask\n%s", strings.Join(c.Args, " "), ended, screen)
	}
	return screen, ended, echo
}

// A person with MFA, from the first configuration to a stolen session: the packaged AWS command line, and STS, IAM and S3 as Ceph has
// them. Ceph takes MFA codes and does not judge them; AWS's part in that is the evaluator's to prove.
func TestRoleSessionsArePinned(t *testing.T) {
	s := newCloud(t)
	keys, role := s.ceph()
	path := func(c *lab.Cmd) *lab.Cmd { // Ceph serves buckets in the path here
		config := filepath.Join(s.Dir, "path-style")
		if err := os.WriteFile(config, []byte("[default]\ns3 =\n  addressing_style = path\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		c.Env = append(c.Env, "AWS_CONFIG_FILE="+config)
		return c
	}
	s.run(path(s.aws(s.Client, keys, "s3api", "create-bucket", "--bucket", "ledger"))) // Ceph's owner of a bucket may do all
	p := s.person("carol")
	p.write(p.file(".aws", "credentials"), "[bastion]\naws_access_key_id = "+keys.AccessKeyID+"\naws_secret_access_key = "+keys.SecretAccessKey+"\n")
	const before = "# carol's own\n[default]\nregion = eu-central-1\n"
	p.write(p.file(".aws", "config"), before)
	const mfa = "arn:aws:iam::123456789012:mfa/carol"
	t.Log(p.run(p.command(p.vpn, "aws", "configure", "production", "--role-arn", role, "--source-profile", "bastion", "--mfa-serial", mfa, "--region", "us-east-1")))
	config, err := os.ReadFile(p.file(".aws", "config"))
	if err != nil || !strings.HasPrefix(string(config), before) || !strings.Contains(string(config), "[profile production-vpn]\ncredential_process = "+p.vpn+" aws credentials production\nregion = us-east-1\n") {
		t.Fatalf("%v\n%s", err, config)
	}

	credentials := p.command(p.vpn, "aws", "credentials", "production")
	if out := s.fails(credentials); !strings.Contains(out, "the tunnel is down") {
		t.Errorf("without a tunnel: %s", out)
	}
	p.up()
	if out := s.fails(p.command(p.vpn, "aws", "credentials", "production")); !strings.Contains(out, "run in one: vpn aws credentials production") {
		t.Errorf("without a terminal: %s", out)
	}

	list := func() *lab.Cmd {
		c := p.command(p.vpn, "exec", "--aws-profile", "production", "--", "/usr/bin/aws", "s3", "ls")
		c.Env = append(c.Env, "AWS_ACCESS_KEY_ID=AKIAINHERITED0000000", "AWS_SECRET_ACCESS_KEY=inherited", "AWS_SESSION_TOKEN=inherited")
		return c
	}
	question := "MFA code for " + mfa
	if screen, err, echo := s.atTerminal(list(), question, "\x03"); err == nil || !strings.Contains(screen, "MFA code: interrupted") || !echo {
		t.Errorf("interrupted: %v, echo %t: %s", err, echo, screen)
	}
	start := time.Now()
	if screen, err, echo := s.atTerminal(list(), question, "654321\r"); err != nil || !strings.Contains(screen, "ledger") || strings.Contains(screen, "654321") || !echo {
		t.Errorf("answered: %v, echo %t: %s", err, echo, screen)
	}
	first := time.Since(start)
	start = time.Now()
	if out := p.run(list()); !strings.Contains(out, "ledger") {
		t.Errorf("again, from what is kept: %s", out)
	}
	again := time.Since(start)
	start = time.Now()
	out := p.run(p.command(p.vpn, "aws", "credentials", "production"))
	t.Logf("aws s3 ls by vpn exec: %d ms with an MFA code, %d ms again; vpn aws credentials alone, from what is kept: %d ms",
		first.Milliseconds(), again.Milliseconds(), time.Since(start).Milliseconds())
	pinned := p.session(out)

	// What is kept says nothing to who finds it.
	kept := 0
	if err := filepath.WalkDir(p.file(".cache"), func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || filepath.Ext(path) != ".session" {
			return err
		}
		kept++
		text, err := os.ReadFile(path)
		info, err2 := d.Info()
		if err != nil || err2 != nil || info.Mode().Perm() != 0o600 || bytes.Contains(text, []byte(pinned.SecretAccessKey)) || bytes.Contains(text, []byte(pinned.AccessKeyID)) {
			t.Errorf("%s: mode %v, %v %v", path, info.Mode(), err, err2)
		}
		return nil
	}); err != nil || kept != 2 {
		t.Errorf("%d sessions are kept, %v", kept, err)
	}

	// Another role's session asks for no code again; several at once share one question.
	p.write(p.file("code"), "#!/bin/sh\necho asked >>"+p.file("questions")+"\nsleep 1\necho 123456\n")
	p.run(p.command(p.vpn, "aws", "configure", "production", "--mfa-process", "/bin/sh "+p.file("code")))
	p.forget("role-production")
	p.run(p.command(p.vpn, "aws", "credentials", "production"))
	if _, err := os.Stat(p.file("questions")); err == nil {
		t.Error("a code was asked for, with a base session of twelve hours")
	}
	p.forget("*")
	said := make([]string, 5)
	var all sync.WaitGroup
	for i := range said {
		all.Go(func() {
			out, err := p.command(p.vpn, "aws", "credentials", "production").CombinedOutput()
			if said[i] = string(out); err != nil {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
	all.Wait()
	for _, out := range said {
		if out != said[0] {
			t.Error("several at once got several sessions")
		}
	}
	if asked, err := os.ReadFile(p.file("questions")); err != nil || string(asked) != "asked\n" {
		t.Errorf("questions: %q, %v", asked, err)
	}

	// Stolen.
	env := p.run(p.command(p.vpn, "env"))
	// The listener serves the person whose tunnel it is, and nobody else on this machine.
	own := func(c *lab.Cmd) *lab.Cmd {
		c.SysProcAttr.Credential, c.Dir = &syscall.Credential{Uid: uint32(p.uid), Gid: uint32(p.uid)}, p.home
		return c
	}
	calls := [][]string{{"s3api", "list-objects-v2", "--bucket", "ledger"}, {"s3api", "put-object", "--bucket", "ledger", "--key", "a"}}
	for _, call := range calls {
		s.run(own(path(s.throughTunnel(env, pinned, call...))))
		s.denied("a stolen session with its pin", path(s.aws(s.Client, pinned, call...)))
		astray := own(path(s.throughTunnel(env, pinned, call...)))
		astray.Env = append(astray.Env, "NO_PROXY=*.amazonaws.com,.amazonaws.com", "no_proxy=*.amazonaws.com,.amazonaws.com")
		s.denied("a session with its pin, past the proxy", astray)
	}
	s.denied("the leaked key, to begin a session elsewhere", s.aws(s.Client, keys, "sts", "assume-role", "--role-arn", role, "--role-session-name", "thief"))
	s.denied("the leaked key, for a base session elsewhere", s.aws(s.Client, keys, "sts", "get-session-token"))
	unpinned := p.session(p.run(p.command(p.vpn, "aws", "credentials", "--no-pin", "production")))
	for _, call := range calls { // an address in the role's trust does not protect what it has let out
		s.run(path(s.aws(s.Client, unpinned, call...)))
	}

	if out := s.fails(p.command(p.vpn, "exec", "--aws-profile", "nobody", "--", "/usr/bin/aws", "s3", "ls")); !strings.Contains(out, `no AWS profile "nobody"`) {
		t.Errorf("a profile that is not there: %s", out)
	}
	p.run(p.command(p.vpn, "down"))
}
