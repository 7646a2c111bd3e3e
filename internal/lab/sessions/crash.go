//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"syscall"
	"time"

	"perimeterd/internal/lab/bench"
	"perimeterd/internal/lab/swarm"
)

// frozen is how long the daemon stands still.
const frozen = 3 * time.Second

// crashes kills and freezes the daemon with clients inside and strangers outside.
func crashes(ctx context.Context, out *report, inside int) error {
	r, err := newRoom(ctx, inside)
	if err != nil {
		return err
	}
	defer r.close()
	out.title("kill -9 and start, %d sessions with a download each", inside)
	downloads, err := r.downloads(ctx)
	if err != nil {
		return err
	}
	ids, err := r.ids(ctx)
	if err != nil {
		return err
	}
	if err := r.noted(ctx, inside); err != nil {
		return err
	}
	strangers := r.Prober(r.Client, r.Bastion.Addr, 1194, r.Stranger)
	strangers.Workers = 2
	probing, stop := context.WithCancel(ctx)
	defer stop()
	probed := make(chan error, 1)
	go func() { probed <- strangers.Run(probing) }()

	if err := r.daemon.Signal(syscall.SIGKILL); err != nil {
		return err
	}
	r.daemon.Wait()
	start := time.Now()
	if err := r.daemon.Start(ctx); err != nil {
		return err
	}
	ready := time.Now()
	out.row("start → ready", "%v", bench.Rounded(ready.Sub(start)))
	echoes := make([]time.Duration, inside)
	if err := each(r.swarm.Members, inside, func(i int, m *swarm.Member) error {
		err := m.Echo(ctx)
		echoes[i] = time.Since(ready)
		return err
	}); err != nil {
		return err
	}
	// Everybody asks anew; and who had a download hears of its end.
	reset := 0
	heard, flows := make([]time.Duration, inside), make([]time.Duration, inside)
	fresh := make([]*swarm.Download, inside)
	if err := each(r.swarm.Members, inside, func(i int, m *swarm.Member) (err error) {
		if fresh[i], err = m.Download(ctx, r.source, endless, 20_000); err != nil {
			return err
		}
		for fresh[i].Bytes() == 0 {
			time.Sleep(time.Millisecond)
		}
		flows[i] = fresh[i].Last().Sub(ready)
		return nil
	}); err != nil {
		return err
	}
	for i, d := range downloads {
		select {
		case <-d.Done:
		case <-time.After(30 * time.Second):
			return fmt.Errorf("%s: the download of before hangs", r.swarm.Members[i].Name)
		}
		heard[i] = d.Ended().Sub(ready)
		if errors.Is(d.Err(), syscall.ECONNRESET) {
			reset++
		}
	}
	downloads = fresh
	same, err := r.same(ctx, ids)
	if err != nil {
		return err
	}
	out.row("sessions that are the same after it", "%d of %d", same, inside)
	out.row("downloads that ended with a reset", "%d of %d, the last heard of it %v after ready", reset, inside, bench.Rounded(bench.Quantile(heard, 1)))
	out.row("ready → an echo through the tunnel", "%s", bench.Spread(echoes))
	out.row("ready → data of a new download, asked for after the echoes", "%s", bench.Spread(flows))
	out.promise(same == inside, "%d of %d sessions survived a kill", same, inside)
	out.promise(reset == inside, "%d proxied connections ended without a reset at a kill", inside-reset)
	out.promise(bench.Quantile(echoes, 1) < flowsIn, "data flows %v after a kill, later than %v", bench.Quantile(echoes, 1), flowsIn)

	out.title("SIGSTOP, %v, SIGCONT, %d sessions with a download each", frozen, inside)
	if err := r.daemon.Signal(syscall.SIGSTOP); err != nil {
		return err
	}
	time.Sleep(frozen)
	before := make([]int64, inside)
	for i, d := range downloads {
		before[i] = d.Bytes()
	}
	if err := r.daemon.Signal(syscall.SIGCONT); err != nil {
		return err
	}
	woken := time.Now()
	if err := each(r.swarm.Members, inside, func(i int, m *swarm.Member) error {
		for downloads[i].Bytes() == before[i] {
			select {
			case <-downloads[i].Done:
				return fmt.Errorf("its download broke: %w", downloads[i].Err())
			case <-time.After(time.Millisecond):
			}
			if time.Since(woken) > 30*time.Second {
				return errors.New("its download hangs")
			}
		}
		flows[i] = time.Since(woken)
		return nil
	}); err != nil {
		return err
	}
	same, err = r.same(ctx, ids)
	if err != nil {
		return err
	}
	out.row("sessions and downloads that went on", "%d of %d", same, inside)
	out.row("woken → data of the same download", "%s", bench.Spread(flows))
	out.promise(same == inside, "%d of %d sessions survived a freeze", same, inside)
	stop()
	if err := <-probed; err != nil {
		return err
	}
	t := strangers.Tally()
	out.row("strangers meanwhile: attempts, accepted, refused", "%d, %d, %d", t.Total(), t.Accepted, t.Refused)
	out.promise(t.Accepted == 0 && t.Refused == 0 && t.Silent > 0, "strangers were answered: %+v", t)
	for _, d := range downloads {
		d.Close()
	}
	return nil
}

// downloads has every member fetch a file, slowly.
func (r *room) downloads(ctx context.Context) ([]*swarm.Download, error) {
	downloads := make([]*swarm.Download, len(r.swarm.Members))
	return downloads, each(r.swarm.Members, 8, func(i int, m *swarm.Member) (err error) {
		downloads[i], err = m.Download(ctx, r.source, endless, 20_000)
		return err
	})
}

// listed is what of a session's listing matters here.
type listed struct {
	ID       string `json:"id"`
	Address  string `json:"address"`
	Endpoint string `json:"endpoint"`
}

func (r *room) sessions(ctx context.Context) (list []listed, err error) {
	text, err := r.daemon.Perimeterd(ctx, "sessions", "--json")
	if err != nil {
		return nil, fmt.Errorf("sessions: %w %s", err, text)
	}
	return list, json.Unmarshal([]byte(text), &list)
}

// ids maps live sessions to their addresses.
func (r *room) ids(ctx context.Context) (map[string]string, error) {
	list, err := r.sessions(ctx)
	ids := map[string]string{}
	for _, s := range list {
		ids[s.ID] = s.Address
	}
	return ids, err
}

func (r *room) same(ctx context.Context, ids map[string]string) (n int, err error) {
	now, err := r.ids(ctx)
	for id, address := range ids {
		if now[id] == address {
			n++
		}
	}
	return n, err
}

// noted waits until the endpoints of so many sessions are written down, which takes a second.
func (r *room) noted(ctx context.Context, n int) error {
	for {
		list, err := r.sessions(ctx)
		if err != nil {
			return err
		}
		have := 0
		for _, s := range list {
			if s.Endpoint != "" {
				have++
			}
		}
		if have >= n {
			return nil
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
