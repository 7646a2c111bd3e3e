package e2e

import (
	"strconv"
	"strings"
	"testing"

	"perimeterd/internal/lab"
)

// Through tunnel and proxy, and changed by a reload. A slow machine is slower still, which passes.
func TestBandwidthOfAUserIsLimited(t *testing.T) {
	const size, second = 3_000_000, 2_000_000 // bytes
	s := newStage(t, lab.Options{}, lab.Setting{Key: "per_user_bandwidth", Value: `"16Mbit"`})
	s.ok(s.alice.VPN(s.ctx, "up"))
	took := func(args ...string) float64 {
		t.Helper()
		out := s.ok(s.curl(append(args, "--max-time", "60", "-o", "/dev/null", "-w", "%{time_total}")...))
		seconds, err := strconv.ParseFloat(strings.TrimSpace(out), 64)
		if err != nil {
			t.Fatalf("%q: %v", out, err)
		}
		return seconds
	}
	down := func() float64 { return took("https://" + cloudName + "/bytes/" + strconv.Itoa(size)) }
	up := took("-d", strings.Repeat("x", 100_000), "https://"+cloudName+"/upload") // below what the sockets hold
	limited := down()
	t.Logf("limited to 2 MB/s: 3 MB down in %.2f s, 0.1 MB up in %.2f s", limited, up)
	if least := 0.7 * size / second; limited < least {
		t.Errorf("3 MB in %.2f s, of 2 MB/s: want at least %.2f s", limited, least)
	}
	if err := s.daemon.Set(lab.Setting{Key: "per_user_bandwidth", Value: `""`}); err != nil {
		t.Fatal(err)
	}
	s.perimeterd("apply")
	t.Logf("without a limit: 3 MB down in %.2f s", down())
}
