//go:build linux

// Command sessions measures the life of sessions on the server, in network namespaces, with the built binaries and many clients
// in one process: how many it holds and what each costs, how soon a revoked one is gone, and what a killed or frozen daemon
// does to those who are inside. `make bench-sessions` runs it as root; it takes about three minutes and leaves nothing but its
// section of docs/benchmarks.md. Exit status 1 if a promise is not kept.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math"
	"net/netip"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"perimeterd/internal/lab"
	"perimeterd/internal/lab/bench"
	"perimeterd/internal/lab/swarm"
)

// limit is the longest that it may take.
const limit = 10 * time.Minute

// Promises.
const (
	goneIn  = time.Second     // from the command to the last byte of who is revoked
	flowsIn = 2 * time.Second // from ready to data in every tunnel, after a kill
)

func main() {
	many := flag.String("many", "100,1000,5000,10000", "sessions held at once: `NUMBERS`, apart by commas")
	others := flag.Int("others", 500, "sessions that move data while some are revoked")
	victims := flag.Int("victims", 20, "revocations")
	inside := flag.Int("inside", 200, "sessions inside when the daemon is killed and frozen")
	only := flag.String("only", "revoke,crash,scale", "`PARTS` to measure; only all of them are written")
	results := flag.String("results", "bench/sessions.json", "`FILE` for the raw numbers")
	doc := flag.String("doc", "docs/benchmarks.md", "`FILE` whose section \"Sessions\" is written")
	flag.Parse()
	debug.SetMemoryLimit(math.MaxInt64) // GOMEMLIMIT is for the daemon
	bench.Main("bench-sessions", limit, func(ctx context.Context) error {
		return measure(ctx, strings.Split(*only, ","), strings.Split(*many, ","), *others, *victims, *inside, *results, *doc)
	})
}

func measure(ctx context.Context, parts, many []string, others, victims, inside int, results, doc string) error {
	run, err := bench.Begin(ctx, "make bench-sessions")
	if err != nil {
		return err
	}
	r := &report{Run: run}
	for _, part := range []struct {
		name string
		run  func() error
	}{
		{"revoke", func() error { return revocations(ctx, r, others, victims) }},
		{"crash", func() error { return crashes(ctx, r, inside) }},
		{"scale", func() error { return scales(ctx, r, many) }},
	} {
		if !slices.Contains(parts, part.name) {
			continue
		}
		if err := part.run(); err != nil {
			return fmt.Errorf("%s: %w", part.name, err)
		}
	}
	r.End()
	fmt.Print(r.section())
	if len(parts) == 3 {
		if err := errors.Join(bench.Write(results, r.Run), bench.WriteSection(doc, r.section())); err != nil {
			return err
		}
	}
	return errors.Join(r.broken...)
}

const (
	metricsAddress = "127.0.0.1:9617"
	cloudName      = "s3.us-east-1.amazonaws.com"
)

// room is a lab with a daemon, a cloud host and so many clients.
type room struct {
	*lab.Lab
	daemon *lab.Daemon
	cloud  *lab.CloudHost
	swarm  *swarm.Swarm
	source swarm.Source
	idle   lab.Usage     // of the daemon, without a session
	joined time.Duration // how long all took to be inside
	took   []time.Duration
}

func newRoom(ctx context.Context, n int) (_ *room, err error) {
	r := &room{}
	if r.Lab, err = lab.New(ctx, lab.Options{}); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.close())
		}
	}()
	if r.cloud, err = r.StartCloud(lab.CloudOptions{Names: []string{cloudName}}); err != nil {
		return nil, err
	}
	r.source = swarm.Source{Proxy: netip.MustParseAddrPort("10.77.0.1:3128"), Host: cloudName, CAs: r.cloud.CAs}
	if r.daemon, err = r.NewDaemon(ctx, lab.Setting{Key: "metrics", Value: fmt.Sprintf("%q", metricsAddress)},
		lab.Setting{Key: "limit", Value: fmt.Sprint(max(n, 5000))}); err != nil {
		return nil, err
	}
	if r.swarm, err = swarm.New(ctx, r.Lab, r.daemon, slices.Repeat([]time.Duration{24 * time.Hour}, n)...); err != nil {
		return nil, err
	}
	if err := r.daemon.Start(ctx); err != nil {
		return nil, err
	}
	if r.idle, err = r.daemon.Usage(); err != nil {
		return nil, err
	}
	start := time.Now()
	if r.took, err = r.swarm.Join(ctx, r.swarm.Members, 16); err != nil {
		return nil, fmt.Errorf("%w\n%s", err, r.daemon.Log())
	}
	r.joined = time.Since(start)
	return r, nil
}

func (r *room) close() error {
	if r.swarm != nil {
		r.swarm.Close()
	}
	return r.Lab.Close()
}

// each runs fn for every member, some at a time.
func each(members []*swarm.Member, atOnce int, fn func(int, *swarm.Member) error) error {
	errs := make([]error, len(members))
	slots := make(chan struct{}, atOnce)
	var all sync.WaitGroup
	for i, m := range members {
		slots <- struct{}{}
		all.Go(func() {
			if err := fn(i, m); err != nil {
				errs[i] = fmt.Errorf("%s: %w", m.Name, err)
			}
			<-slots
		})
	}
	all.Wait()
	return errors.Join(errs...)
}
