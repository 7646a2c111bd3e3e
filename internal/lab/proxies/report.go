//go:build linux

package main

import (
	"context"
	"fmt"
	"runtime/debug"
	"slices"
	"strings"

	"perimeterd/internal/lab/bench"
)

// Goals.
const (
	goalTunnel = 120.0 // µs of CPU
	goalGB     = 0.25  // seconds of CPU
	goalIdle   = 6.0   // KB
	goalFDs    = 2
)

// results is what proxy.json holds.
type results struct {
	*bench.Run
	Manners []manner   `json:"manners,omitempty"`
	Tunnels []turn     `json:"tunnels,omitempty"`
	Bulk    []turn     `json:"bulk,omitempty"`
	Latency []*latency `json:"latency,omitempty"`
	Exact   *counted   `json:"exact,omitempty"`
	Idle    []*silence `json:"idle,omitempty"`
	Limited string     `json:"limited,omitempty"` // what this machine does not allow

	options options
	order   []string
	floor   []string // if it is measured
	broken  []error  // promises
}

// begin says what is measured, and on what.
func begin(ctx context.Context, room *room, o options) (*results, error) {
	run, err := bench.Begin(ctx, o.command(), "squid", "tinyproxy-bin")
	if err != nil {
		return nil, err
	}
	r := &results{Run: run, options: o}
	for _, c := range room.all {
		r.order = append(r.order, c.name)
	}
	for _, c := range room.floor {
		r.floor = append(r.floor, c.name)
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		r.Versions["Go"] = strings.TrimPrefix(info.GoVersion, "go")
		for _, m := range info.Deps {
			if m.Path == "github.com/elazarl/goproxy" {
				r.Versions["goproxy"] = m.Version
			}
		}
	}
	return r, nil
}

// promise notes one that was not kept.
func (r *results) promise(kept bool, format string, a ...any) {
	if !kept {
		r.broken = append(r.broken, fmt.Errorf(format, a...))
	}
}

// section is the text of the documentation.
func (r *results) section() string {
	var b strings.Builder
	p := func(format string, a ...any) { fmt.Fprintf(&b, format, a...) }
	if r.options.long() {
		p("## The proxy, ten minutes of silence\n\n%s\n\nAll is as in the section \"The proxy\", of which this is the last part, held for longer.\n", r.Origin())
		r.idleSection(p)
		return b.String()
	}
	p("## The proxy\n\n%s\n", r.Origin())
	p(`
All four run on the bastion at once and are measured in turns, each round beginning with another: the built perimeterd with all it
does (session, policy, TLS name check, log, audit, metrics, the firewall's backstop), Squid and tinyproxy from Debian with a source
and a port rule and a log line a tunnel, and the library goproxy alone, which decides and logs nothing. Clients are on the bastion and come
to perimeterd from the address of a live session, so the tunnel is not in the figures, except where they say so; the origin is across a
cable. CPU is the proxy's process's own, by its CPU clock. Clients, proxies and origin share the machine's cores. A figure is the
median of the turns, with the least and the most.
`)
	if r.Tunnels != nil {
		r.tunnelSection(p)
	}
	if r.Bulk != nil {
		r.bulkSection(p)
	}
	if r.Latency != nil {
		r.latencySection(p)
	}
	if r.Idle != nil {
		r.idleSection(p)
	}
	if r.Manners != nil || r.Exact != nil {
		p("\n### What arrives\n\n")
	}
	if r.Manners != nil {
		p("| | the client ends its side, then gets 1 MiB | ClientHello sent together with CONNECT |\n|---|---|---|\n")
		for _, m := range r.Manners {
			p("| %s | %s | %s |\n", m.Proxy, m.HalfClose, m.Early)
		}
	}
	if x := r.Exact; x != nil {
		p("\n%d bytes each way at once through one tunnel of perimeterd, in %.1f s. Down: the client got %d, the log says %d, the user's metrics %d. Up: the origin got %d, the log says %d, the metrics %d (a ClientHello and its answer are in all of them).\n",
			x.Bytes, x.Seconds, x.ClientDown, x.LogDown, x.MetricsDown, x.OriginUp, x.LogUp, x.MetricsUp)
	}
	return b.String()
}

// spread is median, least and most of what turns of a proxy and kind cost.
func spread(turns []turn, proxy, kind, format string, of func(turn) float64) string {
	var list []float64
	for _, t := range turns {
		if t.Proxy == proxy && t.Kind == kind {
			list = append(list, of(t))
		}
	}
	if list == nil {
		return "–"
	}
	return fmt.Sprintf(format+" ("+format+"–"+format+")", bench.Quantile(list, 0.5), slices.Min(list), slices.Max(list))
}

func cpuEach(t turn) float64 { return t.CPU * 1e6 / float64(t.Count) }
func perGB(t turn) float64   { return t.CPU * 1e9 / float64(t.Count) }
func rate(t turn) float64    { return float64(t.Count) / t.Seconds }
func megas(t turn) float64   { return rate(t) / 1e6 }

