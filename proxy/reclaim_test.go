package proxy

import (
	"testing"
	"time"
)

func TestMemoryIsGivenBackOnceManyHaveComeToRestOrGone(t *testing.T) {
	var r reclaim
	start := time.Now()
	for i, look := range []struct {
		tunnels int
		after   time.Duration
		due     bool
	}{
		{500, time.Minute, false},         // few
		{5000, 2 * time.Minute, false},    // still coming
		{9900, 3 * time.Minute, false},    // still coming
		{9950, 4 * time.Minute, true},     // at rest
		{9950, 6 * time.Minute, false},    // done
		{9950, 9*time.Minute + 1, true},   // five minutes later
		{9100, 10 * time.Minute, false},   // some went
		{100, 11 * time.Minute, false},    // going
		{0, 12 * time.Minute, true},       // gone
		{2000, 12*time.Minute + 1, false}, // coming
		{2000, 12*time.Minute + 2, false}, // too soon
		{2000, 13*time.Minute + 3, true},
	} {
		if got := r.due(look.tunnels, start.Add(look.after)); got != look.due {
			t.Errorf("look %d, %d tunnels after %v: %v", i, look.tunnels, look.after, got)
		}
	}
}
