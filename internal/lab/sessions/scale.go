//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"syscall"
	"time"

	"perimeterd/internal/lab/bench"
	"perimeterd/internal/lab/bulk"
	"perimeterd/internal/lab/swarm"
)

// boundKB is what a session may take of the heap's bound, in which little is left for garbage, and boundLeast, MB, what all is beside them.
const (
	boundKB    = 64
	boundLeast = 32
)

// scales holds more and more sessions.
func scales(ctx context.Context, out *report, many []string) error {
	for _, text := range many {
		n, err := strconv.Atoi(text)
		if err != nil || n < 10 {
			return fmt.Errorf("-many %q: want numbers of sessions, 10 at least", text)
		}
		if err := scale(ctx, out, n); err != nil {
			return fmt.Errorf("%d sessions: %w", n, err)
		}
	}
	return nil
}

// rest is how long it is watched what sessions cost that do nothing.
const rest = 3 * time.Second

// scale holds many sessions at once.
func scale(ctx context.Context, out *report, many int) error {
	r, err := newRoom(ctx, many)
	if err != nil {
		return err
	}
	defer r.close()
	out.title("%d sessions", many)
	busy, err := r.daemon.Usage()
	if err != nil {
		return err
	}
	out.row("from nothing to all inside, 16 at a time", "%v, %.0f a second; daemon's CPU %.2f ms each", bench.Rounded(r.joined),
		float64(many)/r.joined.Seconds(), (busy.CPU-r.idle.CPU).Seconds()*1000/float64(many))
	out.row("each: knock → keys", "%s", bench.Spread(r.took))
	out.Add(bench.Figure{What: "knock to keys, many joining", Who: "perimeterd", Unit: "s", At: float64(many), Axis: "sessions", Values: bench.Seconds(r.took...)})
	// A first packet through each admits it.
	if err := each(r.swarm.Members, 16, func(_ int, m *swarm.Member) error {
		c, err := m.Dial(ctx, r.source.Proxy)
		if err != nil {
			return err
		}
		return c.Close()
	}); err != nil {
		return err
	}
	if err := r.noted(ctx, many); err != nil {
		return err
	}
	full, err := r.daemon.Usage()
	if err != nil {
		return err
	}
	m, err := r.daemon.Metrics(ctx, metricsAddress)
	if err != nil {
		return err
	}
	value := func(name string) float64 {
		v, e := m.Value(name)
		err = errors.Join(err, e)
		return v
	}
	goroutines, heap, stacks := value("go_goroutines"), value("go_memstats_next_gc_bytes")/2, value("go_memstats_stack_inuse_bytes")
	if err != nil {
		return err
	}
	out.row("daemon's resident memory: without sessions, with all, each", "%.0f MB, %.0f MB, %.1f KB", mega(r.idle.RSS), mega(full.RSS), float64(full.RSS-r.idle.RSS)/1000/float64(many))
	out.Add(bench.Figure{What: "memory a session", Who: "perimeterd", Unit: "B", At: float64(many), Axis: "sessions", Values: []float64{float64(full.RSS-r.idle.RSS) / float64(many)}})
	out.row("of it heap that the last collection left, stacks; goroutines, descriptors", "%.0f MB and %.0f MB; %.0f, %d", heap/1e6, stacks/1e6, goroutines, full.FDs)

	if err := bulk.Wait(ctx, rest); err != nil {
		return err
	}
	later, err := r.daemon.Usage()
	if err != nil {
		return err
	}
	resting := (later.CPU - full.CPU).Seconds() / rest.Seconds()
	out.row(fmt.Sprintf("CPU at rest, %v", rest), "%.1f %% of a core", resting*100)
	out.Add(bench.Figure{What: "CPU at rest", Who: "perimeterd", Unit: "of a core", At: float64(many), Axis: "sessions", Values: []float64{resting}})

	var list []time.Duration
	for range 5 {
		start := time.Now()
		s, err := r.sessions(ctx)
		if err != nil {
			return err
		}
		list = append(list, time.Since(start))
		out.promise(len(s) == many, "%d sessions are listed, of %d", len(s), many)
	}
	out.row("`perimeterd sessions --json`", "%s", bench.Spread(list))

	before, err := r.daemon.Usage()
	if err != nil {
		return err
	}
	start := time.Now()
	shaking, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if err := each(r.swarm.Members, 32, func(_ int, m *swarm.Member) error { return m.Handshake(shaking) }); err != nil {
		return fmt.Errorf("handshakes: %w", err)
	}
	took := time.Since(start)
	after, err := r.daemon.Usage()
	if err != nil {
		return err
	}
	out.row("a handshake of each by UDP, 32 at a time", "%.0f a second; daemon's CPU %.2f ms each", float64(many)/took.Seconds(), (after.CPU-before.CPU).Seconds()*1000/float64(many))
	out.Add(bench.Figure{What: "handshakes a second", Who: "perimeterd", Unit: "1/s", At: float64(many), Axis: "sessions", Values: []float64{float64(many) / took.Seconds()}})

	var last []time.Duration
	for i, m := range r.swarm.Members[:5] {
		d, err := m.Download(ctx, r.source, endless+int64(i), 20_000_000)
		if err != nil {
			return err
		}
		for d.Bytes() < 1<<20 {
			time.Sleep(time.Millisecond)
		}
		command := time.Now()
		seen := make(chan time.Duration, 1)
		go func() { seen <- r.awaitDone(endless+int64(i), command) }()
		if text, err := r.daemon.Perimeterd(ctx, "user", "revoke", m.Name); err != nil {
			return fmt.Errorf("user revoke %s: %w %s", m.Name, err, text)
		}
		cut := <-seen
		time.Sleep(300 * time.Millisecond)
		last = append(last, max(d.Last().Sub(command), cut))
		d.Close()
	}
	out.row("one of them revoked: command begins → its download's end", "%s", bench.Spread(last))
	out.promise(bench.Quantile(last, 1) < goneIn, "a revoked user was there for %v, more than %v", bench.Quantile(last, 1), goneIn)

	if err := r.noted(ctx, many-len(last)); err != nil {
		return err
	}
	if err := r.daemon.Signal(syscall.SIGKILL); err != nil {
		return err
	}
	r.daemon.Wait()
	// The start has a heap that is bounded as by the unit's MemoryMax.
	bound := fmt.Sprintf("%dMiB", boundLeast+many*boundKB>>10)
	if err := os.Setenv("GOMEMLIMIT", bound); err != nil {
		return err
	}
	start = time.Now()
	err = r.daemon.Start(ctx)
	if err := errors.Join(err, os.Unsetenv("GOMEMLIMIT")); err != nil {
		return err
	}
	ready := time.Now()
	back := make([]time.Duration, many-len(last))
	if err := each(r.swarm.Members[len(last):], 64, func(i int, m *swarm.Member) error {
		for m.LastHandshake().Before(start) {
			if time.Since(ready) > time.Minute {
				return errors.New("its keys do not come back")
			}
			time.Sleep(10 * time.Millisecond)
		}
		back[i] = max(m.LastHandshake().Sub(ready), 0)
		return nil
	}); err != nil {
		return err
	}
	out.row("kill -9: start → ready", "%v", bench.Rounded(ready.Sub(start)))
	out.row("ready → the server has shaken hands with each", "%s", bench.Spread(back))
	out.Add(bench.Figure{What: "kill -9: ready to keys again", Who: "perimeterd", Unit: "s", At: float64(many), Axis: "sessions", Values: bench.Seconds(back...)})
	for _, m := range r.swarm.Members[len(last):] {
		if err := m.Echo(ctx); err != nil {
			return fmt.Errorf("%s: nothing comes through its tunnel after a kill: %w", m.Name, err)
		}
	}
	if full, err = r.daemon.Usage(); err != nil {
		return err
	}
	out.row("resident after this start, which had GOMEMLIMIT="+bound, "%.0f MB", mega(full.RSS))
	return nil
}

func mega(bytes int) float64 { return float64(bytes) / 1e6 }
