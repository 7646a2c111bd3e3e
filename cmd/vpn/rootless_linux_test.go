package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"perimeterd/vpn/client"
)

// person is a user of the client's machine without any privilege, who sees no tunnel device.
type person struct {
	*world
	uid  int
	home string
}

func (w *world) person(uid int) *person {
	w.Helper()
	home, err := os.MkdirTemp("", "vpn-home-")
	if err != nil {
		w.Fatal(err)
	}
	p := &person{w, uid, home}
	w.Cleanup(func() {
		p.command("vpn", "down").Run()
		os.RemoveAll(home)
	})
	text, err := os.ReadFile(w.config + "/sent")
	if err == nil {
		err = os.WriteFile(home+"/sent", text, 0o600)
	}
	for _, f := range []string{home, home + "/sent"} {
		if err == nil {
			err = os.Chown(f, uid, uid)
		}
	}
	if err != nil {
		w.Fatal(err)
	}
	return p
}

// command is any program as that person; "vpn" is ours.
func (p *person) command(name string, args ...string) *exec.Cmd {
	if name == "vpn" {
		name = filepath.Join(p.bin, name)
	}
	cmd := exec.Command("nsenter", append([]string{"-t", fmt.Sprint(p.clientPID), "-n", "unshare", "--mount", "sh", "-c",
		`mount -t tmpfs none /dev/net && exec "$@"`, "sh", "setpriv", fmt.Sprintf("--reuid=%d", p.uid), fmt.Sprintf("--regid=%d", p.uid),
		"--clear-groups", "--inh-caps=-all", "--no-new-privs", name}, args...)...)
	cmd.Dir = p.home
	cmd.Env = append(slices.DeleteFunc(os.Environ(), func(e string) bool {
		return strings.HasPrefix(e, "XDG_") || strings.HasPrefix(e, "SUDO_") || strings.Contains(strings.ToLower(e), "_proxy=")
	}), "HOME="+p.home, "SHELL=/bin/bash")
	return cmd
}

