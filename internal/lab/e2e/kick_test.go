package e2e

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"perimeterd/internal/lab"
	"perimeterd/vpn/client"
)

// A kicked client notices the silence, asks the gate what became of its session, and makes a new one.
func TestKickedClientIsBackWithTheNextRequestAndARevokedOneSaysSo(t *testing.T) {
	s := newStage(t, lab.Options{})
	s.ok(s.alice.VPN(s.ctx, "up"))
	s.ok(s.curl("https://" + cloudName + "/"))
	status := func() (st client.Status) {
		t.Helper()
		out, failed := s.alice.VPN(s.ctx, "status", "--json").Output()
		if err := json.Unmarshal(out, &st); err != nil {
			t.Fatalf("%v %q", err, out)
		}
		if (failed != nil) != (st.State == client.Refused) {
			t.Errorf("exit status of a tunnel that is %s: %v", st.State, failed)
		}
		return st
	}
	before := status().Session
	if out, err := s.daemon.Perimeterd(s.ctx, "kick", "alice"); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	start := time.Now()
	s.ok(s.curl("--max-time", "15", "https://"+cloudName+"/"))
	t.Logf("the page came %v after it was asked for", time.Since(start).Round(time.Millisecond))
	if after := status(); after.Session == before || after.Session == "" {
		t.Errorf("session %q, before the kick %q", after.Session, before)
	}
	if out, err := s.daemon.Perimeterd(s.ctx, "user", "revoke", "alice"); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	s.fails(s.curl("--max-time", "6", "https://"+cloudName+"/"))
	if st := status(); !strings.Contains(st.Problem, "revoked") {
		t.Errorf("status after the revocation: %s: %q", st.State, st.Problem)
	}
}
