//go:build linux

package main

import (
	"fmt"
	"strings"
	"time"

	"perimeterd/internal/lab/bench"
)

// values are the raw ones of a figure.
func (r *report) values(what, who string, at float64) []float64 {
	for _, f := range r.Figures {
		if f.What == what && f.Who == who && f.At == at {
			return f.Values
		}
	}
	return nil
}

// laptop is the section on what a person waits for, beside what it replaces.
func (r *report) laptop() string {
	var b strings.Builder
	fmt.Fprintf(&b, `## From a cold laptop

%s

Time runs from the start of the first command (`+"`vpn up`"+`; knockd's `+"`knock`"+`, then `+"`openvpn`"+`) to a tunnel that carries data, and on to the first
byte of an HTTPS page that stock curl fetches through the proxy, which is 127.0.0.1:3128 with us, as `+"`vpn env`"+` says. The link holds every packet for half the round trip. Cold: nothing
is kept. Warm: the client died as in a power cut, and the session of before, in which the page was read once, stands where there is such a thing. The stack replaced:
an ipset script, OpenVPN (TCP, AES-256-CBC, RSA certificates, tls-auth), Squid that allows the tunnel's addresses. Ways in turn, medians; client,
servers and cloud share the machine.

| | round trip | perimeterd: tunnel | first byte | %s: tunnel | first byte | first byte, times as fast |
|---|---|---|---|---|---|---|
`, r.Origin(), stack)
	seconds := func(what, who string, at float64) (float64, string) {
		v := bench.Quantile(r.values(what, who, at), 0.5)
		return v, bench.Rounded(time.Duration(v * float64(time.Second))).String()
	}
	trips := append([]time.Duration{0}, roundTrips...)
	for _, c := range []struct{ first, note string }{{firstByte, ""}, {firstRunning, ", to an HTTP client that runs"}} {
		for _, warm := range []bool{false, true} {
			for _, rtt := range trips {
				at := float64(rtt) / float64(time.Millisecond)
				first, text := seconds(c.first+kind(warm), ours, at)
				theirs, theirText := seconds(c.first+kind(warm), stack, at)
				if first == 0 || theirs == 0 {
					continue // not measured there
				}
				_, up := seconds(tunnelUp+kind(warm), ours, at)
				_, theirUp := seconds(tunnelUp+kind(warm), stack, at)
				fmt.Fprintf(&b, "| %s%s | %v | %s | %s | %s | %s | %s |\n", kind(warm), c.note, rtt, up, text, theirUp, theirText, bench.Times(theirs/first))
			}
		}
	}
	// What grows with the link is the link's.
	slope := func(what, who string) float64 {
		near, far := roundTrips[0], roundTrips[len(roundTrips)-1]
		short, _ := seconds(what, who, float64(near)/float64(time.Millisecond))
		long, _ := seconds(what, who, float64(far)/float64(time.Millisecond))
		return (long - short) / (far - near).Seconds()
	}
	for _, warm := range []bool{false, true} {
		k := kind(warm)
		fmt.Fprintf(&b, "| %s | in round trips | %.2f | %.2f | %.2f | %.2f | |\n", k, slope(tunnelUp+k, ours), slope(firstByte+k, ours),
			slope(tunnelUp+k, stack), slope(firstByte+k, stack))
	}
	fmt.Fprintf(&b, `
In round trips: what is added between %v and %v, by the length that is added.

The same by each way that our client offers, as whole round trips and what the machine adds to them: programs that start, and the link's
own work. Cold: nothing is kept; warm: a session stands, after a power cut or a `+"`vpn exec`"+`. Medians.

%s

TCP through the tunnel alone, no delay: median (lowest, highest), MB/s; the CPU is of the process, at one flow, down if nothing is said.

| | %s | %s | %s | %s |
|---|---|---|---|---|
`, roundTrips[0], roundTrips[len(roundTrips)-1], r.overheads, ours, plainWG, vpnTCP, vpnUDP)
	rate := func(what, who string, unit float64, format string) string {
		v := r.values(what, who, 0)
		return fmt.Sprintf(format+" ("+format+", "+format+")", bench.Quantile(v, 0.5)/unit, bench.Quantile(v, 0)/unit, bench.Quantile(v, 1)/unit)
	}
	for _, what := range []string{oneDown, oneUp, eightDown, eightUp, serverCPU, clientCPU, serverCPU + uploading, clientCPU + uploading} {
		unit, format, label := 1e6, "%.0f", what
		if strings.Contains(what, "CPU") {
			unit, format, label = 1, "%.2f", what+", s/GB"
		}
		fmt.Fprintf(&b, "| %s |", label)
		for _, who := range []string{ours, plainWG, vpnTCP, vpnUDP} {
			b.WriteString(" " + rate(what, who, unit, format) + " |")
		}
		b.WriteString("\n")
	}
	fmt.Fprintf(&b, `
A download by CONNECT of bytes without TLS, so that the ends' own work is the same in all; the tunnel alone leads to a source beside the gate.

| | %s | %s | %s |
|---|---|---|---|
| %s |`, ours, stack, oursAlone, throughIt)
	for _, who := range []string{ours, stack, oursAlone} {
		b.WriteString(" " + rate(throughIt, who, 1e6, "%.0f") + " |")
	}
	b.WriteString("\n")
	return b.String()
}