func (p *person) run(status int, name string, args ...string) (stdout, stderr string) {
	p.Helper()
	cmd := p.command(name, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if got := cmd.ProcessState.ExitCode(); got != status {
		p.Fatalf("%s %v: %v, want status %d\n%s%s", name, args, err, status, out.String(), errs.String())
	}
	return out.String(), errs.String()
}

func (p *person) status() (s client.Status) {
	p.Helper()
	out, _ := p.command("vpn", "status", "--json").Output()
	if err := json.Unmarshal(out, &s); err != nil {
		p.Fatalf("status: %v\n%s", err, out)
	}
	return s
}

const origin = "http://origin.test/"

func TestWithoutPrivilegeTheTunnelIsInsideTheProcess(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	alice, mallory := w.person(4711), w.person(4712)
	alice.run(0, "vpn", "import", "sent")
	_, said := alice.run(0, "vpn", "up")
	if !strings.Contains(said, "proxy http://127.0.0.1:3128 (rootless)") {
		t.Errorf("vpn up said:\n%s", said)
	}
	s := alice.status()
	if s.State != client.Up || s.Mode != client.ModeRootless || s.Listen.String() != "127.0.0.1:3128" || s.Interface != "" {
		t.Errorf("status %+v", s)
	}
	if strings.Contains(w.links(), "pvpn") {
		t.Errorf("there is a device:\n%s", w.links())
	}
	if out, _ := alice.run(0, "vpn", "status"); !strings.Contains(out, "http://127.0.0.1:3128") || !strings.Contains(out, "rootless") {
		t.Errorf("status:\n%s", out)
	}
	env, _ := alice.run(0, "vpn", "env")
	if out, _ := alice.run(0, "sh", "-c", env+"curl -sS -m 5 "+origin); !strings.HasPrefix(out, "GET "+origin+" for 10.77.0.2:") {
		t.Errorf("through the tunnel: %q", out)
	}
	if out, _ := alice.run(0, "vpn", "env", "--shell", "fish"); !strings.Contains(out, "set -gx https_proxy 'http://127.0.0.1:3128'\n") {
		t.Errorf("fish: %s", out)
	}
	if out, _ := alice.run(0, "vpn", "env", "--shell", "powershell"); !strings.Contains(out, "$Env:https_proxy = 'http://127.0.0.1:3128'\n") {
		t.Errorf("powershell: %s", out)
	}
	alice.run(2, "vpn", "env", "--shell", "tcsh")

	// Nobody else's connection is served, root's neither.
	for name, out := range map[string]string{
		"another user": w.must("nsenter", append([]string{"-t", fmt.Sprint(w.clientPID), "-n", "setpriv", "--reuid=4712", "--regid=4712", "--clear-groups"}, curlThrough("http://127.0.0.1:3128")...)...),
		"root":         w.in(w.clientPID, curlThrough("http://127.0.0.1:3128")...),
	} {
		if !strings.Contains(out, "this is the tunnel of user 4711, and of nobody else") || !strings.HasSuffix(out, " 403") {
			t.Errorf("%s: %s", name, out)
		}
	}
	if out, _ := mallory.command("curl", "-sS", "-m", "5", "-p", "-x", "http://127.0.0.1:3128", origin).CombinedOutput(); !strings.Contains(string(out), "403") {
		t.Errorf("another user's CONNECT: %s", out)
	}
	// Nor what a web page could make the owner's browser send.
	for want, args := range map[string][]string{
		"421": {"-H", "Host: evil.example.com:3128", "http://127.0.0.1:3128/proxy.pac"},
		"403": {"-H", "Origin: https://evil.example.com", "http://127.0.0.1:3128/"},
		"400": {"--request-target", "origin.test:80", "http://127.0.0.1:3128/"},
	} {
		if out, _ := alice.run(0, "curl", append([]string{"-sS", "-m", "5", "-o", "/dev/null", "-w", "%{http_code}"}, args...)...); out != want {
			t.Errorf("%v: %s, want %s", args, out, want)
		}
	}

	alice.run(0, "vpn", "down")
	if s := alice.status(); s.State != "down" {
		t.Errorf("after down: %+v", s)
	}
	if got := w.ask("counts"); !strings.Contains(got, "ended=1") {
		t.Errorf("gate after down: %s", got)
	}
	if out, _ := alice.command("curl", "-sS", "-m", "2", "http://127.0.0.1:3128/").CombinedOutput(); !strings.Contains(string(out), "Couldn't connect") && !strings.Contains(string(out), "Failed to connect") {
		t.Errorf("after down somebody listens: %s", out)
	}
	if cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", s.PID)); len(cmdline) > 0 {
		t.Error("after down its process is still there")
	}
	if left, _ := filepath.Glob(alice.home + "/.config/perimeter/*.sock"); len(left) > 0 {
		t.Errorf("after down: %v", left)
	}
}

func curlThrough(proxy string) []string {
	return []string{"curl", "-sS", "-m", "5", "-w", " %{http_code}", "-x", proxy, origin}
}

