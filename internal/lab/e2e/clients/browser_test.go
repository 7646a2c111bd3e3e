package clients

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// What the browser would send past the proxy, were it to: names, and what WebRTC asks. Nothing answers.
const leaks = `table inet leaks {
  counter names { }
  counter webrtc { }
  chain out {
    type filter hook output priority -10;
    oifname "lo" accept
    udp dport 53 counter name names drop
    tcp dport 53 counter name names drop
    udp dport 3478 counter name webrtc drop
  }
}
`

func TestBrowserOfItsOwnKeepsToTheProxy(t *testing.T) {
	s := newStage(t)
	database := "sql:" + filepath.Join(s.alice.Home, ".pki/nssdb")
	if err := os.MkdirAll(filepath.Join(s.alice.Home, ".pki/nssdb"), 0o700); err != nil {
		t.Fatal(err)
	}
	s.run(s.alice.Command(s.ctx, "certutil", "-d", database, "-N", "--empty-password"))
	s.run(s.alice.Command(s.ctx, "certutil", "-d", database, "-A", "-n", "cloud", "-t", "C,,", "-i", s.cloud.CAFile))
	s.run(s.Client.Command(s.ctx, "nft", "-f", s.file("leaks.nft", leaks)))
	// Only what a window would need is added: there is none here, and root has no sandbox.
	program := s.file("chromium-without-window", "#!/bin/sh\nexec chromium --headless --no-sandbox --disable-gpu --disable-dev-shm-usage --timeout=60000 --dump-dom \"$@\"\n")
	if err := os.Chmod(program, 0o755); err != nil {
		t.Fatal(err)
	}
	open := func(url string) string {
		t.Helper()
		out, err := s.alice.VPN(s.ctx, "browser", "--program", program, url).Output()
		if err != nil {
			t.Fatalf("%s: %v", url, err)
		}
		return string(out)
	}
	if page := open("https://console.aws.amazon.com/"); !strings.Contains(page, "seen from 198.19.1.10, hello") {
		t.Errorf("what is allowed:\n%s", page)
	}
	if page := open("https://evil.example.com/"); strings.Contains(page, "seen from") {
		t.Errorf("what no rule names:\n%s", page)
	}
	if page := open("https://console.aws.amazon.com/webrtc"); !strings.Contains(page, `<p id="saw">gathered: `) || strings.Contains(page, " typ srflx") ||
		strings.Contains(page, "198.18.1.2") {
		t.Errorf("WebRTC:\n%s", page)
	}
	refused := 0
	for _, e := range s.daemon.Entries("proxy") {
		if e["destination"] == "evil.example.com:443" && e["decision"] == "deny" {
			refused++
		}
	}
	if refused == 0 {
		t.Error("what no rule names was not sent to the proxy")
	}
	count := func(what string) string {
		return s.run(s.Client.Command(s.ctx, "nft", "list", "counter", "inet", "leaks", what))
	}
	for _, what := range []string{"names", "webrtc"} {
		if out := count(what); !strings.Contains(out, "packets 0 ") {
			t.Errorf("sent past the proxy: %s", out)
		}
	}
	// The same browser with no more than the proxy's address shows that there was something to keep in.
	s.run(s.alice.Command(s.ctx, program, "--user-data-dir="+filepath.Join(s.alice.Home, "bare"), "--proxy-server=http://127.0.0.1:3128", "https://console.aws.amazon.com/webrtc"))
	if out := count("webrtc"); strings.Contains(out, "packets 0 ") {
		t.Errorf("a bare browser's WebRTC is not seen: %s", out)
	}
	dirs, err := filepath.Glob(filepath.Join(s.alice.Home, ".config/perimeter/*.chromium"))
	if err != nil || len(dirs) != 1 {
		t.Errorf("browser profiles: %v %v", dirs, err)
	}
}

// A password in the proxy's URL, as exec's has, is not sent by every program in the same way.
func TestProgramsGiveExecsPassword(t *testing.T) {
	s := newStage(t)
	for want, args := range map[string][]string{
		"arn:aws:iam::123456789012:user/AKIAALICE\n": {"/usr/bin/aws", "sts", "get-caller-identity", "--output", "text", "--query", "Arn"},
		"{}": {"curl", "-sS", "-m", "10", "https://registry.npmjs.org/x"},
		"{}\n": {"/usr/bin/python3", "-c", "import ssl, urllib.request as u, os; print(u.urlopen('https://registry.npmjs.org/x', " +
			"context=ssl.create_default_context(cafile=os.environ['SSL_CERT_FILE'])).read().decode())"},
		"seen from " + s.Egress.String() + "\n": {"curl", "-sS", "-m", "10", "http://plain.example.com/"},
	} {
		c := s.alice.VPN(s.ctx, append([]string{"exec", "--"}, args...)...)
		c.Env = s.command("true").Env
		if out := s.run(c); out != want {
			t.Errorf("%v: %q, want %q", args, out, want)
		}
	}
}
