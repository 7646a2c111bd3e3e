package e2e

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"perimeterd/internal/lab"
)

func TestSquidAccessLogIsWrittenAndRotated(t *testing.T) {
	s := newStage(t, lab.Options{}, lab.Setting{Key: "squid_access_log", Value: `"access.log"`})
	path := filepath.Join(s.daemon.Dir, "state", "access.log")
	s.ok(s.alice.VPN(s.ctx, "up"))
	lines := func(path string, n int) []string {
		t.Helper()
		for {
			b, err := os.ReadFile(path)
			if l := strings.SplitAfter(string(b), "\n"); err == nil && len(l) == n+1 {
				return l[:n]
			}
			if s.ctx.Err() != nil {
				t.Fatalf("%s: want %d lines, got %q, %v", path, n, b, err)
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	s.ok(s.curl("https://" + cloudName + "/"))
	s.fails(s.curl("https://evil.example.com/"))
	got := strings.Join(lines(path, 2), "")
	if !regexp.MustCompile(`(?m)^\d+\.\d{3} +\d+ 10\.77\.0\.2 TCP_TUNNEL/200 [1-9]\d+ CONNECT s3\.us-east-1\.amazonaws\.com:443 alice HIER_DIRECT/198\.19\.1\.2 -$`).MatchString(got) ||
		!regexp.MustCompile(`(?m)^\d+\.\d{3} +\d+ 10\.77\.0\.2 TCP_DENIED/403 0 CONNECT evil\.example\.com:443 alice HIER_NONE/- -$`).MatchString(got) {
		t.Errorf("got\n%s", got)
	}
	// As logrotate does it.
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	reloads := len(s.daemon.Entries("configuration reloaded"))
	if err := s.daemon.Signal(hangUp); err != nil {
		t.Fatal(err)
	}
	lines(path, 0)
	if _, err := s.daemon.Await(s.ctx, "configuration reloaded", reloads+1); err != nil {
		t.Fatal(err)
	}
	s.ok(s.curl("https://" + cloudName + "/"))
	lines(path, 1)
	lines(path+".1", 2)
}
