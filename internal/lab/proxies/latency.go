//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"perimeterd/internal/lab/bench"
)

const (
	pace    = 500 * time.Microsecond // between two exchanges, however many tunnels take turns
	message = 100                    // bytes of an exchange, each way
)

// busyTunnels is how many take turns.
var busyTunnels = []int{1, 100, 1000}

// latency is how long exchanges through busy tunnels took in each turn.
type latency struct {
	Proxy     string  `json:"proxy"`
	Tunnels   int     `json:"tunnels"`
	Exchanges int     `json:"exchanges"`
	Skipped   int     `json:"skipped"` // exchanges that were not begun in time
	Half      []int64 `json:"median_ns"`
	Most      []int64 `json:"within_99_percent_ns"`
}

// latencies measures all proxies and the way without one, in turn.
func (r *results) latencies(ctx context.Context, room *room, o options) error {
	all := slices.Concat([]*contender{room.direct}, room.all, room.floor)
	for _, n := range busyTunnels {
		found := map[string]*latency{}
		for _, c := range all {
			l := &latency{Proxy: c.name, Tunnels: n}
			found[c.name] = l
			r.Latency = append(r.Latency, l)
		}
		if err := each(ctx, all, o.rounds, func(_ int, c *contender) error {
			return room.threads(c, cloudName, 1, func(_ int, k *caller) error {
				l := found[c.name]
				times, skipped, err := k.busy(n, o.busy)
				l.Exchanges, l.Skipped = l.Exchanges+len(times), l.Skipped+skipped
				l.Half, l.Most = append(l.Half, bench.Quantile(times, 0.5).Nanoseconds()), append(l.Most, bench.Quantile(times, 0.99).Nanoseconds())
				return err
			})
		}); err != nil {
			return err
		}
		for _, c := range all {
			half, most := r.added(c.name, n)
			what := "added latency"
			if c.name == room.direct.name {
				what = "latency without a proxy"
			}
			r.Add(bench.Figure{What: what + ", median", Who: c.name, Unit: "s", At: float64(n), Axis: "busy tunnels", Values: bench.Seconds(half...)})
			r.Add(bench.Figure{What: what + ", 99 %", Who: c.name, Unit: "s", At: float64(n), Axis: "busy tunnels", Values: bench.Seconds(most...)})
			fmt.Printf("%-24s %5d tunnels: %s, median %v, 99 %% within %v of %d, %d skipped\n", c.name, n, what,
				bench.Quantile(half, 0.5), bench.Quantile(most, 0.5), found[c.name].Exchanges, found[c.name].Skipped)
		}
	}
	return nil
}

// added is the median and what 99 % are within for each turn, less those of the turn without a proxy of the same round, whose own are as they are.
func (r *results) added(name string, n int) (half, most []time.Duration) {
	find := func(name string) *latency {
		return r.Latency[slices.IndexFunc(r.Latency, func(l *latency) bool { return l.Proxy == name && l.Tunnels == n })]
	}
	l, base := find(name), find("direct")
	for i := range l.Half {
		if l == base {
			half, most = append(half, time.Duration(l.Half[i])), append(most, time.Duration(l.Most[i]))
			continue
		}
		half, most = append(half, time.Duration(l.Half[i]-base.Half[i])), append(most, time.Duration(l.Most[i]-base.Most[i]))
	}
	return half, most
}

// busy opens n tunnels, and exchanges a message on the next one at every pace.
func (k *caller) busy(n int, long time.Duration) (times []time.Duration, skipped int, err error) {
	clients, servers := make([]int, 0, n), make([]int, 0, n)
	defer func() {
		for i := range clients {
			unix.Close(servers[i])
			unix.Close(clients[i])
		}
	}()
	for range n {
		client, server, err := k.open()
		if err != nil {
			return nil, 0, err
		}
		clients, servers = append(clients, client), append(servers, server)
	}
	stop, cancel := context.WithCancel(context.Background())
	echoes := make(chan error, 1)
	go func() { echoes <- echo(stop, servers) }()
	defer func() { err = errors.Join(err, <-echoes) }()
	defer cancel()
	p, err := newPoll(clients)
	if err != nil {
		return nil, 0, err
	}
	defer p.close()
	clock, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_CLOEXEC)
	if err != nil {
		return nil, 0, err
	}
	defer unix.Close(clock)
	every := unix.NsecToTimespec(pace.Nanoseconds())
	if err := unix.TimerfdSettime(clock, 0, &unix.ItimerSpec{Interval: every, Value: every}, nil); err != nil {
		return nil, 0, err
	}
	if err := p.add(clock, int32(n)); err != nil {
		return nil, 0, err
	}
	var b [message]byte
	sent := make([]time.Time, n) // zero: none under way
	next := 0
	for end := time.Now().Add(long); time.Now().Before(end); {
		ready, err := p.wait()
		if err != nil {
			return nil, 0, err
		}
		for _, e := range ready {
			i := int(e.Fd)
			if i < n {
				if err := readAll(clients[i], b[:]); err != nil {
					return nil, 0, err
				}
				times = append(times, time.Since(sent[i]))
				sent[i] = time.Time{}
				continue
			}
			if _, err := unix.Read(clock, b[:8]); err != nil {
				return nil, 0, err
			}
			if next = (next + 1) % n; !sent[next].IsZero() {
				skipped++
				continue
			}
			sent[next] = time.Now()
			if err := writeAll(clients[next], b[:]); err != nil {
				return nil, 0, err
			}
		}
	}
	return times, skipped, nil
}

// echo gives every message back until ctx ends.
func echo(ctx context.Context, fds []int) error {
	p, err := newPoll(fds)
	if err != nil {
		return err
	}
	defer p.close()
	var b [message]byte
	for ctx.Err() == nil {
		ready, err := p.wait()
		if err != nil {
			return err
		}
		for _, e := range ready {
			if err := readAll(fds[e.Fd], b[:]); err != nil {
				return err
			}
			if err := writeAll(fds[e.Fd], b[:]); err != nil {
				return err
			}
		}
	}
	return nil
}

// poll waits for any of many sockets, by their place in a list.
type poll struct {
	fd     int
	events [64]unix.EpollEvent
}

func newPoll(fds []int) (p *poll, err error) {
	p = &poll{}
	if p.fd, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return nil, err
	}
	for i, fd := range fds {
		if err := p.add(fd, int32(i)); err != nil {
			p.close()
			return nil, err
		}
	}
	return p, nil
}

func (p *poll) add(fd int, as int32) error {
	return unix.EpollCtl(p.fd, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: as})
}

// wait returns those that are ready, none after a while.
func (p *poll) wait() ([]unix.EpollEvent, error) {
	n, err := unix.EpollWait(p.fd, p.events[:], 100)
	if err == unix.EINTR {
		n, err = 0, nil
	}
	return p.events[:max(n, 0)], err
}

func (p *poll) close() { unix.Close(p.fd) }
