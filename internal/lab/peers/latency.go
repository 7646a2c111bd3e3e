//go:build linux

package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"perimeterd/internal/lab"
)

// How the time to open is taken.
const (
	synPace     = 200 * time.Microsecond
	synPatience = 2 * time.Second
)

// latency is a way's time from the last packet of a knock to the first SYN that is answered.
type latency struct {
	Door        string    `json:"door"`
	Runs        int       `json:"runs"`
	Opened      int       `json:"opened"`
	FirstSYN    int       `json:"first_syn_answered"` // the one right behind the knock
	Times       []float64 `json:"microseconds"`       // of those that opened, as they came
	median, p99 time.Duration
}

// measureLatency takes the ways in turn, runs times each: A B C D, A B C D, ...
func measureLatency(ctx context.Context, l *lab.Lab, doors []*door, k *lab.Knocker, source func() netip.Addr, runs int) (all []*latency, err error) {
	type entry struct {
		*door
		way
		*latency
	}
	var entries []entry
	for _, d := range doors {
		for _, w := range d.ways {
			e := entry{d, w, &latency{Door: w.name}}
			if err := warmUp(ctx, l, d, w, k, source); err != nil {
				return nil, err
			}
			entries, all = append(entries, e), append(all, e.latency)
		}
	}
	for range runs {
		for _, e := range entries {
			o, err := open(ctx, e.door, e.way, k, source(), synPace, synPatience)
			if err != nil {
				return nil, err
			}
			e.Runs++
			if o.Opened {
				e.Opened++
				e.Times = append(e.Times, float64(o.After.Nanoseconds())/1000)
				if o.SYNs == 1 {
					e.FirstSYN++
				}
			}
			time.Sleep(20 * time.Millisecond) // what a daemon does after an opening is not the next one's time
		}
	}
	for _, e := range all {
		e.median, e.p99 = quantile(e.Times, 0.5), quantile(e.Times, 0.99)
	}
	return all, nil
}

func open(ctx context.Context, d *door, w way, k *lab.Knocker, source netip.Addr, pace, patience time.Duration) (lab.Opening, error) {
	knock, err := w.make(ctx, source)
	if err != nil {
		return lab.Opening{}, err
	}
	o, err := k.Open(ctx, source, d.behind(), knock, pace, patience)
	if err != nil {
		return o, fmt.Errorf("%s: %w", w.name, err)
	}
	return o, nil
}

// warmUp knocks until the door has opened three times: its daemon listens, and programs and caches are warm.
func warmUp(ctx context.Context, l *lab.Lab, d *door, w way, k *lab.Knocker, source func() netip.Addr) error {
	for opened, tries := 0, 0; opened < 3; tries++ {
		if tries == 20 {
			log, _ := os.ReadFile(filepath.Join(l.Dir, d.name+".log"))
			return fmt.Errorf("%s does not open: %s", w.name, log)
		}
		o, err := open(ctx, d, w, k, source(), synPace, synPatience)
		if err != nil {
			return err
		}
		if o.Opened {
			opened++
		}
	}
	return nil
}
