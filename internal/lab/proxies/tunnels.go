//go:build linux

package main

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"perimeterd/internal/lab/bench"
)

// callers is how many threads open tunnels at once.
const callers = 4

// turn is one of a proxy's turns.
type turn struct {
	Proxy   string  `json:"proxy"`
	Kind    string  `json:"kind"`
	Round   int     `json:"round"`
	Count   int64   `json:"count"` // tunnels, or bytes
	CPU     float64 `json:"cpu_seconds"`
	Seconds float64 `json:"seconds"`
}

// timed is a turn of which fn does the work.
func timed(c *contender, kind string, round int, count int64, fn func() error) (turn, error) {
	before, err := c.cpu()
	if err != nil {
		return turn{}, err
	}
	start := time.Now()
	if err := fn(); err != nil {
		return turn{}, fmt.Errorf("%s: %w", c.name, err)
	}
	took := time.Since(start)
	after, err := c.cpu()
	t := turn{c.name, kind, round, count, (after - before).Seconds(), took.Seconds()}
	if count < 1e6 {
		fmt.Printf("%-24s %-8s %.1f µs of CPU each, %.0f a second\n", t.Proxy, t.Kind, cpuEach(t), rate(t))
	} else {
		fmt.Printf("%-24s %-8s %.3f s of CPU a GB, %.0f MB/s\n", t.Proxy, t.Kind, perGB(t), megas(t))
	}
	return t, err
}

// tunnels opens and closes many: to the origin's address, and to its name.
func (r *results) tunnels(ctx context.Context, room *room, o options) error {
	all := slices.Concat(room.all, room.floor)
	if ours := all[0]; ours.name == "perimeterd" && len(o.names) == 0 {
		distant := *ours
		distant.name, distant.distant = ours.name+", by its tunnel", true
		all = append(all, &distant)
	}
	for _, to := range []struct{ kind, host string }{{"address", room.Cloud.Addr.String()}, {"name", cloudName}} {
		if err := each(ctx, all, o.rounds, func(round int, c *contender) error {
			if err := passing(room, c, to.host, 10*callers); err != nil { // names, pools, threads
				return err
			}
			count := o.tunnels / callers * callers
			t, err := timed(c, to.kind, round, int64(count), func() error { return passing(room, c, to.host, count) })
			if err != nil {
				return err
			}
			r.Tunnels = append(r.Tunnels, t)
			what := "CONNECT"
			if to.kind == "address" {
				what += " to an address"
			}
			r.Add(bench.Figure{What: what + ", CPU a tunnel", Who: c.name, Unit: "s", Values: []float64{t.CPU / float64(t.Count)}})
			r.Add(bench.Figure{What: what + ", tunnels", Who: c.name, Unit: "1/s", Values: []float64{rate(t)}})
			return nil
		}); err != nil {
			return err
		}
	}
	return nil
}

// passing opens and closes so many tunnels to host.
func passing(room *room, c *contender, host string, count int) error {
	return room.threads(c, host, callers, func(_ int, k *caller) error {
		for range count / callers {
			client, server, err := k.open()
			if err != nil {
				return err
			}
			if err := finish(client, server); err != nil {
				return err
			}
		}
		return nil
	})
}

// bulk moves much down and up one tunnel.
func (r *results) bulk(ctx context.Context, room *room, o options) error {
	return each(ctx, room.all, o.rounds, func(round int, c *contender) error {
		return room.threads(c, cloudName, 1, func(_ int, k *caller) error {
			for _, kind := range []string{"down", "up"} {
				client, server, err := k.open()
				if err != nil {
					return err
				}
				from, to := server, client
				if kind == "up" {
					from, to = client, server
				}
				t, err := timed(c, kind, round, o.bulk, func() error { return move(from, to, o.bulk) })
				unix.Close(client)
				unix.Close(server)
				if err != nil {
					return err
				}
				r.Bulk = append(r.Bulk, t)
				r.Add(bench.Figure{What: "large transfers " + kind + ", CPU", Who: c.name, Unit: "CPU-s/GB", Values: []float64{perGB(t)}})
				r.Add(bench.Figure{What: "large transfers " + kind, Who: c.name, Unit: "B/s", Values: []float64{rate(t)}})
			}
			return nil
		})
	})
}

const piece = 256 << 10

// move writes and reads so many bytes, and returns when the last one came.
func move(from, to int, count int64) error {
	var all sync.WaitGroup
	var written error
	all.Go(func() {
		b := make([]byte, piece)
		for left := count; left > 0 && written == nil; left -= min(left, piece) {
			written = writeAll(from, b[:min(left, piece)])
		}
	})
	n, err := drain(to, count)
	if err == nil && n != count {
		err = fmt.Errorf("an end after %d of %d bytes", n, count)
	}
	if err != nil {
		unix.Shutdown(from, unix.SHUT_RDWR)
	}
	all.Wait()
	if err != nil {
		return err
	}
	return written
}

// drain reads until most bytes came, or the end.
func drain(fd int, most int64) (n int64, err error) {
	b := make([]byte, piece)
	for n < most {
		m, err := unix.Read(fd, b[:min(most-n, piece)])
		if err == unix.EINTR {
			continue
		}
		if err != nil || m == 0 {
			return n, err
		}
		n += int64(m)
	}
	return n, nil
}
