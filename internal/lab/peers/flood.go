//go:build linux

package main

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"perimeterd/internal/lab"
	"perimeterd/internal/lab/bench"
	"perimeterd/knock"
)

const (
	floodTime    = 8 * time.Second // at most; it ends when the last friend's patience does
	floodPackets = 5_000_000
	friends      = 20 // knocks of each way during a flood
	friendPause  = 250 * time.Millisecond
	friendWait   = 1500 * time.Millisecond
	friendPace   = 5 * time.Millisecond
)

// blind is the same garbage for all: random ports, and datagrams as long as tokens to UDP 1194, where perimeterd's tokens go.
var blind = []lab.Garbage{
	{Proto: unix.IPPROTO_UDP, Length: knock.TokenSize},
	{Proto: unix.IPPROTO_TCP},
	{Proto: unix.IPPROTO_UDP, Port: gatePort, Length: knock.TokenSize},
}

// flooded is what a door did during one flood.
type flooded struct {
	Door     string     `json:"door"`
	Garbage  string     `json:"garbage"` // blind or aimed
	Round    int        `json:"round"`
	Seconds  float64    `json:"seconds"`
	Sent     int        `json:"sent"`
	Received int        `json:"received"` // reached the host's firewall
	Dropped  int        `json:"dropped"`  // and did not come past it
	Daemon   bool       `json:"daemon"`   // whether it has one
	CPU      float64    `json:"daemon_cpu_seconds"`
	Friends  []friendly `json:"friends"`
}

// friendly is what became of legitimate knocks of one way.
type friendly struct {
	Door   string    `json:"way"`
	Knocks int       `json:"knocks"`
	Opened int       `json:"opened"`
	Times  []float64 `json:"microseconds"`
}

// idle is what the daemons take when nothing happens.
func idle(ctx context.Context, doors []*door) (cpu map[string]float64, err error) {
	const long = 10 * time.Second
	cpu = map[string]float64{}
	for _, sign := range []float64{-1, 1} {
		for _, d := range doors {
			if d.pid == 0 {
				continue
			}
			u, err := lab.UsageOf(d.pid)
			if err != nil {
				return nil, err
			}
			cpu[d.name] += sign * u.CPU.Seconds() / long.Seconds()
		}
		if sign > 0 {
			break
		}
		select {
		case <-time.After(long):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	return cpu, nil
}

// measureFloods floods the doors in turn, A B C D A B C D for each kind of garbage.
func measureFloods(ctx context.Context, doors []*door, attacker *lab.Namespace, k *lab.Knocker, source func() netip.Addr, rounds int) (all []flooded, err error) {
	for _, garbage := range []string{"blind", "aimed"} {
		for round := range rounds {
			for _, d := range doors {
				kinds := blind
				if garbage == "aimed" {
					kinds = d.aimed
				}
				f, err := floodOne(ctx, d, attacker, kinds, k, source)
				if err != nil {
					return nil, fmt.Errorf("%s under %s garbage: %w", d.name, garbage, err)
				}
				f.Door, f.Garbage, f.Round = d.name, garbage, round+1
				all = append(all, f)
				fmt.Printf("  %-11s %s %d: %s\n", d.name, garbage, round+1, f)
				time.Sleep(time.Second) // the queues empty, and what was opened closes
			}
		}
	}
	return all, nil
}

func floodOne(ctx context.Context, d *door, attacker *lab.Namespace, kinds []lab.Garbage, k *lab.Knocker, source func() netip.Addr) (f flooded, err error) {
	// Made before the flood: making them shall not compete with it.
	type friend struct {
		source netip.Addr
		knock  lab.Knock
	}
	waiting := make([][]friend, len(d.ways))
	for i, w := range d.ways {
		f.Friends = append(f.Friends, friendly{Door: w.name})
		for range friends {
			s := source()
			knock, err := w.make(ctx, s)
			if err != nil {
				return f, err
			}
			waiting[i] = append(waiting[i], friend{s, knock})
		}
	}
	cpu := func() (time.Duration, error) {
		if d.pid == 0 {
			return 0, nil
		}
		u, err := lab.UsageOf(d.pid)
		return u.CPU, err
	}
	before, err := d.host.Traffic()
	if err != nil {
		return f, err
	}
	cpuBefore, err := cpu()
	if err != nil {
		return f, err
	}
	flood := &lab.Flood{To: d.host.Addr, Kinds: kinds, Max: floodPackets, For: floodTime}
	flooding, stop := context.WithCancel(ctx)
	defer stop()
	ended := make(chan error, 1)
	go func() { ended <- flood.Run(flooding, attacker) }()

	var mu sync.Mutex
	var knocking sync.WaitGroup
	var failed error
	time.Sleep(500 * time.Millisecond)
	for n := range friends {
		for i := range d.ways {
			knocking.Go(func() {
				o, err := k.Open(ctx, waiting[i][n].source, d.behind(), waiting[i][n].knock, friendPace, friendWait)
				mu.Lock()
				defer mu.Unlock()
				if err != nil {
					failed = err
					return
				}
				r := &f.Friends[i]
				r.Knocks++
				if o.Opened {
					r.Opened++
					r.Times = append(r.Times, float64(o.After.Nanoseconds())/1000)
				}
			})
		}
		time.Sleep(friendPause)
	}
	knocking.Wait()
	stop()
	if err := <-ended; err != nil {
		return f, err
	}
	if failed != nil {
		return f, failed
	}
	cpuAfter, err := cpu()
	if err != nil {
		return f, err
	}
	after, err := d.host.Traffic()
	if err != nil {
		return f, err
	}
	sent, took := flood.Sent()
	f.Seconds, f.Sent = took.Seconds(), sent
	f.Received = after.Received - before.Received
	f.Dropped = f.Received - (after.Delivered - before.Delivered)
	f.Daemon, f.CPU = d.pid != 0, (cpuAfter - cpuBefore).Seconds()
	return f, nil
}

func (f flooded) String() string {
	s := fmt.Sprintf("%.0f packets/s sent, %.0f dropped by the firewall; ", float64(f.Sent)/f.Seconds, float64(f.Dropped)/f.Seconds)
	if f.Daemon {
		s += fmt.Sprintf("daemon %.2f CPU-s in %.1f s", f.CPU, f.Seconds)
	} else {
		s += "no daemon"
	}
	for _, r := range f.Friends {
		s += fmt.Sprintf("; %s opened %d of %d, median %v", r.Door, r.Opened, r.Knocks, bench.Rounded(quantile(r.Times, 0.5)))
	}
	return s
}
