package firewall

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"perimeterd/knock"
)

// traced runs fn while a source is traced and returns what was seen.
func (r *room) traced(cfg Config, source netip.Addr, fn func()) []string {
	r.t.Helper()
	ctx, cancel := context.WithCancel(r.t.Context())
	ready, done := make(chan struct{}), make(chan error, 1)
	var mu sync.Mutex
	var seen []string
	go func() {
		done <- Trace(ctx, r.fw.netns, cfg, source, ready, func(a Arrival) {
			mu.Lock()
			defer mu.Unlock()
			seen = append(seen, fmt.Sprintf("%d %v:%d len %d passed %v delivered %v", a.Proto, a.Destination.Addr(), a.Destination.Port(), a.Length, a.Passed, a.Delivered))
		})
	}()
	select {
	case <-ready:
	case err := <-done:
		r.t.Fatal(err)
	}
	fn()
	time.Sleep(200 * time.Millisecond)
	cancel()
	if err := <-done; err != nil {
		r.t.Fatal(err)
	}
	mu.Lock()
	defer mu.Unlock()
	return seen
}

func TestTraceTellsHowFarEachPacketCame(t *testing.T) {
	cfg := withSequence(t)
	r := newRoom(t, cfg)
	token := tok(1)
	r.load(Token{token, 7, soon()})
	seen := r.traced(cfg, r.Client.Addr, func() {
		r.accepted(r.Client.Addr)
		r.send(r.Client.Addr, token[:])
		r.accepted(r.Client.Addr)
		r.send(r.Client.Addr, append([]byte{1}, make([]byte, 147)...))
		r.send(r.Client.Addr, append([]byte{4}, make([]byte, 200)...)) // a tunnel's data
		r.stockKnock("7102", "19044:udp")
		r.send(r.Stranger, token[:]) // another source
		run(t, "", "ip", "netns", "exec", r.Bastion.Name, "nft", "add table inet other; add chain inet other in { type filter hook input priority 0; policy drop; }")
		r.accepted(r.Client.Addr)
	})
	want := []string{
		"6 198.18.1.1:1194 len 0 passed false delivered false",
		"17 198.18.1.1:1194 len 16 passed false delivered false",
		"6 198.18.1.1:1194 len 0 passed true delivered true",
		"17 198.18.1.1:1194 len 148 passed true delivered true",
		"6 198.18.1.1:7102 len 0 passed true delivered true",
		"17 198.18.1.1:19044 len 1 passed true delivered true",
		"6 198.18.1.1:1194 len 0 passed true delivered false",
	}
	if strings.Join(seen, "\n") != strings.Join(want, "\n") {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(seen, "\n"), strings.Join(want, "\n"))
	}
	if out := run(t, "", "ip", "netns", "exec", r.Bastion.Name, "nft", "list", "tables"); strings.Contains(out, "watch") {
		t.Errorf("left behind: %s", out)
	}
	if spent, err := r.fw.Spent(token); err != nil || !spent {
		t.Errorf("spent %v, %v", spent, err)
	}
	if there, err := r.fw.Present(); err != nil || !there {
		t.Errorf("present %v, %v", there, err)
	}
}

func TestTraceOverIPv6(t *testing.T) {
	r := newRoom(t, example())
	seen := r.traced(example(), r.Client.Addr6, func() { r.accepted(r.Client.Addr6) })
	if want := "6 2001:db8:18:1::1:1194 len 0 passed false delivered false"; strings.Join(seen, "\n") != want {
		t.Errorf("got %q, want %q", seen, want)
	}
}

func TestTraceIsBoundedUnderAFlood(t *testing.T) {
	cfg := example()
	r := newRoom(t, cfg)
	token := tok(1)
	r.load(Token{token, 7, soon()})
	r.send(r.Client.Addr, token[:])
	start := time.Now()
	seen := r.traced(cfg, r.Client.Addr, func() {
		for i := range 3000 {
			r.send(r.Client.Addr, fmt.Appendf([]byte{1}, "an initiation that is not one: %d", i))
		}
	})
	most := traceOurs * (4 + int(time.Since(start).Seconds())) // the rate, and its burst at each of the points
	t.Logf("%d of 3000 packets were shown", len(seen))
	if len(seen) < traceOurs || len(seen) > max(most, 400) {
		t.Errorf("%d packets were shown, want some, bounded by %d a second", len(seen), traceOurs)
	}
	for _, s := range seen {
		if !strings.HasSuffix(s, "passed true delivered true") {
			t.Errorf("%s: the window is open", s)
		}
	}
}

// A killed process runs no deferred function: only the kernel can clean up.
func TestNothingOfATraceOutlivesAKill(t *testing.T) {
	netns := private(t)
	f := New(testLog(t), netns)
	f.mu.Lock()
	if err := f.traceTableLocked(withSequence(t), netip.MustParseAddr("198.18.1.2"), 1195); err != nil {
		t.Fatal(err)
	}
	name := fmt.Sprintf("perimeterd_watch_%d", os.Getpid())
	if out := run(t, "", "nft", "list", "tables"); !strings.Contains(out, name) {
		t.Fatalf("no table %s in %q", name, out)
	}
	f.dropLocked() // the kernel closes a dead process's sockets
	f.mu.Unlock()
	if out := run(t, "", "nft", "list", "tables"); out != "" {
		t.Errorf("left behind: %s", out)
	}
}

func FuzzParseArrival(f *testing.F) {
	v4 := udp4(netip.MustParseAddr("198.18.1.2"), netip.MustParseAddr("198.18.1.1"), 1194, bytes.Repeat([]byte{7}, knock.TokenSize))
	f.Add(v4)
	f.Add(v4[:30])
	f.Add(append([]byte{0x60, 39: 0}, v4[20:]...))
	f.Add([]byte{0x4f})
	f.Fuzz(func(t *testing.T, packet []byte) {
		a, ok := parseArrival(packet)
		if ok && (!a.Source.IsValid() || a.Length < 0 || len(a.Payload) > a.Length || !bytes.Contains(packet, a.Payload)) {
			t.Errorf("%x: %+v", packet, a)
		}
	})
}
