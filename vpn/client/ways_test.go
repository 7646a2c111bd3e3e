package client

import (
	"testing"
	"time"
)

func TestStreamTriesUDPWithItsFirstBatchesAlone(t *testing.T) {
	now := time.Now()
	w := &way{both: now}
	w.more.Store(bothTimes)
	for i := range 3 * bothTimes {
		if got, want := w.tries(now), i < bothTimes; got != want {
			t.Fatalf("batch %d by UDP: %v", i, got)
		}
	}
	if n := w.more.Load(); n != 0 { // below, each batch would bring it closer to where it begins anew
		t.Errorf("the count stands at %d", n)
	}
}

func TestStreamTriesUDPForAMoment(t *testing.T) {
	now := time.Now()
	w := &way{both: now.Add(bothFor)}
	if !w.tries(now) || w.tries(now.Add(bothFor)) {
		t.Error("the moment is not what decides")
	}
}
