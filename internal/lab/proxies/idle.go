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
	again   = time.Minute     // for which as many are held once more
	pause   = time.Minute     // from when the daemon has given memory back to the first: it does so every two minutes at most
	returns = 5 * time.Minute // for memory to go back
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
	Again   held    `json:"again"` // after as many were held and closed once more; perimeterd only
	Seconds float64 `json:"held_seconds"`
}

// each is what a tunnel took. Before, there may be memory that others used and nobody took back yet.
func (s *silence) each(what func(held) int, at held) float64 {
	without := what(s.Before)
	if s.After.FDs > 0 {
		without = min(without, what(s.After))
	}
	return float64(what(at)-without) / float64(max(s.Tunnels, 1))
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
	if err := room.givenBack(ctx); err != nil { // or what was garbage before would make room for the tunnels, and not be counted
		return err
	}
	if err := each(func(s *silence) *held { return &s.Before }); err != nil {
		return err
	}
	if err := sleep(ctx, pause); err != nil {
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
	ours := r.Idle[0]
	if err := await(ctx, func() (bool, error) {
		err := each(func(s *silence) *held { return &s.After })
		return ours.After.FDs <= ours.Before.FDs && ours.After.RSS <= ours.Before.RSS+back, err
	}); err != nil {
		return err
	}
	if c := room.all[0]; c.name == "perimeterd" {
		if err := r.holdAgain(ctx, room, c, o.idle); err != nil {
			return err
		}
	}
	for _, s := range r.Idle {
		at := float64(s.Tunnels)
		r.Add(bench.Figure{What: "idle memory a tunnel", Who: s.Proxy, Unit: "B", At: at, Axis: "idle tunnels", Values: []float64{s.each(rss, s.End)}})
		r.Add(bench.Figure{What: "idle descriptors a tunnel", Who: s.Proxy, Unit: "1", At: at, Axis: "idle tunnels", Values: []float64{s.each(fds, s.End)}})
		fmt.Printf("%-24s %d tunnels %s\n  before %+v\n  settled %+v: %.1f KB, %.2f descriptors each\n  end %+v\n  after %+v\n  again %+v\n", s.Proxy, s.Tunnels, s.Failed,
			s.Before, s.Settled, s.each(rss, s.Settled)/1024, s.each(fds, s.Settled), s.End, s.After, s.Again)
	}
	if s := ours; s.Proxy == "perimeterd" {
		r.promise(s.Failed == "" && s.Tunnels == o.idle, "%d silent tunnels of %d: %s", s.Tunnels, o.idle, s.Failed)
		r.promise(s.After.FDs <= s.Before.FDs && s.Again.FDs <= s.Before.FDs, "%d and %d descriptors after all tunnels were closed, %d before", s.After.FDs, s.Again.FDs, s.Before.FDs)
		r.promise(s.After.RSS <= s.Settled.RSS-(s.Settled.RSS-s.Before.RSS)/2, "%d bytes resident after all tunnels were closed, %d held: they do not go back", s.After.RSS, s.Settled.RSS)
		r.promise(s.Again.Heap <= s.After.Heap+s.After.Heap/10, "%d bytes of heap and stacks after all tunnels were closed, %d the time before", s.Again.Heap, s.After.Heap)
		r.promise(s.Again.RSS <= s.After.RSS+back, "%d bytes resident after all tunnels were closed, %d the time before", s.Again.RSS, s.After.RSS)
	}
	return nil
}

// await tries every now and then, for as long as memory may take to go back. Each time costs the daemon garbage.
func await(ctx context.Context, done func() (bool, error)) error {
	for deadline := time.Now().Add(returns); ; {
		if ok, err := done(); ok || err != nil || time.Now().After(deadline) {
			return err
		}
		if err := sleep(ctx, 3*time.Second); err != nil {
			return err
		}
	}
}

// holdAgain opens and closes as many once more: what Go keeps for the next time, such as the structures of as many goroutines as there
// ever were, it keeps once, and a leak it would add to.
func (r *results) holdAgain(ctx context.Context, room *room, c *contender, count int) error {
	h, err := room.holder(ctx, c, 0, count)
	if err != nil {
		return err
	}
	defer h.close()
	if _, err := h.hear(); err != nil {
		return err
	}
	if err := sleep(ctx, again); err != nil {
		return err
	}
	h.close()
	ours := r.Idle[0]
	return await(ctx, func() (bool, error) {
		ours.Again, err = room.held(ctx, c)
		return ours.Again.FDs <= ours.Before.FDs && ours.Again.RSS <= ours.After.RSS+back, err
	})
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

// givenBack waits until little of the daemon's memory is free or garbage.
func (r *room) givenBack(ctx context.Context) error {
	return await(ctx, func() (bool, error) {
		m, err := r.daemon.Metrics(ctx, metricsAddress)
		if err != nil {
			return false, err
		}
		var v [4]float64
		for i, what := range []string{"heap_idle", "heap_released", "heap_alloc", "next_gc"} {
			if v[i], err = m.Value("go_memstats_" + what + "_bytes"); err != nil {
				return false, err
			}
		}
		return v[0]-v[1]+v[2]-v[3]/2 < 4<<20, nil
	})
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
