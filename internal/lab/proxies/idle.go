//go:build linux

package main

import (
	"context"
	"fmt"
	"time"

	"perimeterd/internal/lab"
	"perimeterd/internal/lab/bench"
)

const (
	settled = time.Minute      // after which silent tunnels cost what they cost
	again   = time.Minute      // for which as many are held once more
	pause   = 75 * time.Second // from when the daemon has given memory back to the first: it does so every two minutes at most
	returns = 5 * time.Minute  // for memory to go back
)

// held is what a proxy holds at a moment.
type held struct {
	RSS     int `json:"resident"` // bytes
	FDs     int `json:"descriptors"`
	Threads int `json:"threads"`
	Heap    int `json:"heap_and_stacks,omitempty"` // of Go: bytes that the last collection left, and of stacks; perimeterd only
	Free    int `json:"free,omitempty"`            // of Go: bytes that are free, or garbage since then; perimeterd only
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

// gone says whether all is closed, and what that leaves is given back.
func (s *silence) gone(at held) bool { return at.FDs <= s.Before.FDs && at.Free <= little }

// each is what a tunnel took.
func (s *silence) each(what func(held) int, at held) float64 {
	return float64(what(at)-what(s.Before)) / float64(max(s.Tunnels, 1))
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
	ours := r.Idle[0]
	// What is free before would be room for the tunnels, and not be counted.
	if err := await(ctx, func() (bool, error) {
		err := each(func(s *silence) *held { return &s.Before })
		return ours.Before.Free <= little, err
	}); err != nil {
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
	if err := await(ctx, func() (bool, error) {
		err := each(func(s *silence) *held { return &s.After })
		return ours.gone(ours.After) || !o.long() && ours.After.FDs <= ours.Before.FDs, err
	}); err != nil {
		return err
	}
	if c := room.all[0]; c.name == "perimeterd" && o.long() {
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
		for _, at := range []held{s.Settled, s.End} {
			r.promise(o.hold < settled || s.each(rss, at) <= goalIdle*1024 && s.each(fds, at) < goalFDs+0.01, "%.1f KB and %.2f descriptors a silent tunnel", s.each(rss, at)/1024, s.each(fds, at))
		}
		if !o.long() { // what goes back, and when, is for who has the time
			return nil
		}
		r.promise(s.After.Heap <= s.Before.Heap+s.Tunnels*keeps+margin/2, "%d bytes of heap and stacks after all tunnels were closed, %d before", s.After.Heap, s.Before.Heap)
		r.promise(s.After.RSS <= s.Before.RSS+2*s.Tunnels*keeps+margin, "%d bytes resident after all tunnels were closed, %d before", s.After.RSS, s.Before.RSS)
		r.promise(s.Again.Heap <= s.After.Heap+margin/2, "%d bytes of heap and stacks after all tunnels were closed, %d the time before", s.Again.Heap, s.After.Heap)
		r.promise(s.Again.RSS <= s.After.RSS+margin/2, "%d bytes resident after all tunnels were closed, %d the time before", s.Again.RSS, s.After.RSS)
	}
	return nil
}

// await tries every now and then, for as long as memory may take to go back. Each time costs the daemon garbage.
func await(ctx context.Context, done func() (bool, error)) error {
	for deadline := time.Now().Add(returns); ; {
		if ok, err := done(); ok || err != nil || time.Now().After(deadline) {
			return err
		}
		if err := sleep(ctx, 5*time.Second); err != nil {
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
		return ours.gone(ours.Again), err
	})
}

const (
	little = 4 << 20 // bytes that nobody has any use for, and that are not worth giving back
	// keeps is what Go keeps of a direction of a tunnel for the next: the structures of a goroutine (runtime.g, 480 bytes) and of a descriptor
	// (runtime.pollDesc, 512, and its finalizer's, 56), of as many as there ever were at once. Half of it is heap.
	keeps  = 480 + 512 + 56
	margin = 8 << 20 // the audit's last records, and what is not filled of Go's pages
)

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
	var v [5]int
	for i, what := range []string{"next_gc", "stack_inuse", "heap_alloc", "heap_idle", "heap_released"} {
		f, err := m.Value("go_memstats_" + what + "_bytes")
		if err != nil {
			return h, err
		}
		v[i] = int(f)
	}
	live := (v[0] - v[1]) / 2 // Go's goal is twice that, and the stacks
	h.Heap, h.Free = live+v[1], v[2]-live+v[3]-v[4]
	return h, nil
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
