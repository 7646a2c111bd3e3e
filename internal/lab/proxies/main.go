//go:build linux

// Command proxies measures the proxy side by side with what it replaces, in network namespaces: perimeterd's built binary,
// Squid and tinyproxy from Debian's packages, the library goproxy alone, and, for tunnels and latency, the least that a proxy can
// do. `make bench-proxy` runs it as root; it takes about seven minutes, and leaves nothing but its results; `make bench-proxy-idle`
// holds the silent tunnels for ten. Exit status 1 if a promise is not kept.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"perimeterd/internal/lab/bench"
)

// limit is the longest that it may take, besides the time for which silent tunnels are held.
const limit = 20 * time.Minute

// allParts are what is measured, in this order.
const allParts = "manners,tunnels,bulk,latency,exact,idle"

type options struct {
	rounds, tunnels, idle int
	bulk, exact           int64
	busy, hold            time.Duration
	only                  []string
	names                 []string
}

// long is whether only silent tunnels are measured, for as long as the goal says: they have a section and a file of their own.
func (o options) long() bool {
	return slices.Equal(o.only, []string{"idle"}) && o.hold >= 10*time.Minute
}

func (o options) command() string {
	if o.long() {
		return "make bench-proxy-idle"
	}
	return "make bench-proxy"
}

// whole is whether there is all that the documentation has.
func (o options) whole() bool {
	return len(o.names) == 0 && (o.long() || strings.Join(o.only, ",") == allParts)
}

func main() {
	o := options{}
	goproxyAt := flag.String("goproxy", "", "`ADDRESS` to serve goproxy on, and nothing else: for the program's own use")
	floorAt := flag.String("floor", "", "`ADDRESS` to serve the floor on, and nothing else: for the program's own use")
	egress := flag.String("egress", "", "`ADDRESS` that the floor dials from")
	origin := flag.String("origin", "", "`ADDRESS` that the floor dials")
	holds := flag.String("holder", "", "`JSON` of the tunnels to hold: for the program's own use")
	flag.IntVar(&o.rounds, "rounds", 3, "how often each proxy has its turn")
	flag.IntVar(&o.tunnels, "tunnels", 3000, "tunnels opened and closed in a turn")
	flag.Int64Var(&o.bulk, "bulk", 1e9, "bytes moved in a turn, each way")
	flag.DurationVar(&o.busy, "busy", 1500*time.Millisecond, "how long a turn with busy tunnels lasts")
	flag.Int64Var(&o.exact, "exact", 10_000_000_019, "bytes moved at once down and up one tunnel, and compared with what is counted")
	flag.IntVar(&o.idle, "idle", 10000, "silent tunnels at each proxy")
	flag.DurationVar(&o.hold, "hold", time.Minute, "how long they are held")
	only := flag.String("only", allParts, "`PARTS` to measure; written are all of them, or idle held for ten minutes")
	names := flag.String("proxies", "", "`NAMES` of the proxies to measure; empty: all")
	results := flag.String("results", "bench/proxy.json", "`FILE` for the raw numbers")
	doc := flag.String("doc", "docs/benchmarks.md", "`FILE` whose section \"The proxy\" is written")
	flag.Parse()
	switch {
	case *goproxyAt != "":
		fmt.Fprintln(os.Stderr, serveGoproxy(*goproxyAt))
		os.Exit(1)
	case *floorAt != "":
		fmt.Fprintln(os.Stderr, serveFloor(*floorAt, *egress, *origin))
		os.Exit(1)
	case *holds != "":
		if err := hold(*holds, os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	o.only = strings.Split(*only, ",")
	if *names != "" {
		o.names = strings.Split(*names, ",")
	}
	bench.Main("bench-proxy", limit+o.hold, func(ctx context.Context) error {
		return measure(ctx, o, *results, *doc)
	})
}

func measure(ctx context.Context, o options, resultsFile, docFile string) (err error) {
	for _, part := range o.only {
		if !slices.Contains(strings.Split(allParts, ","), part) {
			return fmt.Errorf("-only %q: want some of %s", part, allParts)
		}
	}
	room, err := newRoom(ctx, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, room.close()) }()
	r, err := begin(ctx, room, o)
	if err != nil {
		return err
	}
	fmt.Println(r.Machine())
	for _, part := range []struct {
		name string
		run  func() error
	}{
		{"manners", func() error { return r.manners(room) }},
		{"tunnels", func() error { return r.tunnels(ctx, room, o) }},
		{"bulk", func() error { return r.bulk(ctx, room, o) }},
		{"latency", func() error { return r.latencies(ctx, room, o) }},
		{"exact", func() error { return r.exact(ctx, room, o) }},
		{"idle", func() error { return r.idle(ctx, room, o) }},
	} {
		if !slices.Contains(o.only, part.name) {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		fmt.Printf("\n%s\n", part.name)
		if err := part.run(); err != nil {
			return fmt.Errorf("%s: %w", part.name, err)
		}
	}
	r.End()
	section := r.section()
	fmt.Printf("\n%s", section)
	if o.whole() {
		err = errors.Join(bench.Write(resultsFile, r), bench.WriteSection(docFile, section))
	}
	return errors.Join(append(r.broken, err)...)
}
