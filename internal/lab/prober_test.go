//go:build linux

package lab

import (
	"context"
	"strings"
	"testing"
	"time"
)

func nft(t *testing.T, ns *Namespace, script string) {
	t.Helper()
	c := ns.Command(t.Context(), "nft", "-f", "-")
	c.Stdin = strings.NewReader(script)
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("nft: %v: %s", err, out)
	}
}

func TestProberTellsAcceptedRefusedAndSilent(t *testing.T) {
	l := Start(t, Options{})
	listener, err := l.Bastion.Listen("tcp", ":7000")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	nft(t, l.Bastion, "table inet door { chain in { type filter hook input priority 0; tcp dport 7002 drop; }; }")
	for _, tt := range []struct {
		port uint16
		want Tally
	}{
		{7000, Tally{Accepted: 50}},
		{7001, Tally{Refused: 50}},
		{7002, Tally{Silent: 50}},
	} {
		for _, to := range []struct{ *Prober }{
			{l.Prober(l.Client, l.Bastion.Addr, tt.port, l.Stranger)},
			{l.Prober(l.Client, l.Bastion.Addr6, tt.port, l.Stranger6)},
		} {
			to.Max = 50
			if tt.port != 7002 {
				to.Wait = 5 * time.Second // an answer that is slow in a busy machine is not silence
			}
			if err := to.Run(t.Context()); err != nil {
				t.Fatal(err)
			}
			got := to.Tally()
			got.FirstAccepted, got.LastAccepted = time.Time{}, time.Time{}
			if got != tt.want {
				t.Errorf("%v: %+v, want %+v", to.to, got, tt.want)
			}
		}
	}
	unreachable := l.Prober(l.Client, l.Cloud.Addr, 80)
	unreachable.Max = 3
	if err := unreachable.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := unreachable.Tally(); got.Failed != 3 || got.LastFailure == nil || got.Total() != 3 {
		t.Errorf("of a host without a route: %+v", got)
	}
	if err := (&Prober{}).Run(t.Context()); err == nil {
		t.Error("a prober without bounds ran")
	}
}

func TestProberFindsTheMomentWhenTheDoorIsOpen(t *testing.T) {
	l := Start(t, Options{})
	listener, err := l.Bastion.Listen("tcp", ":7000")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	strangers, err := l.Strangers(t.Context(), 20)
	if err != nil {
		t.Fatal(err)
	}
	const door = "table inet door { chain in { type filter hook input priority 0; tcp dport 7000 drop; }; }"
	nft(t, l.Bastion, door)
	p := l.Prober(l.Client, l.Bastion.Addr, 7000, strangers...)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- p.Run(ctx) }()
	attempts := func(atLeast int) {
		t.Helper()
		for range 1000 {
			if p.Tally().Total() >= atLeast {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
		t.Fatalf("after 10 s: %+v", p.Tally())
	}
	attempts(100)
	if shut := p.Tally(); shut.Silent != shut.Total() {
		t.Errorf("the door is shut: %+v", shut)
	}
	opened := time.Now()
	nft(t, l.Bastion, "flush ruleset")
	attempts(p.Tally().Total() + 100)
	nft(t, l.Bastion, door)
	closed := time.Now()
	attempts(p.Tally().Total() + 100)
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	got := p.Tally()
	t.Logf("open for %v: %+v", closed.Sub(opened), got)
	if got.Accepted == 0 || got.FirstAccepted.Before(opened) || got.LastAccepted.After(closed.Add(time.Second)) {
		t.Errorf("open for %v from %v: %+v", closed.Sub(opened), opened, got)
	}
}
