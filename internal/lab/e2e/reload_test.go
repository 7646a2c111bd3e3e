package e2e

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"perimeterd/internal/lab"
)

func allowRule(name string) string {
	return fmt.Sprintf("\n[[proxy.rule]]\nallow  = [%q]\nports  = [443]\ngroups = [\"*\"]\ntls    = true\n", name)
}

// One rule goes, again and again, with requests and a download under way that another rule allows.
func TestApplyCutsWhatItTakesAwayAndNothingElse(t *testing.T) {
	s := newStage(t, lab.Options{})
	gone, stays := allowRule("gone.example.com"), allowRule("stays.example.com")
	s.addRules(gone + stays)
	s.perimeterd("apply")
	s.cloud.DNS.Set("gone.example.com", s.Cloud.Addr)
	s.cloud.DNS.Set("stays.example.com", s.Cloud.Addr)
	s.ok(s.alice.VPN(s.ctx, "up"))

	const size = 20_000_000
	download := func(name string) *lab.Cmd {
		c := s.curl("-k", "--max-time", "60", "--limit-rate", "5M", "-o", "/dev/null", "-w", "%{size_download}", fmt.Sprintf("https://%s/bytes/%d", name, size))
		c.Stdout, c.Stderr = new(strings.Builder), new(strings.Builder)
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		return c
	}
	going, staying := download("gone.example.com"), download("stays.example.com")
	for under := 0; under < 2; time.Sleep(time.Millisecond) {
		under = 0
		for _, r := range s.cloud.Requests() {
			if r.Sent > 0 && !r.Done {
				under++
			}
		}
		if s.ctx.Err() != nil {
			t.Fatal("the downloads do not begin")
		}
	}
	var clients sync.WaitGroup
	var served atomic.Int64
	const enough = 60
	for range 2 {
		clients.Go(func() {
			for served.Load() < enough {
				if out, err := s.curl("-k", "https://stays.example.com/").CombinedOutput(); err != nil || !strings.HasPrefix(string(out), "seen from ") {
					t.Errorf("a request under another rule: %v %s", err, out)
					served.Store(enough)
					return
				}
				served.Add(1)
			}
		})
	}
	text, err := os.ReadFile(s.daemon.Config)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.daemon.Config, []byte(strings.Replace(string(text), gone, "", 1)), 0o640); err != nil {
		t.Fatal(err)
	}
	for served.Load() < enough {
		s.perimeterd("apply")
	}
	if err := going.Wait(); err == nil {
		t.Error("the download of what is no longer allowed goes on to its end")
	}
	clients.Wait()
	if err := staying.Wait(); err != nil || staying.Stdout.(*strings.Builder).String() != fmt.Sprint(size) {
		t.Errorf("the other download: %v %v %v", err, staying.Stdout, staying.Stderr)
	}
	for {
		cut := 0
		for _, e := range s.daemon.Entries("proxy") {
			if e["end"] == "policy-changed" {
				cut++
				if e["destination"] != "gone.example.com:443" {
					t.Errorf("cut: %v", e)
				}
			}
		}
		if cut == 1 {
			break
		}
		if s.ctx.Err() != nil {
			t.Fatalf("%d connections were cut, not one", cut)
		}
		time.Sleep(10 * time.Millisecond)
	}
	if out := s.fails(s.curl("-k", "https://gone.example.com/")); !strings.Contains(out, "403") {
		t.Errorf("afterwards: %s", out)
	}
}