func (r *results) tunnelSection(p func(string, ...any)) {
	p(`
### Tunnels

CONNECT, 200, a ClientHello up, %d bytes down, the end; %d threads, %d tunnels a turn, %d turns. By name: DNS of a TTL of %d s. The goal is %.0f µs.

| | CPU µs a tunnel, to an address | to a name | tunnels a second, to a name |
|---|---|---|---|
`, replySize, callers, r.options.tunnels, r.options.rounds, nameTTL, goalTunnel)
	for _, name := range slices.Concat(r.order, r.floor, []string{r.order[0] + ", by its tunnel"}) {
		p("| %s | %s | %s | %s |\n", name, spread(r.Tunnels, name, "address", "%.0f", cpuEach), spread(r.Tunnels, name, "name", "%.0f", cpuEach),
			spread(r.Tunnels, name, "name", "%.0f", rate))
	}
	p("\nBy its tunnel: the same, from a client with a WireGuard tunnel, whose packets the same process decrypts and encrypts.\n")
	if r.floor != nil {
		p(`
%s is no product: one thread in bare system calls, which leads every CONNECT to the origin, whatever its name, decides and logs nothing,
and makes no garbage. It stands in the same place, so it shows what the kernel takes here for the two connections.
`, "The"+strings.TrimPrefix(floorName, "the"))
	}
}

func (r *results) bulkSection(p func(string, ...any)) {
	p(`
### Much data

%.1f GB down one tunnel, then up another; %d turns. The goal is %.2f s of CPU a GB.

| | CPU-s a GB, down | up | MB/s, down | up |
|---|---|---|---|---|
`, float64(r.options.bulk)/1e9, r.options.rounds, goalGB)
	for _, name := range r.order {
		p("| %s | %s | %s | %s | %s |\n", name, spread(r.Bulk, name, "down", "%.2f", perGB), spread(r.Bulk, name, "up", "%.2f", perGB),
			spread(r.Bulk, name, "down", "%.0f", megas), spread(r.Bulk, name, "up", "%.0f", megas))
	}
}

func (r *results) latencySection(p func(string, ...any)) {
	p(`
### Added latency

An exchange of %d bytes each way every %v, by one tunnel after the other, less what the same takes without a proxy (first row, as it is);
%d turns of %v for each. Median / 99 %% within; of the turns the median. Where others use the machine, the 99 %% are theirs: a figure below zero says so.

| |`, message, pace, r.options.rounds, r.options.busy)
	for _, n := range busyTunnels {
		p(" %d busy |", n)
	}
	p("\n|---|%s\n", strings.Repeat("---|", len(busyTunnels)))
	for _, name := range slices.Concat([]string{"direct"}, r.order, r.floor) {
		p("| %s |", name)
		for _, n := range busyTunnels {
			half, most := r.added(name, n)
			p(" %v / %v |", bench.Rounded(bench.Quantile(half, 0.5)), bench.Rounded(bench.Quantile(most, 0.5)))
		}
		p("\n")
	}
}

func (r *results) idleSection(p func(string, ...any)) {
	limited := ""
	if r.Limited != "" {
		limited = " (" + r.Limited + ")"
	}
	p(`
### Silent tunnels

%d at each proxy, all at once%s, each of which has seen a ClientHello and an answer, held for %v, then all used once more and closed. Memory is what is
resident (VmRSS; what sockets take is the kernel's, and not in it), beyond what was before, when perimeterd had given back what it had free.
The goal is %.0f KB and %d descriptors a tunnel.

| | KB a tunnel, after %v, at the end | descriptors a tunnel | resident MB: before, after %[6]v, at the end, all closed | descriptors: before, held, all closed |
|---|---|---|---|---|
`, r.Idle[0].Asked, limited, r.options.hold, goalIdle, goalFDs, min(settled, r.options.hold))
	for _, s := range r.Idle {
		p("| %s | %.1f, %.1f | %.2f | %.1f, %.1f, %.1f, %.1f | %d, %d, %d |\n", s.Proxy, s.each(rss, s.Settled)/1024, s.each(rss, s.End)/1024,
			s.each(fds, s.End), mega(s.Before.RSS), mega(s.Settled.RSS), mega(s.End.RSS), mega(s.After.RSS), s.Before.FDs, s.End.FDs, s.After.FDs)
	}
	for _, s := range r.Idle {
		if s.Before.Heap > 0 {
			p(`
Of %s's memory, heap that the last collection left and stacks: %.1f MB before, %.1f MB held (%.1f KB a tunnel), %.1f MB when all were closed. Go keeps the
structures of goroutines and descriptors for the next ones, %.1f KB for each tunnel that there ever was at once.
`, s.Proxy, mega(s.Before.Heap), mega(s.End.Heap), s.each(func(h held) int { return h.Heap }, s.End)/1024, mega(s.After.Heap), 2*keeps/1024.0)
			if s.Again.RSS > 0 {
				p("When as many were held and closed once more, %.1f MB were resident, of which heap and stacks %.1f MB.\n", mega(s.Again.RSS), mega(s.Again.Heap))
			} else {
				p("What goes back later is in `make bench-proxy-idle`.\n")
			}
		}
		if s.Failed != "" || s.Tunnels < s.Asked {
			p("\n%s held %d: %s.\n", s.Proxy, s.Tunnels, s.Failed)
		}
		if s.Threads() > 1000 {
			p("\n%s runs a thread for each tunnel: %d.\n", s.Proxy, s.Threads())
		}
	}
}

// Threads is how many there were at the end.
func (s *silence) Threads() int { return s.End.Threads }

func mega(bytes int) float64 { return float64(bytes) / 1e6 }
