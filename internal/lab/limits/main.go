//go:build linux

// Command limits measures what the machine itself can do of that which the product's figures are made of, so that these can be
// read: TCP over bare virtual cables, sealing and opening packets, a mutual TLS handshake, a packet that the kernel drops.
// `make bench-limits` runs it as root; it takes about half a minute.
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
	rounds := flag.Int("rounds", 5, "how often each is measured, in turn")
	results := flag.String("results", "bench/limits.json", "`FILE` for the raw numbers")
	doc := flag.String("doc", "docs/benchmarks.md", "`FILE` whose section \"The machine\" is written")
	flag.Parse()
	bench.Main("bench-limits", 3*time.Minute, func(ctx context.Context) error {
		return measure(ctx, *rounds, *results, *doc)
	})
}

// limits in the order of the table: how each is measured once, and what a value says.
var limits = []struct {
	what, unit, text string
	measure          func(context.Context) (float64, error)
}{
	{"TCP, one virtual cable, one flow", "B/s", "%.2f Gb/s", func(ctx context.Context) (float64, error) { return cable(ctx, 1) }},
	{"TCP, one virtual cable, eight flows", "B/s", "%.2f Gb/s", func(ctx context.Context) (float64, error) { return cable(ctx, 8) }},
	{"ChaCha20-Poly1305, seal, 1420 bytes, one core", "B/s", "%.2f Gb/s", func(context.Context) (float64, error) { return seal() }},
	{"ChaCha20-Poly1305, open, 1420 bytes, one core", "B/s", "%.2f Gb/s", func(context.Context) (float64, error) { return unseal() }},
	{"TLS 1.3, both certificates P-256, X25519MLKEM768, both ends on one core", "s", "%.0f µs", func(context.Context) (float64, error) { return handshake() }},
	{"system call pair, write and read of one byte through a pipe", "s", "%.2f µs", func(context.Context) (float64, error) { return pipe() }},
}

func measure(ctx context.Context, rounds int, results, doc string) error {
	r, err := bench.Begin(ctx, "make bench-limits")
	if err != nil {
		return err
	}
	fmt.Println(r.Machine())
	for range rounds {
		for _, l := range limits {
			v, err := l.measure(ctx)
			if err != nil {
				return fmt.Errorf("%s: %w", l.what, err)
			}
			r.Add(bench.Figure{What: l.what, Who: "the machine", Unit: l.unit, Values: []float64{v}})
		}
	}
	r.End()
	var b strings.Builder
	fmt.Fprintf(&b, "## The machine\n\n%s\n\nWhat others' figures can be read against: no product is in these.\n\n", r.Origin())
	b.WriteString("| | median | lowest, highest |\n|---|---|---|\n")
	for i, l := range limits {
		v := r.Figures[i].Values
		scale := 8 / 1e9
		if l.unit == "s" {
			scale = 1e6
		}
		fmt.Fprintf(&b, "| %s | "+l.text+" | "+l.text+", "+l.text+" |\n", l.what, bench.Quantile(v, 0.5)*scale, bench.Quantile(v, 0)*scale, bench.Quantile(v, 1)*scale)
	}
	fmt.Print(b.String())
	return errors.Join(bench.Write(results, r), bench.WriteSection(doc, b.String()))
}
