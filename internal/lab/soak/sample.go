//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"perimeterd/internal/console"
	"perimeterd/internal/lab"
)

// knockSets are the sets that knocks fill, besides the tokens that wait.
var knockSets = []string{"open4", "seq4", "spent", "progress4", "pace4"}

// sample is what the daemon and the table hold at a moment without knocks, right after a garbage collection.
type sample struct {
	name       string
	rss        int // bytes
	heap       int // bytes, by the goal of the next collection: twice what the last one left
	goroutines int
	fds        int
	tokens     int
	fill       []int // by knockSets
}

const sampleHead = "                RSS      heap  goroutines  fds   tokens    open     seq   spent progress    pace"

func (s sample) String() string {
	return fmt.Sprintf("%8s  %6.1f MB %6.1f MB  %10d %4d %8d %7d %7d %7d %8d %7d", s.name, mega(s.rss), mega(s.heap), s.goroutines, s.fds,
		s.tokens, s.fill[0], s.fill[1], s.fill[2], s.fill[3], s.fill[4])
}

func mega(bytes int) float64 { return float64(bytes) / 1e6 }

// takeSample waits for a garbage collection, which the runtime makes every two minutes at the latest, and our asking sooner; then,
// for at most ten seconds, for as many goroutines and descriptors as want has: what serves the last request may be ending.
func takeSample(ctx context.Context, d *lab.Daemon, name string, want *sample) (s sample, err error) {
	last, settled := -1.0, time.Time{}
	for {
		m, err := d.Metrics(ctx, metricsAddress)
		if err != nil {
			return s, err
		}
		collected, err := m.Value("go_memstats_last_gc_time_seconds")
		if err != nil {
			return s, err
		}
		if last < 0 {
			last = collected
		}
		if collected > last {
			if settled.IsZero() {
				settled = time.Now().Add(10 * time.Second)
			}
			s, err := read(m, d, name)
			if err != nil || want == nil || s.goroutines == want.goroutines && s.fds == want.fds || time.Now().After(settled) {
				return s, err
			}
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return s, ctx.Err()
		}
	}
}

func read(m lab.Metrics, d *lab.Daemon, name string) (s sample, err error) {
	u, err := d.Usage()
	var errs []error
	value := func(name string, labels ...string) int {
		v, err := m.Value(name, labels...)
		errs = append(errs, err)
		return int(v)
	}
	s = sample{name: name, rss: u.RSS, fds: value("process_open_fds"), heap: value("go_memstats_next_gc_bytes") / 2, goroutines: value("go_goroutines"),
		tokens: value(console.SetElements, "set", "tokens")}
	for _, set := range knockSets {
		s.fill = append(s.fill, value(console.SetElements, "set", set))
	}
	return s, errors.Join(append(errs, err)...)
}

// drained waits until the sets that knocks fill are empty.
func drained(ctx context.Context, d *lab.Daemon) error {
	ctx, cancel := context.WithTimeout(ctx, remembered+time.Minute)
	defer cancel()
	for {
		m, err := d.Metrics(ctx, metricsAddress)
		if err != nil {
			return err
		}
		left := 0
		for _, set := range knockSets {
			n, err := m.Value(console.SetElements, "set", set)
			if err != nil {
				return err
			}
			left += int(n)
		}
		if left == 0 {
			return nil
		}
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return fmt.Errorf("%d elements are left of knocks that ended %v ago: they should have expired", left, remembered+time.Minute)
		}
	}
}
