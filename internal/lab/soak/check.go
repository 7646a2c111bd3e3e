//go:build linux

package main

import (
	"errors"
	"fmt"
	"time"

	"perimeterd/internal/console"
	"perimeterd/internal/lab"
)

// remembers is what the daemon may take for a spent token and for a window until they expire: an element of a map each.
const remembers = 256 // bytes

// check tells what grew. Goroutines and descriptors are those of before, at every sample. Heap and memory are those of half time,
// when the daemon remembers as much as it will ever, but for a tenth and a megabyte, and a quarter and eight; and for
// what it remembers more.
func check(all []sample, m lab.Metrics, load time.Duration) error {
	var errs []error
	grew := func(s sample, what string, is, was int) {
		errs = append(errs, fmt.Errorf("%s: %d %s, and %d before", s.name, is, what, was))
	}
	first, half := all[0], all[2]
	for i, s := range all {
		if s.goroutines != first.goroutines {
			grew(s, "goroutines", s.goroutines, first.goroutines)
		}
		if s.fds != first.fds {
			grew(s, "descriptors", s.fds, first.fds)
		}
		if i <= 2 {
			continue
		}
		more := max(s.remembered()-half.remembered(), 0) * remembers
		if s.heap > half.heap+half.heap/10+1<<20+more {
			grew(s, "bytes of heap", s.heap, half.heap)
		}
		if s.rss > half.rss+half.rss/4+8<<20+more {
			grew(s, "bytes resident", s.rss, half.rss)
		}
	}
	told, err := m.Value(console.WindowsOpened, "kind", "token")
	errs = append(errs, err)
	missed, err := m.Value(console.OpeningsMissed)
	errs = append(errs, err)
	fmt.Printf("the daemon logged %.0f openings by token (warm-up included), and missed %.0f\n", told, missed)
	if err := errors.Join(errs...); err != nil {
		return err
	}
	fmt.Printf("flat: goroutines and descriptors equal at every sample; heap %.1f MB at half time, %.1f MB at the end of %v of knocks, %.1f MB when all had expired; the table's sets empty again\n",
		mega(half.heap), mega(all[4].heap), load.Round(time.Second), mega(all[5].heap))
	return nil
}

func (s sample) remembered() int { return s.fill[0] + s.fill[1] + s.fill[2] }
