package main

import (
	"log/slog"
	"testing"
	"time"

	"perimeterd/internal/audit"
	"perimeterd/internal/quota"
	"perimeterd/proxy"
	"perimeterd/vpn/gate"
)

func TestRefusalsOfOneUserFillNoAudit(t *testing.T) {
	tr := &trail{Recorder: audit.NewRecorder(t.TempDir(), audit.Options{}, slog.New(slog.DiscardHandler))}
	now := time.Now()
	for range 1000 {
		tr.refusal(gate.Refusal{Stage: gate.Request, User: "mallory"})
		tr.access(proxy.Access{Began: now, User: "eve"})
		tr.access(proxy.Access{Began: now, User: "eve", Decision: proxy.Decision{Allow: true}})
	}
	n := map[audit.Kind]int{}
	for _, r := range tr.Recent() {
		n[r.Kind]++
	}
	// A slow machine takes longer than one record's time for a thousand.
	if n[audit.Connection] != 1000 || n[audit.ProxyRefused] != quota.Burst || n[audit.RequestRefused] < quota.Burst || n[audit.RequestRefused] > quota.Burst+100 {
		t.Errorf("%v", n)
	}
}
