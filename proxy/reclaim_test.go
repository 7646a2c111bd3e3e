package proxy

import (
	"runtime"
	"runtime/debug"
	"testing"
	"time"
)

func TestMemoryIsGivenBackOnceManyHaveComeToRestOrGone(t *testing.T) {
	const mega = 1 << 20
	r := reclaim{}
	start := time.Now()
	allocated := uint64(0)
	for i, look := range []struct {
		live, free, allocates uint64
		moving                int
		after                 time.Duration
		due                   bool
	}{
		{45 * mega, 30 * mega, 100 * mega, 0, time.Second, false},            // many have just come
		{45 * mega, 3 * mega, mega, 0, 5 * time.Second, false},               // little is free
		{70 * mega, 80 * mega, 2 * mega, 9000, 10 * time.Second, false},      // they go to rest
		{70 * mega, 100 * mega, 2 * mega, 0, 15 * time.Second, true},         // at rest
		{70 * mega, 60 * mega, 2 * mega, 0, time.Minute, false},              // too soon
		{70 * mega, 60 * mega, 20 * mega, 0, 3 * time.Minute, false},         // others talk, and would take it
		{70 * mega, 60 * mega, mega, 3, 4 * time.Minute, true},               // but for a few
		{700 * mega, 60 * mega, mega, 0, 10 * time.Minute, false},            // little, for what it would cost
		{45 * mega, 7 * mega, 0, 0, 20 * time.Minute, false},                 // too little
		{45 * mega, 9 * mega, 0, 0, 20*time.Minute + 5*time.Second, true},    // enough
		{45 * mega, 90 * mega, 0, 0, 20*time.Minute + 10*time.Second, false}, // not over and over
	} {
		allocated += look.allocates
		m := memory{live: look.live, free: look.free, allocated: allocated}
		if got := r.due(m, look.moving, start.Add(look.after)); got != look.due {
			t.Errorf("look %d, %+v: %v", i, m, got)
		}
	}
}

func TestMemoryThatIsNobodysIsSeen(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // nothing collects in between
	debug.FreeOSMemory()
	before := readMemory()
	for size := 8 << 10; size < 8<<10+4096; size++ {
		runtime.KeepAlive(make([]byte, size))
	}
	after := readMemory()
	if before.live == 0 || after.allocated-before.allocated < 32<<20 || after.free < before.free+30<<20 {
		t.Errorf("before 32 MB of garbage %+v, after %+v", before, after)
	}
}
