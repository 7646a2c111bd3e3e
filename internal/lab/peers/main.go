//go:build linux

// Command peers measures the door side by side with what it replaces, in network namespaces: perimeterd's built binary, knockd
// and fwknop from Debian's packages, and an iptables and ipset script. `make bench-door` runs it as root; it takes
// about six minutes, ends by itself and leaves nothing but its results.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"slices"
	"strings"
	"time"

	"perimeterd/internal/lab"
	"perimeterd/internal/lab/bench"
)

// limit is the longest that it may take.
const limit = 8*time.Minute - 10*time.Second

func main() {
	runs := flag.Int("runs", 100, "how often each door is opened for the latency")
	rounds := flag.Int("rounds", 2, "how often each door is flooded with each garbage")
	only := flag.String("only", "latency,scan,flood,refresh", "`PARTS` to measure; only all of them are written")
	results := flag.String("results", "bench/door.json", "`FILE` for the raw numbers")
	doc := flag.String("doc", "docs/benchmarks.md", "`FILE` whose section \"The door\" is written")
	flag.Parse()
	bench.Main("bench-door", limit, func(ctx context.Context) error {
		return measure(ctx, *runs, *rounds, strings.Split(*only, ","), *results, *doc)
	})
}

func measure(ctx context.Context, runs, rounds int, parts []string, resultsFile, docFile string) error {
	for _, part := range parts {
		switch part {
		case "latency", "scan", "flood", "refresh":
		default:
			return fmt.Errorf("-only %q: want latency, scan, flood, refresh", part)
		}
	}
	has := func(part string) bool { return slices.Contains(parts, part) }
	run, err := bench.Begin(ctx, "make bench-door", "knockd", "fwknop-server", "fwknop-client", "iptables", "ipset", "nftables", "nmap")
	if err != nil {
		return err
	}
	r := &results{Run: run}
	fmt.Println(r.Machine())
	if has("latency") || has("scan") || has("flood") {
		if err := r.sideBySide(ctx, runs, rounds, has); err != nil {
			return err
		}
	}
	if has("refresh") {
		fmt.Printf("\n%d users, two whole steps\n", manyUsers)
		var err error
		if r.Refresh, err = measureRefresh(ctx); err != nil {
			return err
		}
	}
	r.End()
	section, err := r.section()
	if err != nil {
		return err
	}
	fmt.Printf("\n%s", section)
	if len(parts) < 4 {
		return nil
	}
	return errors.Join(bench.Write(resultsFile, r), bench.WriteSection(docFile, section))
}

func (r *results) sideBySide(ctx context.Context, runs, rounds int, has func(part string) bool) (err error) {
	l, err := lab.New(ctx, lab.Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	doors, err := openDoors(ctx, l)
	if err != nil {
		return err
	}
	var hosts []*lab.Namespace
	for _, d := range doors {
		hosts = append(hosts, d.host)
	}
	source, err := l.Crowd(ctx, hosts...)
	if err != nil {
		return err
	}
	k, err := l.NewKnocker()
	if err != nil {
		return err
	}
	defer k.Close()
	if has("latency") {
		fmt.Printf("\nlatency: %d runs of each, in turn\n", runs)
		if r.Latency, err = measureLatency(ctx, l, doors, k, source, runs); err != nil {
			return err
		}
		for _, l := range r.Latency {
			f := bench.Figure{What: "knock to open port", Who: l.Door, Unit: "s"}
			for _, us := range l.Times {
				f.Values = append(f.Values, us/1e6)
			}
			r.Add(f)
		}
	}
	if has("scan") {
		fmt.Printf("\nport scans: %d of each, in turn\n", scans)
		if err := r.scan(ctx, l, doors); err != nil {
			return err
		}
	}
	if has("flood") {
		fmt.Printf("\nfloods: %d of each, in turn\n", rounds)
		attacker, err := l.AddHost(ctx, "attacker")
		if err != nil {
			return err
		}
		if r.Idle, err = idle(ctx, doors); err != nil {
			return err
		}
		if r.Floods, err = measureFloods(ctx, doors, attacker, k, source, rounds); err != nil {
			return err
		}
		for _, f := range r.Floods {
			if f.Daemon {
				r.Add(bench.Figure{What: "daemon's CPU under a flood, " + f.Garbage, Who: f.Door, Unit: "of a core", Values: []float64{f.CPU / f.Seconds}})
			}
		}
	}
	return nil
}
