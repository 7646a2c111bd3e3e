package e2e

import (
	"context"
	"net/netip"
	"strings"
	"testing"
	"time"

	"perimeterd/internal/lab"
)

func TestMetricsAndEventsTellTheWholePath(t *testing.T) {
	s := newStage(t, lab.Options{}, lab.Setting{Key: "metrics", Value: `"127.0.0.1:9617"`})
	// A stranger's guesses: the table tells five of them, and each is an event.
	for range 50 {
		c, err := s.Client.DialFrom(context.Background(), s.Stranger, "udp", netip.AddrPortFrom(s.Bastion.Addr, 1194).String())
		if err != nil {
			t.Fatal(err)
		}
		c.Write(make([]byte, 16))
		c.Close()
	}
	s.ok(s.alice.Knock(s.ctx))
	s.ok(s.alice.VPN(s.ctx, "up"))
	s.ok(s.curl("https://" + cloudName + "/"))
	s.fails(s.curl("https://evil.example.com/"))
	refused, err := s.daemon.Await(s.ctx, "token refused: a guess, or a clock that is wrong", 5)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range refused {
		if e["source"] != s.Stranger.String() || e["event"] != "token-refused" {
			t.Errorf("%v", e)
		}
	}
	time.Sleep(200 * time.Millisecond)
	text := s.ok(s.Bastion.Command(s.ctx, "curl", "-sS", "http://127.0.0.1:9617/metrics"))
	for _, want := range []string{
		`perimeterd_windows_opened_total{kind="token"} `, `perimeterd_events_total{kind="token-refused"} `, "perimeterd_sessions_live 1\n", "perimeterd_sessions_pending 0\n",
		"perimeterd_sessions_begun_total 1\n", `perimeterd_gate_requests_total{code="ok"} `, `perimeterd_set_elements{set="admitted"} 1` + "\n",
		`perimeterd_set_fill_ratio{set="tokens"} `, "perimeterd_table_owned 1\n", `perimeterd_proxy_requests_total{decision="allow",reason="allowed"} 1` + "\n",
		`perimeterd_proxy_requests_total{decision="deny",reason="no-rule"} 1` + "\n", `perimeterd_proxy_user_bytes_total{direction="down",user="alice"} `,
		"perimeterd_token_step ", "perimeterd_build_info{",
	} {
		if !strings.Contains(text, "\n"+want) || strings.Contains(text, "\n"+want+"0\n") {
			t.Errorf("no %q", want)
		}
	}
	if strings.Contains(text, "perimeterd_tokens_loaded_total 0\n") || strings.Contains(text, "perimeterd_token_load_duration_seconds_count 0\n") {
		t.Error("tokens were loaded and not counted")
	}
	if t.Failed() {
		t.Log(text)
	}
}
