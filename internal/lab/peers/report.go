//go:build linux

package main

import (
	"fmt"
	"math"
	"strings"
	"time"

	"perimeterd/internal/lab/bench"
)

// results is what door.json holds.
type results struct {
	*bench.Run
	Latency []*latency         `json:"latency,omitempty"`
	Scans   []*scanned         `json:"scans,omitempty"`
	Idle    map[string]float64 `json:"idle_cpu,omitempty"` // of each daemon, of one core
	Floods  []flooded          `json:"floods,omitempty"`
	Refresh *refresh           `json:"refresh,omitempty"`
}

// section is the text of the documentation.
func (r *results) section() (string, error) {
	var b strings.Builder
	p := func(format string, a ...any) { fmt.Fprintf(&b, format, a...) }
	p("## The door\n\n")
	p("%s\n", r.Origin())
	p(`
Each door is a host of its own in a network namespace, with a TCP listener on 1194 behind it, and drops what it does not let
in (perimeterd in host mode). Windows are %v. perimeterd is the built binary with a configuration of its own init.
knockd has its stock sequence and iptables command; fwknop its default settings, with messages made by its own client; iptables
is Debian's, over nftables; the ipset script moves a source from set to set.
`, window)
	if r.Latency != nil {
		r.latencySection(p)
	}
	if r.Scans != nil {
		r.scanSection(p)
	}
	if r.Floods != nil {
		r.floodSection(p)
	}
	if r.Refresh != nil {
		r.refreshSection(p)
	}
	return b.String(), nil
}

func (r *results) latencySection(p func(string, ...any)) {
	p(`
### From the last knock packet to an open port

The time from the system call that sends the last packet of a knock to the one that sends the first SYN that is answered. The
first SYN is sent right behind the knock, then one every %v. Every run has a new source address, and a SYN before the
knock that must stay unanswered. Runs are interleaved: each door once, then each once more.

| door | opened | by the SYN right behind the knock | median | 99 %% are within | shortest, longest | against our token |
|---|---|---|---|---|---|---|
`, synPace)
	for _, l := range r.Latency {
		p("| %s | %d of %d | %d | %v | %v | %v, %v | × %s |\n", l.Door, l.Opened, l.Runs, l.FirstSYN, bench.Rounded(l.median), bench.Rounded(l.p99),
			bench.Rounded(quantile(l.Times, 0)), bench.Rounded(quantile(l.Times, 1)), bench.Times(float64(l.median)/float64(r.Latency[0].median)))
	}
	p(`
A SYN right behind a knock can only be answered where the kernel decides. What is left there is the time between two system
calls, of which the first carries the knock through the firewall.
`)
}

func (r *results) floodSection(p func(string, ...any)) {
	p(`
### Under a flood

One thread sends as fast as it can for %s seconds, from spoofed sources. Blind garbage is the same for all: a third each of
datagrams to random ports, SYNs to random ports, and wrong tokens (16 random bytes) to UDP 1194. Aimed garbage is what the door takes
for knocks: wrong tokens and SYNs to the first port of the sequence; for knockd and the ipset script SYNs to the first port; for
fwknop %d letters of base64 to UDP %d. Meanwhile %d friends of each kind knock, from addresses that the flood does not use, and
try the port for %v. Two numbers are two floods, the doors in turn.

| door | garbage | sent, thousand a second | dropped by its firewall | CPU of its daemon (idle) | friends let in, median time |
|---|---|---|---|---|---|
`, r.floodSeconds(), spaLength, spaPort, friends, friendWait)
	for _, garbage := range []string{"blind", "aimed"} {
		var names []string
		rounds := map[string][]flooded{}
		for _, f := range r.Floods {
			if f.Garbage == garbage {
				if rounds[f.Door] == nil {
					names = append(names, f.Door)
				}
				rounds[f.Door] = append(rounds[f.Door], f)
			}
		}
		for _, name := range names {
			var sent, dropped, cpu []string
			load := "no daemon"
			for _, f := range rounds[name] {
				sent = append(sent, fmt.Sprintf("%.0f", float64(f.Sent)/f.Seconds/1000))
				dropped = append(dropped, fmt.Sprintf("%.0f", float64(f.Dropped)/f.Seconds/1000))
				if f.Daemon {
					cpu = append(cpu, fmt.Sprintf("%.1f %%", 100*f.CPU/f.Seconds))
					load = fmt.Sprintf("%s (%.1f %%)", strings.Join(cpu, ", "), 100*r.Idle[name])
				}
			}
			var let []string
			for i := range rounds[name][0].Friends {
				let = append(let, friendsOf(rounds[name], i))
			}
			p("| %s | %s | %s | %s | %s | %s |\n", name, garbage, strings.Join(sent, ", "), strings.Join(dropped, ", "),
				load, strings.Join(let, "; "))
		}
	}
	p(`
CPU is user and system time of the daemon, in percent of one core, counted in ticks of 10 ms; its children, such as iptables, are
not in it. The work of firewall and packet filter is the sender's here, since on a veth cable the sender's thread carries a
packet to the end: the cheaper a door, the more is sent. The friends' own packets are among those dropped. Spoofed first knocks
fill the map of sources in progress, ours like the script's, so sequences fail; tokens, which our client sends first, do not.
`)
}

