//go:build linux

package main

import (
	"fmt"
	"math"
	"strings"

	"perimeterd/internal/lab/bench"
)

// goal is something that was aimed at: a bound, or a ratio to another's figure.
type goal struct {
	what  string
	at    float64
	axis  string
	want  string
	bound float64 // ours is at most this, or at least -bound where it is negative; 0: none
	peer  string  // a figure of whom
	times float64 // ours is at least so many times theirs; negative: at most
}

func (g goal) label() string {
	if g.axis == "" {
		return g.what
	}
	return fmt.Sprintf("%s, %g %s", g.what, g.at, g.axis)
}

// find gives our figure and the others'.
func (g goal) find(figures []bench.Figure) (ours *bench.Figure, others []bench.Figure) {
	for i, f := range figures {
		switch {
		case f.What != g.what || f.At != g.at || len(f.Values) == 0:
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
	switch {
	case g.bound > 0 && ours > g.bound, g.bound < 0 && ours < -g.bound:
		return false
	case g.peer == "":
		return true
	}
	for _, o := range others {
		if o.Who == g.peer {
			theirs := bench.Quantile(o.Values, 0.5)
			return g.times > 0 && ours >= g.times*theirs || g.times < 0 && ours <= -g.times*theirs
		}
	}
	return false
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
	case "B/s":
		v *= 8
		return scale("b/s", "kb/s", "Mb/s", "Gb/s")
	}
	if math.Abs(v) >= 100 {
		return fmt.Sprintf("%.0f %s", v, unit)
	}
	return fmt.Sprintf("%.3g %s", v, unit)
}

// goals is the table of what is aimed at.
var goals = []goal{
	{what: "knock to open port", want: "as soon as the kernel's ipset", peer: "iptables + ipset", times: -3},
	{what: "revoke to last byte", at: 500, axis: "others moving data", want: "1 s", bound: 1},
	{what: "memory a session", at: 5000, axis: "sessions", want: "5,000 sessions held", bound: 200e3},
}
