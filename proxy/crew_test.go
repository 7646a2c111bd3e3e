package proxy

import (
	"sync"
	"testing"
	"time"
)

func TestCrewDoesEverythingAtOnceAndKeepsFew(t *testing.T) {
	const jobs = 10 * crewIdle
	c := newCrew()
	for range 3 { // most of them by new ones, then some by those who wait
		var all, begun sync.WaitGroup
		begun.Add(jobs)
		for range jobs {
			all.Add(1)
			c.do(func() {
				defer all.Done()
				begun.Done()
				begun.Wait()
			})
		}
		all.Wait()
		for until := time.Now().Add(20 * time.Second); c.idle.Load() != crewIdle; time.Sleep(time.Millisecond) {
			if time.Now().After(until) {
				t.Fatalf("%d wait, want %d", c.idle.Load(), crewIdle)
			}
		}
	}
	c.dismiss()
	done := make(chan struct{})
	c.do(func() { close(done) })
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		t.Fatal("a job after the crew was dismissed is not done")
	}
}
