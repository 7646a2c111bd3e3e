package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"perimeterd/vpn/client"
)

func TestTunnelFromKnockToDown(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	_, said := w.vpn(0, "up")
	for _, step := range []string{"knock sent", "gate open", "certificate accepted", "tunnel up", "proxy http://127.0.0.1:3128, session"} {
		if !strings.Contains(said, step) {
			t.Errorf("`vpn up` does not say %q:\n%s", step, said)
		}
	}
	t.Logf("vpn up said:\n%s", said)
	if got, err := w.throughProxy(); err != nil || !strings.Contains(got, "GET http://origin.test/ for 10.77.0.2:") {
		t.Fatalf("through the tunnel: %v %q", err, got)
	}
	if got := w.ask("counts"); !strings.HasPrefix(got, "requests=1 initiations=1 ended=0") {
		t.Errorf("gate: %s", got)
	}
	w.eventually(3*time.Second, "data confirmed", func() bool { return w.status().Data == client.DataConfirmed })
	s := w.status()
	if s.State != client.Up || !s.PostQuantum || s.Address.Addr().String() != "10.77.0.2" || s.PID == 0 {
		t.Errorf("status %+v", s)
	}
	routes := w.in(w.clientPID, "ip", "route", "show", "dev", s.Interface)
	if strings.TrimSpace(routes) != "10.77.0.1 scope link src 10.77.0.2" {
		t.Errorf("routes of the tunnel: %q, want the proxy's alone", routes)
	}
	if out, _ := w.vpn(0, "env"); !strings.Contains(out, "export https_proxy='http://127.0.0.1:3128'\n") ||
		!strings.Contains(out, "export NO_PROXY='localhost,127.0.0.1,::1,169.254.169.254,169.254.170.2'\n") {
		t.Errorf("env:\n%s", out)
	}
	// A second up is content with the first.
	w.vpn(0, "up")
	if again := w.status(); again.PID != s.PID || again.Session != s.Session {
		t.Errorf("a second `vpn up` made another: %+v", again)
	}
	w.vpn(0, "down")
	if got := w.ask("counts"); !strings.Contains(got, "ended=1") {
		t.Errorf("gate after down: %s", got)
	}
	if strings.Contains(w.links(), "pvpn") {
		t.Errorf("after down:\n%s", w.links())
	}
	if cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", s.PID)); len(cmdline) > 0 { // a zombie has none
		t.Error("after down its process is still there")
	}
	w.vpn(1, "status")
}

