//go:build linux

package main

import (
	"fmt"
	"math"
	"slices"
	"strings"

	"perimeterd/internal/lab/bench"
)

// goal is something that was aimed at: a bound, ratios to others' figures, or both.
type goal struct {
	what   string
	at     float64 // negative: wherever it was measured
	axis   string
	want   string
	bound  float64            // ours is at most this, or at least -bound where it is negative; 0: none
	beside map[string]float64 // ours is at least so many times the figure of each; negative: at most
}

func (g goal) label() string {
	if g.axis == "" || g.at < 0 {
		return g.what
	}
	return fmt.Sprintf("%s, %g %s", g.what, g.at, g.axis)
}

// find gives our figure and the others'.
func (g goal) find(figures []bench.Figure) (ours *bench.Figure, others []bench.Figure) {
	for i, f := range figures {
		switch {
		case f.What != g.what || g.at >= 0 && f.At != g.at || len(f.Values) == 0:
		case ours == nil && strings.HasPrefix(f.Who, "perimeterd"):
			ours = &figures[i]
		default:
			others = append(others, f)
		}
	}
	return ours, others
}

// kept says whether it was reached.
func (g goal) kept(ours float64, others []bench.Figure) bool {
	if g.bound > 0 && ours > g.bound || g.bound < 0 && ours < -g.bound {
		return false
	}
	for who, times := range g.beside {
		i := slices.IndexFunc(others, func(o bench.Figure) bool { return o.Who == who })
		if i < 0 {
			return false
		}
		theirs := bench.Quantile(others[i].Values, 0.5)
		if times > 0 && ours < times*theirs || times < 0 && ours > -times*theirs {
			return false
		}
	}
	return true
}

// human writes a value with a unit that suits it.
func human(v float64, unit string) string {
	scale := func(steps ...string) string {
		i := 0
		for ; i < len(steps)-1 && math.Abs(v) >= 1000; i++ {
			v /= 1000
		}
		return fmt.Sprintf("%.3g %s", v, steps[i])
	}
	switch unit {
	case "s":
		v *= 1e6
		return scale("µs", "ms", "s")
	case "B":
		return scale("B", "KB", "MB", "GB")
	case "1":
		return fmt.Sprintf("%.3g", v)
	case "of a scan", "of a core":
		return fmt.Sprintf("%.3g %%", 100*v)
	case "B/s":
		v *= 8
		return scale("b/s", "kb/s", "Mb/s", "Gb/s")
	}
	if math.Abs(v) >= 100 {
		return fmt.Sprintf("%.0f %s", v, unit)
	}
	return fmt.Sprintf("%.3g %s", v, unit)
}

// Rounds of one program differ by more than a tenth from each other.
const equal = "wireguard-go's, give or take a tenth; 8 × OpenVPN's"

var equals = map[string]float64{"wireguard-go": 0.9, "OpenVPN": 8}

// goals is the table of what is aimed at.
var goals = []goal{
	{what: "knock to open port", want: "as soon as the kernel's ipset", beside: map[string]float64{"iptables + ipset": -3}},
	{what: "first byte, cold", at: 50, axis: "ms round trip", want: "0.36 s", bound: 0.36},
	{what: "first byte, warm", at: 50, axis: "ms round trip", want: "0.21 s", bound: 0.21},
	{what: "first byte to an HTTP client that runs, warm", at: 0, axis: "ms round trip", want: "0.03 s", bound: 0.03},
	{what: "tunnel, one flow, download", want: equal, beside: equals},
	{what: "tunnel, one flow, upload", want: equal, beside: equals},
	{what: "tunnel, eight flows, download", want: equal, beside: equals},
	{what: "tunnel, eight flows, upload", want: equal, beside: equals},
	{what: "tunnel, server's CPU", want: "3.5 CPU-s/GB", bound: 3.5},
	{what: "download through tunnel and proxy", want: "8 × the stack replaced, 0.95 of the tunnel alone",
		beside: map[string]float64{"ipset + OpenVPN + Squid": 8, "perimeterd, tunnel alone": 0.95}},
	{what: "CONNECT, CPU a tunnel", want: "120 µs", bound: 120e-6},
	{what: "large transfers down, CPU", want: "0.25 CPU-s/GB", bound: 0.25},
	{what: "large transfers up, CPU", want: "0.25 CPU-s/GB", bound: 0.25},
	{what: "idle memory a tunnel", at: -1, want: "6 KB", bound: 6 << 10},
	{what: "idle descriptors a tunnel", at: -1, want: "2", bound: 2},
	{what: "opened by a port scan", want: "never", bound: 1e-9},
	{what: "revoke to last byte", at: 500, axis: "others moving data", want: "1 s", bound: 1},
	{what: "memory a session", at: 5000, axis: "sessions", want: "5,000 sessions held", bound: 200e3},
	{what: "memory a session", at: 10000, axis: "sessions", want: "10,000 sessions held", bound: 200e3},
}
