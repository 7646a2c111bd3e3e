package e2e

import (
	"strings"
	"testing"

	"perimeterd/internal/lab"
)

func TestPACComesThroughTheTunnelAndFollowsThePolicy(t *testing.T) {
	s := newStage(t, lab.Options{})
	if out := s.fails(s.alice.VPN(s.ctx, "pac")); !strings.Contains(out, "down") {
		t.Errorf("without a tunnel: %s", out)
	}
	s.ok(s.alice.VPN(s.ctx, "up"))
	if got := s.ok(s.alice.VPN(s.ctx, "pac", "--url")); got != "http://127.0.0.1:3128/proxy.pac\n" {
		t.Errorf("its URL: %q", got)
	}
	pac := s.alice.VPN(s.ctx, "pac")
	pac.Env = append(pac.Env, "http_proxy=http://127.0.0.1:9") // no way to it
	text := s.ok(pac)
	if !strings.Contains(text, `"PROXY 127.0.0.1:3128"`) || !strings.Contains(text, `"amazonaws.com": 1`) || strings.Contains(text, "; DIRECT") {
		t.Errorf("got\n%s", text)
	}
	get := func(args ...string) string {
		return s.ok(s.Client.Command(s.ctx, "curl", append([]string{"-sS", "--max-time", "10"}, args...)...))
	}
	if got := get("-w", "%{content_type}", "http://127.0.0.1:3128/proxy.pac"); got != text+"application/x-ns-proxy-autoconfig" {
		t.Errorf("curl gets\n%s", got)
	}
	if got := get("http://10.77.0.1/proxy.pac"); got != strings.Replace(text, "127.0.0.1", "10.77.0.1", 1) {
		t.Errorf("inside the tunnel curl gets\n%s", got)
	}
	if got := get("-w", "%{http_code}", "-o", "/dev/null", "-H", "Host: evil.example.com", "http://10.77.0.1/proxy.pac"); got != "421" {
		t.Errorf("by another name: %s", got)
	}
	s.addRules("\n[[proxy.rule]]\nallow = [\"new.example.com\"]\nports = [443]\ngroups = [\"operators\"]\n")
	s.perimeterd("apply")
	if got := s.ok(s.alice.VPN(s.ctx, "pac")); !strings.Contains(got, `"new.example.com": 1`) {
		t.Errorf("after apply\n%s", got)
	}
	s.ok(s.alice.VPN(s.ctx, "down"))
	s.fails(s.Client.Command(s.ctx, "curl", "-sS", "--max-time", "1", "http://10.77.0.1/proxy.pac"))
}