func TestKilledProcessLeavesNothingThatBlocks(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for range 2 {
		w.vpn(0, "up")
		s := w.status()
		if err := syscall.Kill(s.PID, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		w.eventually(3*time.Second, "the interface gone", func() bool { return !strings.Contains(w.links(), "pvpn") })
		w.vpn(1, "status")
	}
	w.vpn(0, "up")
	if got, err := w.throughProxy(); err != nil {
		t.Errorf("%v %q", err, got)
	}
	w.vpn(0, "down")
}

func TestExecLastsAsLongAsItsCommands(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	out, _ := w.vpn(7, "exec", "--", "sh", "-c", `echo $https_proxy; curl -sS -m 3 http://origin.test/; exit 7`)
	if !strings.HasPrefix(out, "http://vpn:") || !strings.Contains(out, "\nGET http://origin.test/ for 10.77.0.") {
		t.Errorf("exec printed %q", out)
	}
	w.eventually(3*time.Second, "the tunnel down after its command", func() bool { return w.status().State == "down" })

	// Two share one tunnel; the first to end does not take it from the other.
	long := w.command("vpn", "exec", "--", "sh", "-c", "sleep 2; curl -sS -m 3 http://origin.test/")
	var said bytes.Buffer
	long.Stdout, long.Stderr = &said, &said
	if err := long.Start(); err != nil {
		t.Fatal(err)
	}
	w.vpn(0, "exec", "--", "true")
	if err := long.Wait(); err != nil || !strings.Contains(said.String(), "GET http://origin.test/") {
		t.Errorf("the longer one: %v %s", err, said.String())
	}
	w.eventually(3*time.Second, "the tunnel down after both", func() bool { return w.status().State == "down" })

	// One that was up already stays.
	w.vpn(0, "up")
	w.vpn(0, "exec", "--", "true")
	time.Sleep(300 * time.Millisecond)
	if s := w.status(); s.State != client.Up {
		t.Errorf("exec took down a tunnel that it found up: %+v", s)
	}
	w.vpn(0, "down")

	// A signal reaches the command, and its death is ours.
	cmd := w.command("vpn", "exec", "--", "sh", "-c", `trap 'echo caught; exit 9' TERM; echo ready; while :; do sleep 0.05; done`)
	pipe, _ := cmd.StdoutPipe()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(pipe)
	lines.Scan()
	cmd.Process.Signal(syscall.SIGTERM)
	lines.Scan()
	cmd.Wait()
	if lines.Text() != "caught" || cmd.ProcessState.ExitCode() != 9 {
		t.Errorf("after SIGTERM: %q, %v", lines.Text(), cmd.ProcessState)
	}
	cmd = w.command("vpn", "exec", "--", "sh", "-c", "kill -KILL $$")
	cmd.Run()
	if ws := cmd.ProcessState.Sys().(syscall.WaitStatus); !ws.Signaled() || ws.Signal() != syscall.SIGKILL {
		t.Errorf("its command was killed, and it: %v", cmd.ProcessState)
	}
}

func TestInterruptFromTheTerminalReachesTheCommandOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.vpn(0, "up")
	inner := w.command("vpn", "exec", "--", "sh", "-c", `trap 'echo caught' INT; echo ready; sleep 1; sleep 0.3; echo end`)
	file := filepath.Join(t.TempDir(), "run.sh")
	words := make([]string, len(inner.Args))
	for i, a := range inner.Args {
		words[i] = "'" + strings.ReplaceAll(a, "'", `'\''`) + "'"
	}
	if err := os.WriteFile(file, []byte("exec "+strings.Join(words, " ")+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	// script gives it a terminal, and runs $SHELL -c: one that stayed in between would die of the interrupt itself.
	cmd := exec.Command("script", "-qec", "exec sh "+file, "/dev/null")
	cmd.Env = append(inner.Env, "SHELL=/bin/sh")
	in, _ := cmd.StdinPipe()
	out, _ := cmd.StdoutPipe()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var said strings.Builder
	for lines := bufio.NewScanner(out); lines.Scan(); {
		said.WriteString(lines.Text() + "\n")
		switch strings.TrimSpace(lines.Text()) {
		case "ready":
			io.WriteString(in, "\x03")
		case "end":
			in.Close()
		}
	}
	if err := cmd.Wait(); err != nil || strings.Count(said.String(), "caught") != 1 {
		t.Errorf("%v, said:\n%s", err, said.String())
	}
}

func TestLocalWorkOfUp(t *testing.T) {
	w := newWorld(t)
	best := time.Hour
	for range 4 {
		start := time.Now()
		_, said := w.vpn(0, "up")
		took := time.Since(start)
		t.Logf("%v; %s", took, strings.ReplaceAll(said, "\n", "; "))
		best = min(best, took)
		w.vpn(0, "down")
	}
	// The goal is 30 ms, for a machine that does nothing else; the test's is what a crowded one does at its best.
	if best > 150*time.Millisecond {
		t.Errorf("at best `vpn up` took %v where the network takes nothing", best)
	}
}

func TestSequenceOpensWhereTheTokenIsLost(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.in(w.gatePID, "nft", "flush chain inet door token") // as a network that swallows UDP would
	out, _ := w.run(0, "knock")
	if !strings.HasPrefix(out, "open, 60 s (") {
		t.Errorf("knock printed %q", out)
	}
	w.in(w.gatePID, "nft", "flush set inet door open; flush set inet door one; flush set inet door two")
	_, said := w.vpn(0, "up")
	if !strings.Contains(said, "sequence knocked") {
		t.Errorf("vpn up said:\n%s", said)
	}
	w.vpn(0, "down")
}

func TestKnockSpeaksKnockd(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.in(w.gatePID, "nft", "flush chain inet door token")
	out, _ := w.run(0, "knock", "-v", gateOuter, "7102", "19044:udp", "33127:tcp")
	if want := "hitting tcp 198.18.77.1:7102\nhitting udp 198.18.77.1:19044\nhitting tcp 198.18.77.1:33127\n"; out != want {
		t.Errorf("printed %q, want %q", out, want)
	}
	if open := w.in(w.gatePID, "nft", "list set inet door open"); !strings.Contains(open, clientOuter) {
		t.Errorf("the door is not open: %s", open)
	}
	w.in(w.gatePID, "nft", "flush set inet door open")
	w.run(0, "knock", "-u", "-d", "20", "-4", gateOuter, "7102:tcp", "19044", "33127:tcp")
	if open := w.in(w.gatePID, "nft", "list set inet door open"); !strings.Contains(open, clientOuter) {
		t.Errorf("-u: the door is not open: %s", open)
	}
}

func TestKnockSaysWhyItIsNotOpen(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.in(w.gatePID, "nft", "insert rule inet door input ip saddr "+clientOuter+" drop")
	_, said := w.run(1, "knock", "--timeout", "1500ms")
	for _, reason := range []string{"no answer after a token to UDP port 1194", "and the sequence", "clock may be off", "revoked"} {
		if !strings.Contains(said, reason) {
			t.Errorf("knock does not say %q: %s", reason, said)
		}
	}
}

func TestTunnelSurvivesAGateThatForgot(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.vpn(0, "up")
	first := w.status().Session
	w.ask("forget")
	// Only what is sent finds out; WireGuard itself waits 15 s for an answer before it asks.
	start := time.Now()
	go w.throughProxy()
	w.eventually(6*time.Second, "a new session", func() bool { s := w.status(); return s.Session != first && s.State == client.Up })
	t.Logf("a new session %v after the first packet", time.Since(start))
	if got, err := w.throughProxy(); err != nil {
		t.Errorf("%v %q", err, got)
	}
	if log := w.log(); strings.Contains(log, "seems to block") {
		t.Errorf("the network is blamed:\n%s", log)
	}
	w.vpn(0, "down")
}

func TestRefusalWhileUpIsSaidOnceAndEndsTheTrying(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.vpn(0, "up")
	w.ask("refuse")
	w.ask("forget")
	go w.throughProxy()
	w.eventually(6*time.Second, "refused", func() bool { return w.status().State == client.Refused })
	if s := w.status(); !strings.Contains(s.Problem, "revoked") {
		t.Errorf("status %+v", s)
	}
	before := w.ask("counts")
	w.throughProxy() // 3 s of traffic that nobody answers
	if after := w.ask("counts"); after != before {
		t.Errorf("it goes on asking: %s, then %s", before, after)
	}
	if log := w.log(); strings.Count(log, "refuses this profile") != 1 {
		t.Errorf("log:\n%s", log)
	}
	// Up begins anew, and hears it again.
	if _, said := w.vpn(1, "up"); !strings.Contains(said, "revoked, or its user is unknown") {
		t.Errorf("vpn up said:\n%s", said)
	}
	w.vpn(1, "status")
}

func TestRenewedBeforeItsEnd(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.ask("brief")
	w.vpn(0, "up")
	first := w.status()
	w.ask("lasting")
	w.eventually(6*time.Second, "another session", func() bool { return w.status().Session != first.Session })
	if w.status().Expires.Before(first.Expires) {
		t.Error("the new session ends before the old")
	}
	if got, err := w.throughProxy(); err != nil {
		t.Errorf("%v %q", err, got)
	}
	if got := w.ask("counts"); !strings.Contains(got, "ended=1") {
		t.Errorf("gate: %s: the old session was not ended", got)
	}
	if n := strings.Count(w.links(), "pvpn"); n != 1 {
		t.Errorf("%d tunnel interfaces:\n%s", n, w.links())
	}
	w.vpn(0, "down")
}

func TestRevokedCertificateIsSaidAndNothingIsLeft(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.ask("refuse")
	_, said := w.vpn(1, "up")
	if !strings.Contains(said, "revoked, or its user is unknown") {
		t.Errorf("vpn up said:\n%s", said)
	}
	if strings.Contains(w.links(), "pvpn") {
		t.Errorf("left behind:\n%s", w.links())
	}
	_, said = w.vpn(125, "exec", "--", "true")
	if !strings.Contains(said, "true was not run") {
		t.Errorf("exec said:\n%s", said)
	}
}

// blockUDP lets tokens pass, and none of WireGuard's own datagrams.
const blockUDP = "insert rule inet door input udp dport 1194 udp length != 24 drop"

func TestBlockedUDPShowsInStatus(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.in(w.gatePID, "nft", blockUDP)
	w.vpn(0, "up")
	w.eventually(4*time.Second, "status says so", func() bool { return w.status().Data == client.DataBlocked })
	if _, said := w.vpn(1, "up", "--timeout", "500ms"); !strings.Contains(said, "UDP seems blocked") && !strings.Contains(said, "seems to block it") ||
		strings.Contains(said, "tunnel up") {
		t.Errorf("a second `vpn up` said:\n%s", said)
	}
	if out, said := w.vpn(125, "exec", "--timeout", "500ms", "--", "echo", "ran"); out != "" || !strings.Contains(said, "echo was not run") {
		t.Errorf("exec: %q\n%s", out, said)
	}
	w.eventually(6*time.Second, "the gate's word", func() bool {
		s := w.status()
		return s.State == client.Retrying && strings.Contains(s.Problem, "knows the session, but not by UDP port 1194")
	})
	// The way opens again, and who waits for it is served at once.
	rules := w.in(w.gatePID, "nft", "-a", "list chain inet door input")
	_, rules, _ = strings.Cut(rules, "!= 24 drop # handle ")
	handle, _, _ := strings.Cut(rules, "\n")
	w.in(w.gatePID, "nft", "delete rule inet door input handle "+handle)
	if out, _ := w.vpn(0, "exec", "--timeout", "10s", "--", "echo", "ran"); out != "ran\n" {
		t.Errorf("exec printed %q", out)
	}
	w.vpn(0, "down")
}

func TestExecWaitsUntilDataPass(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.in(w.gatePID, "nft", blockUDP)
	if out, said := w.vpn(125, "exec", "--timeout", "2500ms", "--", "echo", "ran"); out != "" || !strings.Contains(said, "UDP") {
		t.Errorf("exec: %q\n%s", out, said)
	}
	w.eventually(3*time.Second, "nothing left of it", func() bool { return w.status().State == "down" })
}

func TestLocalFirewallIsNamed(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.in(w.clientPID, "nft", "add table inet mine; add chain inet mine out { type filter hook output priority 0; }; add rule inet mine out ip daddr "+gateOuter+" udp dport 1-65535 drop")
	for _, args := range [][]string{{"-v", "--timeout", "1s"}, {gateOuter, "19044:udp"}} {
		cmd := w.command("knock", args...)
		if out, _ := cmd.CombinedOutput(); !strings.Contains(string(out), "a firewall on this machine drops the knock") {
			t.Errorf("knock %v said:\n%s", args, out)
		}
	}
}

func TestUnderSudoItIsTheInvokersOwn(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	const uid, gid = 65534, 65534 // nobody
	home, err := os.MkdirTemp("", "vpn-home-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(home) })
	var files []string
	for _, f := range []string{"", ".config", ".config/perimeter"} {
		f = filepath.Join(home, f)
		os.Mkdir(f, 0o700)
		files = append(files, f)
	}
	text, err := os.ReadFile(w.config + "/sent")
	if err != nil {
		t.Fatal(err)
	}
	profile := home + "/.config/perimeter/alice.profile"
	if err := os.WriteFile(profile, text, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, f := range append(files, profile) {
		if err := os.Chown(f, uid, gid); err != nil {
			t.Fatal(err)
		}
	}
	environment := append(slices.DeleteFunc(os.Environ(), func(e string) bool {
		return strings.HasPrefix(e, "XDG_") || strings.HasPrefix(e, "HOME=")
	}), "HOME="+home)
	program := filepath.Join(w.bin, "vpn")
	run := func(status int, sudo bool, args ...string) string {
		t.Helper()
		// The device as udev makes it, whatever its mode on this machine is.
		enter := []string{"-t", fmt.Sprint(w.clientPID), "-n", "unshare", "--mount", "sh", "-c",
			`mount -t tmpfs tun /dev/net && mknod -m 666 /dev/net/tun c 10 200 && exec "$@"`, "sh"}
		if !sudo {
			enter = append(enter, "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all")
		}
		cmd := exec.Command("nsenter", append(append(enter, program), args...)...)
		cmd.Env = environment
		if sudo {
			cmd.Env = append(cmd.Env, "SUDO_UID=65534", "SUDO_GID=65534", "SUDO_USER=nobody", "XDG_CONFIG_HOME="+home+"/.config")
		}
		out, err := cmd.CombinedOutput()
		if cmd.ProcessState.ExitCode() != status {
			t.Fatalf("vpn %v: %v\n%s", args, err, out)
		}
		return string(out)
	}
	if said := run(0, false, "up"); !strings.Contains(said, "(rootless)") {
		t.Errorf("without privilege: %s", said)
	}
	run(0, false, "down")
	run(0, true, "up")
	said := run(0, true, "exec", "--", "sh", "-c", "id -u; id -g; echo ${SUDO_UID-none}; echo $HOME; grep -E 'Cap(Inh|Prm|Eff|Amb)' /proc/self/status; curl -sS -m 3 http://origin.test/")
	nobody, err := user.LookupId("65534")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(said, "65534\n65534\nnone\n"+nobody.HomeDir+"\n") || strings.Count(said, "0000000000000000") != 4 || !strings.Contains(said, "GET http://origin.test/") {
		t.Errorf("under sudo the command said:\n%s", said)
	}
	if said := run(0, false, "status"); !strings.Contains(said, "tunnel       up") || strings.Contains(said, "console") {
		t.Errorf("the user's own status: %s", said)
	}
	run(0, false, "env")
	run(0, false, "exec", "--", "true")
	err = filepath.Walk(home, func(file string, info os.FileInfo, err error) error {
		if err == nil && info.Sys().(*syscall.Stat_t).Uid != uid {
			t.Errorf("%s belongs to %d", file, info.Sys().(*syscall.Stat_t).Uid)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	run(0, false, "down")
	if strings.Contains(w.links(), "pvpn") {
		t.Error("the user's own `vpn down` left the tunnel")
	}

	// With the capability on the program nobody needs root.
	program = filepath.Join(home, "vpn")
	w.must("cp", filepath.Join(w.bin, "vpn"), program)
	w.must("setcap", "cap_net_admin+ep", program)
	if said := run(0, false, "up"); strings.Contains(said, "rootless") {
		t.Errorf("with the capability: %s", said)
	}
	if said := run(0, false, "exec", "--", "grep", "CapEff", "/proc/self/status"); !strings.Contains(said, "0000000000000000") {
		t.Errorf("with setcap the command has %s", said)
	}
	run(0, false, "down")
}
