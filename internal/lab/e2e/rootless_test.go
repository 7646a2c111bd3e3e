package e2e

import (
	"bufio"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"perimeterd/internal/lab"
	"perimeterd/vpn/client"
)

// ordinary runs a command as a user without any privilege, to whom alice's home belongs.
func ordinary(c *lab.Cmd) *lab.Cmd {
	c.SysProcAttr.Credential = &syscall.Credential{Uid: 4711, Gid: 4711}
	return c
}

func TestOrdinaryUserReachesTheCloudAndLosesItWithTheCertificate(t *testing.T) {
	t.Parallel()
	s := newStage(t, lab.Options{})
	if err := filepath.Walk(s.alice.Home, func(file string, _ os.FileInfo, err error) error {
		if err == nil {
			err = os.Chown(file, 4711, 4711)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	vpn := func(args ...string) *lab.Cmd { return ordinary(s.alice.VPN(s.ctx, args...)) }
	status := func() (st client.Status) {
		t.Helper()
		out, _ := vpn("status", "--json").Output() // status 1 when it is down
		if err := json.Unmarshal(out, &st); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return st
	}
	url := "https://" + cloudName + "/"
	want := "seen from " + s.Egress.String() + "\n"
	if out := s.ok(vpn("exec", "--", "curl", "-sS", "-m", "10", "--cacert", s.cloud.CAFile, url)); !strings.HasSuffix(out, want) {
		t.Errorf("exec: %q", out)
	}
	if st := status(); st.State != "down" {
		t.Errorf("after exec: %+v", st)
	}
	t.Log(s.ok(vpn("up")))
	if st := status(); st.State != client.Up || st.Mode != client.ModeRootless {
		t.Errorf("status %+v", st)
	}
	if out := s.ok(s.Client.Command(s.ctx, "ip", "-br", "link")); strings.Contains(out, "pvpn") {
		t.Errorf("a device: %s", out)
	}
	// A browser's way, and a refusal of the proxy's in its own words.
	curl := func(args ...string) *lab.Cmd {
		return ordinary(s.alice.Command(s.ctx, "curl", append([]string{"-sS", "-m", "10", "--cacert", s.cloud.CAFile, "-x", "http://127.0.0.1:3128"}, args...)...))
	}
	if out := s.ok(curl(url)); out != want {
		t.Errorf("by the listener: %q", out)
	}
	if out := s.ok(curl("-w", "%{http_code}", "http://evil.example.com/")); !strings.Contains(out, "perimeterd why") || !strings.HasSuffix(out, "403") {
		t.Errorf("refused: %s", out)
	}
	if out := s.fails(curl("https://evil.example.com/")); !strings.Contains(out, "403") {
		t.Errorf("refused: %s", out)
	}
	if out := s.ok(vpn("pac")); !strings.Contains(out, `"PROXY 127.0.0.1:3128"`) {
		t.Errorf("pac: %s", out)
	}

	// Revoked in the middle of a command: it hears so, once, and gets nothing more.
	cmd := vpn("exec", "--", "sh", "-c", "echo ready; while read line; do curl -sS -m 5 --cacert "+s.cloud.CAFile+" "+url+" 2>&1; echo done; done")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var said strings.Builder
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	lines.Scan()
	once := func() (all string) {
		in.Write([]byte("\n"))
		for lines.Scan() && lines.Text() != "done" {
			all += lines.Text() + "\n"
		}
		return all
	}
	if got := once(); got != want {
		t.Errorf("before: %q", got)
	}
	s.perimeterd("user", "revoke", "alice")
	for end := time.Now().Add(time.Minute); !strings.Contains(once(), "503"); {
		if time.Now().After(end) {
			t.Fatalf("no refusal with a reason; status %+v", status())
		}
	}
	in.Close()
	cmd.Wait()
	if strings.Count(said.String(), "the tunnel is lost") != 1 {
		t.Errorf("exec said: %s", said.String())
	}
	if st := status(); st.State == client.Up {
		t.Errorf("status after the revocation: %+v", st)
	}
	s.ok(vpn("down"))
}