// floodSeconds is how long floods were, as in "5 to 7".
func (r *results) floodSeconds() string {
	shortest, longest := math.Inf(1), 0.0
	for _, f := range r.Floods {
		shortest, longest = min(shortest, f.Seconds), max(longest, f.Seconds)
	}
	return fmt.Sprintf("%.0f to %.0f", shortest, longest)
}

// friendsOf is one way's part of a row.
func friendsOf(rounds []flooded, way int) string {
	var opened, times []string
	for _, f := range rounds {
		r := f.Friends[way]
		opened = append(opened, fmt.Sprint(r.Opened))
		if r.Opened > 0 {
			times = append(times, bench.Rounded(quantile(r.Times, 0.5)).String())
		}
	}
	r := rounds[0].Friends[way]
	s := fmt.Sprintf("%s of %d", strings.Join(opened, ", "), r.Knocks)
	if _, kind, ok := strings.Cut(r.Door, ", "); ok {
		s = kind + " " + s
	}
	if times != nil {
		s += " (" + strings.Join(times, ", ") + ")"
	}
	return s
}

func (r *results) refreshSection(p func(string, ...any)) {
	f := r.Refresh
	p(`
### %d users

The daemon writes the tokens of a coming step (%.0f s) into the kernel bit by bit while a step lasts.

| | |
|---|---|
| start of the daemon, three steps of all users loaded | %.2f s |
| resident memory of the daemon | %.0f MB |
`, f.Users, f.Step, f.Start, float64(f.RSS)/1e6)
	for i, s := range f.Steps {
		p("| step %d: tokens written, commits, in all | %d, %d, %.0f ms |\n", i+1, s.Tokens, s.Flushes, s.Seconds*1000)
		p("| step %d: longest commit, CPU of the daemon | at most %v, %.2f s |\n", i+1, time.Duration(s.Within*float64(time.Second)), s.CPU)
	}
	slow := 0
	for _, us := range f.Flushes {
		if us > float64(flushGoal.Microseconds()) {
			slow++
		}
	}
	p("| the table alone, %d commits: median, 99 %% are within, longest; over %v | %v, %v, %v; %d |\n", len(f.Flushes), flushGoal,
		bench.Rounded(quantile(f.Flushes, 0.5)), bench.Rounded(quantile(f.Flushes, 0.99)), bench.Rounded(quantile(f.Flushes, 1)), slow)
	for i, n := range f.FirstTry {
		p("| %d users drawn at random, token %d of the same step: opened at the first try | %d of %d |\n", f.Some, i+1, n, f.Some)
	}
	p("\nThe daemon's own metric tells a commit's time by buckets, hence \"at most\". The goal is %v.\n", flushGoal)
}

// quantile of times in microseconds.
func quantile(microseconds []float64, q float64) time.Duration {
	return time.Duration(bench.Quantile(microseconds, q) * 1000)
}
