//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"perimeterd/internal/console"
	"perimeterd/internal/lab/bench"
)

// counted is what each of those who count has of one tunnel.
type counted struct {
	Bytes          int64   `json:"bytes"` // each way, at once
	ClientDown     int64   `json:"client_got"`
	OriginUp       int64   `json:"origin_got"`
	LogDown, LogUp int64   // of the tunnel's line
	MetricsDown    int64   // of the user
	MetricsUp      int64   //
	Seconds        float64 `json:"seconds"`
}

// exact moves much both ways at once, and compares what is counted with what came. The ClientHello and its answer count too.
func (r *results) exact(ctx context.Context, room *room, o options) error {
	if room.all[0].name != "perimeterd" {
		return errors.New("only perimeterd is asked for its counts")
	}
	x := &counted{Bytes: o.exact}
	for { // tunnels of before may still be ending, and count
		m, err := room.daemon.Metrics(ctx, metricsAddress)
		if err != nil {
			return err
		}
		live, err := m.Value(console.ProxyConnections)
		if err != nil {
			return err
		}
		if live == 0 {
			break
		}
		if err := sleep(ctx, 50*time.Millisecond); err != nil {
			return err
		}
	}
	downBefore, upBefore, err := room.metered(ctx)
	if err != nil {
		return err
	}
	lines := len(room.daemon.Entries("proxy"))
	start := time.Now()
	if err := room.threads(room.all[0], cloudName, 1, func(_ int, k *caller) error {
		client, server, err := k.open()
		if err != nil {
			return err
		}
		defer unix.Close(client)
		defer unix.Close(server)
		sent := make(chan error, 2)
		for _, fd := range []int{client, server} {
			go func() {
				err := fill(fd, o.exact)
				unix.Shutdown(fd, unix.SHUT_WR)
				sent <- err
			}()
		}
		up := make(chan error, 1)
		go func() {
			n, err := drain(server, 1<<62)
			x.OriginUp = n + int64(len(k.hello))
			up <- err
		}()
		n, err := drain(client, 1<<62)
		x.ClientDown = n + replySize
		return errors.Join(err, <-up, <-sent, <-sent)
	}); err != nil {
		return err
	}
	x.Seconds = time.Since(start).Seconds()
	for x.LogDown < x.Bytes { // lines are written a moment later than counted
		entries, err := room.daemon.Await(ctx, "proxy", lines+1)
		if err != nil {
			return err
		}
		number := func(key string) int64 { n, _ := entries[lines][key].(float64); return int64(n) }
		x.LogDown, x.LogUp = number("down"), number("up")
		lines++
	}
	down, up, err := room.metered(ctx)
	if err != nil {
		return err
	}
	x.MetricsDown, x.MetricsUp = down-downBefore, up-upBefore
	fmt.Printf("down: client %d, log %d, metrics %d; up: origin %d, log %d, metrics %d; %.1f s\n",
		x.ClientDown, x.LogDown, x.MetricsDown, x.OriginUp, x.LogUp, x.MetricsUp, x.Seconds)
	r.Exact = x
	r.Add(bench.Figure{What: "counted otherwise than moved", Who: "perimeterd", Unit: "B", At: float64(x.Bytes), Axis: "bytes each way", Values: []float64{
		float64(x.LogDown - x.ClientDown), float64(x.MetricsDown - x.ClientDown), float64(x.LogUp - x.OriginUp), float64(x.MetricsUp - x.OriginUp)}})
	r.promise(x.ClientDown == x.Bytes+replySize && x.LogDown == x.ClientDown && x.MetricsDown == x.ClientDown, "bytes down are not counted exactly: %+v", *x)
	r.promise(x.OriginUp > x.Bytes && x.LogUp == x.OriginUp && x.MetricsUp == x.OriginUp, "bytes up are not counted exactly: %+v", *x)
	return nil
}

func fill(fd int, count int64) error {
	b := make([]byte, piece)
	for left := count; left > 0; left -= min(left, piece) {
		if err := writeAll(fd, b[:min(left, piece)]); err != nil {
			return err
		}
	}
	return nil
}

// metered is what the daemon's metrics have of the member's bytes.
func (r *room) metered(ctx context.Context) (down, up int64, err error) {
	m, err := r.daemon.Metrics(ctx, metricsAddress)
	if err != nil {
		return 0, 0, err
	}
	value := func(direction string) int64 {
		v, err := m.Value(console.UserBytes, "user", r.member.Name, "direction", direction)
		if err != nil {
			return 0 // nothing yet
		}
		return int64(v) // exact to 2^53
	}
	return value("down"), value("up"), nil
}
