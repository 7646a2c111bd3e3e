package e2e

import (
	"fmt"
	"strings"
	"testing"

	"perimeterd/internal/lab"
	"perimeterd/vpn"
)

func TestRequiredPostQuantumRefusesStockOpenSSLAndTakesOurClient(t *testing.T) {
	s := newStage(t, lab.Options{}, lab.Setting{Key: "require_post_quantum", Value: "true"})
	s.ok(s.alice.VPN(s.ctx, "up"))
	s.ok(s.curl("https://" + cloudName + "/"))
	if out := s.sessionsJSON(); !strings.Contains(out, `"curve": "X25519MLKEM768"`) || !strings.Contains(out, `"post_quantum": true`) {
		t.Errorf("the session is listed as %s", out)
	}
	out := s.ok(s.Client.Command(s.ctx, "curl", append(s.files("alice"), "-sS", "--max-time", "5", "--curves", "X25519", "-w", "\n%{http_code}",
		"-d", fmt.Sprintf(`{"public_key":%q}`, strings.TrimSpace(s.ok(s.Client.Command(s.ctx, "sh", "-c", "wg genkey | wg pubkey")))),
		fmt.Sprintf("https://%v:1194%s", s.Bastion.Addr, vpn.SessionPath))...))
	if !strings.HasSuffix(out, "\n403") || !strings.Contains(out, `"post_quantum"`) || !strings.Contains(out, "X25519 is none") {
		t.Errorf("curl with X25519 alone: %s", out)
	}
	hello := s.Client.Command(s.ctx, "openssl", append(opensslFiles(s.files("alice")), "-connect", fmt.Sprintf("%v:1194", s.Bastion.Addr), "-groups", "X25519", "-quiet")...)
	hello.Stdin = strings.NewReader("GET " + vpn.SessionPath + " HTTP/1.0\r\nHost: gate\r\n\r\n")
	if out, _ := hello.CombinedOutput(); !strings.Contains(string(out), "403 Forbidden") || !strings.Contains(string(out), "X25519 is none") {
		t.Errorf("openssl with X25519 alone: %s", out)
	}
}

// opensslFiles turns curl's flags into those of s_client.
func opensslFiles(curl []string) (args []string) {
	args = append(args, "s_client")
	names := map[string]string{"--cacert": "-CAfile", "--cert": "-cert", "--key": "-key"}
	for i := 0; i+1 < len(curl); i += 2 {
		args = append(args, names[curl[i]], curl[i+1])
	}
	return args
}
