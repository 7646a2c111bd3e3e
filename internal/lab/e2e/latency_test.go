package e2e

import (
	"fmt"
	"os"
	"slices"
	"testing"
	"time"

	"perimeterd/internal/lab"
)

// cold is the time from `vpn up`, which knocks, to the first byte of an HTTPS page, with all that was kept thrown away; and then
// how long the first byte of another connection to the same host takes. Up is when vpn up returned.
func (s *stage) cold() (up, first, again time.Duration) {
	s.t.Helper()
	start := time.Now()
	s.ok(s.alice.VPN(s.ctx, "up"))
	up = time.Since(start)
	page := func() time.Duration {
		var ttfb float64
		out := s.ok(s.curl("--proxy", "http://"+localProxy, "-o", os.DevNull, "-w", "%{time_starttransfer}", "https://"+cloudName+"/"))
		if _, err := fmt.Sscan(out, &ttfb); err != nil {
			s.t.Fatalf("curl said %q: %v", out, err)
		}
		return time.Duration(ttfb * float64(time.Second))
	}
	launched := time.Since(start)
	first = launched + page()
	again = page()
	s.ok(s.alice.VPN(s.ctx, "down"))
	return up, first, again
}

// The number of round trips is how much longer it takes when a round trip takes longer: what the machine itself costs
// falls out of the difference.
func TestColdStartTakesSixRoundTrips(t *testing.T) {
	s := newStage(t, lab.Options{LongLink: true})
	s.ok(s.Bastion.Command(s.ctx, "sysctl", "-w", "net.ipv4.tcp_fastopen=3")) // as the package does
	measure := func(rtt time.Duration, times int) (medians [3]time.Duration) {
		s.Link.SetDelay(rtt / 2)
		var all [3][]time.Duration
		for range times {
			up, first, again := s.cold()
			for i, d := range []time.Duration{up, first, again} {
				all[i] = append(all[i], d)
			}
		}
		for i := range all {
			slices.Sort(all[i])
			medians[i] = all[i][times/2].Round(100 * time.Microsecond)
		}
		return medians
	}
	const short, long = 50 * time.Millisecond, 250 * time.Millisecond
	measure(short, 1) // programs and caches are warm then, as on a machine that is in use
	near, far := measure(short, 5), measure(long, 3)
	trips := func(i int) float64 { return float64(far[i]-near[i]) / float64(long-short) }
	t.Logf("at %v round trip, medians: vpn up, first HTTPS byte, first of another connection %v", short, near)
	t.Logf("at %v: %v", long, far)
	t.Logf("%.2f round trips to the tunnel (knock with SYN, TLS, POST with the client's Finished), %.2f to the first byte (CONNECT with the connection, TLS, GET more), %.2f of another connection (TLS with its CONNECT, GET)",
		trips(0), trips(1), trips(2))
	if trips(0) > 3.4 || trips(1) > 6.4 || trips(2) > 2.4 {
		t.Errorf("%.2f, %.2f and %.2f round trips, want 3, 6 and 2", trips(0), trips(1), trips(2))
	}
}
