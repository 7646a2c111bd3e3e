//go:build linux

package main

import (
	"context"
	"fmt"
	"time"

	"perimeterd/internal/lab/bench"
	"perimeterd/internal/lab/swarm"
)

// A download that does not end by itself.
const endless = int64(1e12)

// revocations measures from the operator's command to the last byte of the revoked user's download, among others who move
// data, and how long these stall.
func revocations(ctx context.Context, out *report, others, victims int) error {
	r, err := newRoom(ctx, others+victims)
	if err != nil {
		return err
	}
	defer r.close()
	downloads := make([]*swarm.Download, others)
	if err := each(r.swarm.Members[:others], 8, func(i int, m *swarm.Member) (err error) {
		downloads[i], err = m.Download(ctx, r.source, endless, 20_000)
		return err
	}); err != nil {
		return err
	}
	sum := func() (n int64) {
		for _, d := range downloads {
			n += d.Bytes()
		}
		return n
	}
	var last, cut, commands []time.Duration
	var stall time.Duration
	start, before := time.Now(), sum()
	for i, m := range r.swarm.Members[others:] {
		size := endless + int64(i) + 1
		d, err := m.Download(ctx, r.source, size, 20_000_000)
		if err != nil {
			return fmt.Errorf("%s: %w", m.Name, err)
		}
		defer d.Close()
		for d.Bytes() < 1<<20 {
			time.Sleep(time.Millisecond)
		}
		stop := make(chan struct{})
		stalled := make(chan time.Duration)
		go func() { stalled <- longestStall(sum, stop) }()
		command := time.Now()
		seen := make(chan time.Duration, 1)
		go func() { seen <- r.awaitDone(size, command) }()
		if text, err := r.daemon.Perimeterd(ctx, "user", "revoke", m.Name); err != nil {
			return fmt.Errorf("user revoke %s: %w %s", m.Name, err, text)
		}
		commands = append(commands, time.Since(command))
		cut = append(cut, <-seen)
		time.Sleep(300 * time.Millisecond) // what is on its way arrives
		last = append(last, max(d.Last().Sub(command), 0))
		close(stop)
		stall = max(stall, <-stalled)
	}
	rate := float64(sum()-before) / time.Since(start).Seconds()
	ended := 0
	for _, d := range downloads {
		select {
		case <-d.Done:
			ended++
		default:
		}
	}
	out.title("%d revocations, %d others moving %.1f MB/s", victims, others, rate/1e6)
	out.row("command begins → last byte of the download at the client", "%s", bench.Spread(last))
	out.Add(bench.Figure{What: "revoke to last byte", Who: "perimeterd", Unit: "s", At: float64(others), Axis: "others moving data", Values: bench.Seconds(last...)})
	out.row("command begins → the cloud host sees the end", "%s", bench.Spread(cut))
	out.row("the command itself", "%s", bench.Spread(commands))
	out.row("longest time in which none of the others moved a byte", "%v", bench.Rounded(stall))
	out.row("others' downloads that broke", "%d of %d", ended, others)
	out.promise(max(bench.Quantile(last, 1), bench.Quantile(cut, 1)) < goneIn, "a revoked user was there for %v, more than %v", max(bench.Quantile(last, 1), bench.Quantile(cut, 1)), goneIn)
	out.promise(ended == 0, "%d downloads of others broke", ended)
	return nil
}

// awaitDone is how long after a moment the cloud host ended its answer of a size; 20 s if it does not.
func (r *room) awaitDone(size int64, since time.Time) time.Duration {
	for !r.done(size) && time.Since(since) < 20*time.Second {
		time.Sleep(time.Millisecond)
	}
	return time.Since(since)
}

// done tells whether the cloud host has ended its answer of a size.
func (r *room) done(size int64) bool {
	for _, q := range r.cloud.Requests() {
		if q.URI == fmt.Sprintf("/bytes/%d", size) {
			return q.Done
		}
	}
	return false
}

// longestStall is the longest time without growth.
func longestStall(sum func() int64, stop <-chan struct{}) (longest time.Duration) {
	n, since := sum(), time.Now()
	for {
		select {
		case <-stop:
			return longest
		case <-time.After(time.Millisecond):
		}
		longest = max(longest, time.Since(since))
		if now := sum(); now != n {
			n, since = now, time.Now()
		}
	}
}
