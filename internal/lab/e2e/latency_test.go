package e2e

import (
	"fmt"
	"os"
	"slices"
	"testing"
	"time"

	"perimeterd/internal/lab"
)

// cold is the time from `vpn up`, which knocks, to the first byte of an HTTPS page, with all that was kept thrown away.
// Up is when vpn up returned.
func (s *stage) cold() (up, first time.Duration) {
	s.t.Helper()
	start := time.Now()
	s.ok(s.alice.VPN(s.ctx, "up"))
	up = time.Since(start)
	var ttfb float64
	launched := time.Since(start)
	out := s.ok(s.curl("--proxy", "http://"+localProxy, "-o", os.DevNull, "-w", "%{time_starttransfer}", "https://"+cloudName+"/"))
	if _, err := fmt.Sscan(out, &ttfb); err != nil {
		s.t.Fatalf("curl said %q: %v", out, err)
	}
	first = launched + time.Duration(ttfb*float64(time.Second))
	s.ok(s.alice.VPN(s.ctx, "down"))
	return up, first
}

// The number of round trips is how much longer it takes when a round trip takes longer: what the machine itself costs
// falls out of the difference.
func TestColdStartTakesSixRoundTrips(t *testing.T) {
	s := newStage(t, lab.Options{LongLink: true})
	s.ok(s.Bastion.Command(s.ctx, "sysctl", "-w", "net.ipv4.tcp_fastopen=3")) // as the package does
	measure := func(rtt time.Duration, times int) (up, first time.Duration) {
		s.Link.SetDelay(rtt / 2)
		var ups, firsts []time.Duration
		for range times {
			u, f := s.cold()
			ups, firsts = append(ups, u), append(firsts, f)
		}
		slices.Sort(ups)
		slices.Sort(firsts)
		return ups[times/2], firsts[times/2]
	}
	const short, long = 50 * time.Millisecond, 250 * time.Millisecond
	measure(short, 1) // programs and caches are warm then, as on a machine that is in use
	upShort, firstShort := measure(short, 5)
	upLong, firstLong := measure(long, 3)
	trips := func(a, b time.Duration) float64 { return float64(b-a) / float64(long-short) }
	tunnel, page := trips(upShort, upLong), trips(firstShort, firstLong)
	t.Logf("at %v round trip, medians: vpn up %v, first HTTPS byte %v", short, upShort.Round(100*time.Microsecond), firstShort.Round(100*time.Microsecond))
	t.Logf("at %v: %v and %v", long, upLong.Round(100*time.Microsecond), firstLong.Round(100*time.Microsecond))
	t.Logf("%.2f round trips to the tunnel (knock with SYN, TLS, POST with the client's Finished), %.2f to the first byte (CONNECT with the connection, TLS, GET more)", tunnel, page)
	if tunnel > 3.4 || page > 6.4 {
		t.Errorf("%.2f and %.2f round trips, want 3 and 6", tunnel, page)
	}
}