func TestExecHasAPortAndAPasswordOfItsOwn(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	alice, mallory := w.person(4711), w.person(4712)
	alice.run(0, "vpn", "import", "sent")
	out, _ := alice.run(0, "vpn", "exec", "--", "sh", "-c", "env | grep -i _proxy= | sort; curl -sS -m 5 "+origin)
	lines := strings.Split(out, "\n")
	m := regexp.MustCompile(`^HTTPS_PROXY=(http://vpn:[0-9a-f]{32}@127\.0\.0\.1:(\d+))$`).FindStringSubmatch(lines[0])
	if m == nil || m[2] == "3128" {
		t.Fatalf("exec: %s", out)
	}
	want := []string{"HTTPS_PROXY=" + m[1], "HTTP_PROXY=" + m[1], "NO_PROXY=localhost,127.0.0.1,::1,169.254.169.254,169.254.170.2",
		"http_proxy=" + m[1], "https_proxy=" + m[1], "no_proxy=localhost,127.0.0.1,::1,169.254.169.254,169.254.170.2"}
	slices.Sort(want)
	got := slices.Clone(lines[:len(want)])
	slices.Sort(got)
	if !slices.Equal(got, want) || !strings.HasPrefix(lines[6], "GET "+origin+" for 10.77.0.") {
		t.Errorf("exec:\n%s", out)
	}
	if s := alice.status(); s.State != "down" {
		t.Errorf("right after its only command: %+v", s)
	}

	cmd := alice.command("vpn", "exec", "--", "sh", "-c", "echo $https_proxy; read end")
	in, _ := cmd.StdinPipe()
	pipe, _ := cmd.StdoutPipe()
	var errs bytes.Buffer
	cmd.Stderr = &errs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer in.Close()
	buf := make([]byte, 200)
	n, err := pipe.Read(buf)
	u, err2 := url.Parse(strings.TrimSpace(string(buf[:n])))
	if err != nil || err2 != nil {
		t.Fatal(err, err2)
	}
	for login, status := range map[string]string{"": " 407", "vpn:0123456789abcdef0123456789abcdef@": " 407", u.User.String() + "@": " 200"} {
		args := curlThrough("http://" + login + u.Host)
		if out, _ := mallory.command(args[0], args[1:]...).CombinedOutput(); !strings.HasSuffix(string(out), status) {
			t.Errorf("with %q: %s, want%s", login, out, status)
		}
	}

	// Revoked meanwhile: said once, and each new connection hears why.
	w.ask("refuse")
	w.ask("forget")
	through := func() string {
		args := curlThrough(u.String())
		out, _ := alice.command(args[0], args[1:]...).CombinedOutput()
		return string(out)
	}
	w.eventually(time.Minute, "a refusal with its reason", func() bool {
		out := through()
		return strings.HasSuffix(out, " 503") && strings.Contains(out, "revoked, or its user is unknown")
	})
	// Ended meanwhile: the same.
	alice.run(0, "vpn", "down")
	if s := alice.status(); s.State != "down" {
		t.Errorf("after down: %+v", s)
	}
	w.eventually(10*time.Second, "a refusal in its place", func() bool { out := through(); return strings.HasSuffix(out, " 503") })
	in.Close()
	if err := cmd.Wait(); err == nil || cmd.ProcessState.ExitCode() != 1 {
		t.Errorf("exec ended with %v", err)
	}
	if n := strings.Count(errs.String(), "the tunnel is lost"); n != 1 || !strings.Contains(errs.String(), "revoked") {
		t.Errorf("exec said:\n%s", errs.String())
	}
}

func TestSecondProfileHasAPortOfItsOwn(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	alice := w.person(4711)
	alice.run(0, "vpn", "import", "sent")
	text, err := os.ReadFile(alice.home + "/sent")
	if err != nil {
		t.Fatal(err)
	}
	second := strings.Replace(string(text), "tunnel_port", "device = 'mac'\ntunnel_port", 1)
	if err := os.WriteFile(alice.home+"/second", []byte(second), 0o644); err != nil {
		t.Fatal(err)
	}
	alice.run(0, "sh", "-c", "umask 077; cat second > mine")
	alice.run(0, "vpn", "import", "mine")
	alice.run(1, "vpn", "up") // which of them?
	t.Cleanup(func() { alice.command("vpn", "--profile", "alice-mac", "down").Run() })
	for range 2 { // and it stays
		for _, name := range []string{"alice", "alice-mac"} {
			alice.run(0, "vpn", "use", name)
			alice.run(0, "vpn", "up")
		}
		for name, at := range map[string]string{"alice": "127.0.0.1:3128", "alice-mac": "127.0.0.1:3129"} {
			alice.run(0, "vpn", "use", name)
			if s := alice.status(); s.State != client.Up || s.Listen.String() != at {
				t.Errorf("%s is %s at %v, want %s", name, s.State, s.Listen, at)
			}
		}
		alice.run(0, "vpn", "--profile", "alice", "down")
		alice.run(0, "vpn", "--profile", "alice-mac", "down")
	}
}
