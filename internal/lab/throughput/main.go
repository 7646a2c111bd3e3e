//go:build linux

// Command throughput measures what the client's two kinds of tunnel carry, over one long link, beside bare TCP: a device of the
// system's, and the rootless one of an ordinary user. `make bench-client` runs it as root; it takes about four minutes and leaves
// nothing but its section of docs/benchmarks.md.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"strings"
	"time"

	"perimeterd/internal/lab/bench"
)

func main() {
	rounds := flag.Int("rounds", 2, "how often each is measured, in turn")
	span := flag.Duration("span", 3*time.Second, "how long each is measured once it flows")
	only := flag.String("only", "", "measure only what has this `TEXT` in its name, and write nothing")
	results := flag.String("results", "bench/client.json", "`FILE` for the raw numbers")
	doc := flag.String("doc", "docs/benchmarks.md", "`FILE` whose section \"The client's tunnels\" is written")
	flag.Parse()
	bench.Main("bench-client", 10*time.Minute, func(ctx context.Context) error {
		return measure(ctx, *rounds, *span, *only, *results, *doc)
	})
}

// Names of what is measured, and of how.
const (
	download = "client download, one connection"
	upload   = "client upload, one connection"
	crowd    = "client download, 100 connections together"
	memory   = "client memory after 100 connections"
	bare     = "bare TCP"
	device   = "device"
	rootless = "rootless"
)

var roundTrips = []time.Duration{0, 50 * time.Millisecond}

func measure(ctx context.Context, rounds int, span time.Duration, only, results, doc string) (err error) {
	run, err := bench.Begin(ctx, "make bench-client")
	if err != nil {
		return err
	}
	r, err := newRoom(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	for range rounds {
		for _, rtt := range roundTrips {
			r.Link.SetDelay(rtt / 2)
			at := float64(rtt.Milliseconds())
			for _, what := range []string{download, upload, crowd} {
				if !strings.Contains(what, only) {
					continue
				}
				for _, w := range r.ways {
					bytes, err := r.flow(ctx, w, what, rtt, span)
					if err != nil {
						return fmt.Errorf("%s, %s, %v: %w", w.name, what, rtt, err)
					}
					fmt.Printf("%-10s %-45s %4v  %7.1f Mb/s\n", w.name, what, rtt, bytes*8/1e6)
					run.Add(bench.Figure{What: what, Who: w.name, Unit: "B/s", At: at, Axis: "round trip, ms", Values: []float64{bytes}})
				}
			}
		}
		for _, w := range r.ways[1:] {
			held, err := w.memory()
			if err != nil {
				return err
			}
			run.Add(bench.Figure{What: memory, Who: w.name, Unit: "B", Values: []float64{held}})
		}
	}
	run.End()
	text := section(run)
	fmt.Print(text)
	if only != "" {
		return nil
	}
	return errors.Join(bench.Write(results, run), bench.WriteSection(doc, text))
}

func section(r *bench.Run) string {
	var b strings.Builder
	values := func(what, who string, at float64) []float64 {
		for _, f := range r.Figures {
			if f.What == what && f.Who == who && f.At == at {
				return f.Values
			}
		}
		return nil
	}
	fmt.Fprintf(&b, "## The client's tunnels\n\n%s\n\n", r.Origin())
	b.WriteString("Over the lab's long link. Bare TCP ends at a host beside the bastion; the others go through tunnel and proxy to a host behind it, " +
		"and seal, open and relay every byte on the same two cores. Median (lowest, highest) in Mb/s, and as a part of bare TCP.\n\n" +
		"| | round trip | bare TCP | device | rootless |\n|---|---|---|---|---|\n")
	for _, what := range []string{download, upload, crowd} {
		for _, rtt := range roundTrips {
			at := float64(rtt.Milliseconds())
			fmt.Fprintf(&b, "| %s | %v |", strings.TrimPrefix(what, "client "), rtt)
			base := bench.Quantile(values(what, bare, at), 0.5)
			for _, who := range []string{bare, device, rootless} {
				v := values(what, who, at)
				fmt.Fprintf(&b, " %.0f (%.0f, %.0f)", bench.Quantile(v, 0.5)*8/1e6, bench.Quantile(v, 0)*8/1e6, bench.Quantile(v, 1)*8/1e6)
				if who != bare && base > 0 {
					fmt.Fprintf(&b, ", %.2f", bench.Quantile(v, 0.5)/base)
				}
				b.WriteString(" |")
			}
			b.WriteString("\n")
		}
	}
	fmt.Fprintf(&b, "\nMemory of the process that keeps the tunnel, after 100 connections: device %.0f MB, rootless %.0f MB.\n",
		bench.Quantile(values(memory, device, 0), 0.5)/1e6, bench.Quantile(values(memory, rootless, 0), 0.5)/1e6)
	return b.String()
}
