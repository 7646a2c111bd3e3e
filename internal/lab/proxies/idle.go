//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"perimeterd/internal/lab"
	"perimeterd/internal/lab/bench"
)

const (
	settled = time.Minute     // after which silent tunnels cost what they cost
	returns = 5 * time.Minute // for memory to go back: Go collects every two minutes at the latest
)

// held is what a proxy holds at a moment.
type held struct {
	RSS     int `json:"resident"` // bytes
	FDs     int `json:"descriptors"`
	Threads int `json:"threads"`
	Heap    int `json:"heap_and_stacks,omitempty"` // of Go: bytes that the last collection left, and of stacks; perimeterd only
}

// silence is how silent tunnels were held.
type silence struct {
	Proxy   string  `json:"proxy"`
	Asked   int     `json:"asked"`
	Tunnels int     `json:"tunnels"`
	Failed  string  `json:"failed,omitempty"` // why there are not more
	Before  held    `json:"before"`
	Settled held    `json:"settled"`
	End     held    `json:"end"`
	After   held    `json:"after"`
	Seconds float64 `json:"held_seconds"`
}

func (s *silence) each(bytes func(held) int, at held) float64 {
	return float64(bytes(at)-bytes(s.Before)) / float64(max(s.Tunnels, 1))
}

// idle holds many silent tunnels at every proxy, all at once, and closes them.
func (r *results) idle(ctx context.Context, room *room, o options) error {
	if most := (room.files - spareFiles) / 2 / 100 * 100; o.idle > most {
		r.Limited = fmt.Sprintf("%d tunnels at most here, where a process may have %d open files", most, room.files)
		o.idle = most
	}
	each := func(at func(*silence) *held) error {
		for i, c := range room.all {
			h, err := room.held(ctx, c)
			if err != nil {
				return err
			}
			*at(r.Idle[i]) = h
		}
		return nil
	}
	for _, c := range room.all {
		r.Idle = append(r.Idle, &silence{Proxy: c.name, Asked: o.idle})
	}
	if r.Tunnels == nil { // what is remembered of tunnels that are over must not be taken for what silent ones cost
		for _, c := range room.all {
			if err := passing(room, c, cloudName, o.idle); err != nil {
				return err
			}
		}
	}
	if err := room.collected(ctx); err != nil {
		return err
	}
	if err := each(func(s *silence) *held { return &s.Before }); err != nil {
		return err
	}
	holders := make([]*holder, len(room.all))
	defer func() {
		for _, h := range holders {
			if h != nil {
				h.close()
			}
		}
	}()
	for i, c := range room.all {
		var err error
		if holders[i], err = room.holder(ctx, c, i, o.idle); err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
		said, err := holders[i].hear()
		if err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
		r.Idle[i].Tunnels, r.Idle[i].Failed = said.Tunnels, said.Failed
	}
	start := time.Now()
	if err := sleep(ctx, min(settled, o.hold)); err != nil {
		return err
	}
	if err := each(func(s *silence) *held { return &s.Settled }); err != nil {
		return err
	}
	if err := sleep(ctx, o.hold-time.Since(start)); err != nil {
		return err
	}
	if err := each(func(s *silence) *held { return &s.End }); err != nil {
		return err
	}
	for i, h := range holders { // what was silent must still be there
		said, err := h.use()
		if err != nil {
			return fmt.Errorf("%s: %w", room.all[i].name, err)
		}
		if s := r.Idle[i]; said.Failed != "" {
			s.Failed = fmt.Sprintf("after %v of silence: %s", time.Since(start).Round(time.Second), said.Failed)
		}
		r.Idle[i].Seconds = time.Since(start).Seconds()
		h.close()
	}
	if err := room.collected(ctx); err != nil {
		return err
	}
	for deadline := time.Now().Add(returns); ; {
		if err := each(func(s *silence) *held { return &s.After }); err != nil {
			return err
		}
		if s := r.Idle[0]; s.After.FDs <= s.Before.FDs && s.After.RSS <= s.Before.RSS+back || time.Now().After(deadline) || o.hold < settled {
			break
		}
		if err := sleep(ctx, time.Second); err != nil {
			return err
		}
	}
	for _, s := range r.Idle {
		at := float64(s.Tunnels)
		r.Add(bench.Figure{What: "idle memory a tunnel", Who: s.Proxy, Unit: "B", At: at, Axis: "idle tunnels", Values: []float64{s.each(rss, s.End)}})
		r.Add(bench.Figure{What: "idle descriptors a tunnel", Who: s.Proxy, Unit: "1", At: at, Axis: "idle tunnels", Values: []float64{s.each(fds, s.End)}})
		fmt.Printf("%-24s %d tunnels %s\n  before %+v\n  settled %+v: %.1f KB, %.2f descriptors each\n  end %+v\n  after %+v\n", s.Proxy, s.Tunnels, s.Failed,
			s.Before, s.Settled, s.each(rss, s.Settled)/1024, s.each(fds, s.Settled), s.End, s.After)
	}
	if s := r.Idle[0]; s.Proxy == "perimeterd" && o.hold >= settled {
		r.promise(s.Failed == "" && s.Tunnels == o.idle, "%d silent tunnels of %d: %s", s.Tunnels, o.idle, s.Failed)
		r.promise(s.After.FDs <= s.Before.FDs, "%d descriptors after all tunnels were closed, %d before", s.After.FDs, s.Before.FDs)
		r.promise(s.After.Heap <= s.Before.Heap+s.Before.Heap/10+4<<20, "%d bytes of heap and stacks after all tunnels were closed, %d before", s.After.Heap, s.Before.Heap)
		r.promise(s.After.RSS <= s.Before.RSS+back, "%d bytes resident after all tunnels were closed, %d before", s.After.RSS, s.Before.RSS)
	}
	return nil
}

// back is what memory may stay above what it was: arenas that Go has emptied, and gives back late.
const back = 16 << 20

func rss(h held) int { return h.RSS }
func fds(h held) int { return h.FDs }

func (r *room) held(ctx context.Context, c *contender) (h held, err error) {
	u, err := lab.UsageOf(c.pid)
	if err != nil {
		return h, err
	}
	h = held{RSS: u.RSS, FDs: u.FDs, Threads: u.Threads}
	if c.name != "perimeterd" {
		return h, nil
	}
	m, err := r.daemon.Metrics(ctx, metricsAddress)
	if err != nil {
		return h, err
	}
	heap, err1 := m.Value("go_memstats_next_gc_bytes")
	stacks, err2 := m.Value("go_memstats_stack_inuse_bytes")
	h.Heap = int(heap/2 + stacks)
	return h, errors.Join(err1, err2)
}

// collected waits until the daemon has collected its garbage once more.
func (r *room) collected(ctx context.Context) error {
	last := -1.0
	for {
		m, err := r.daemon.Metrics(ctx, metricsAddress)
		if err != nil {
			return err
		}
		at, err := m.Value("go_memstats_last_gc_time_seconds")
		if err != nil {
			return err
		}
		if last < 0 {
			last = at
		}
		if at > last {
			return nil
		}
		if err := sleep(ctx, 100*time.Millisecond); err != nil {
			return err
		}
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
