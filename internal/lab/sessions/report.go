//go:build linux

package main

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/procfs"
	"golang.org/x/sys/unix"
)

// report is what was measured, in rows.
type report struct {
	date    time.Time
	machine string
	rows    []row
	broken  []error // promises
}

type row struct{ what, value string }

func (r *report) add(what, format string, a ...any) {
	r.rows = append(r.rows, row{what, fmt.Sprintf(format, a...)})
	fmt.Printf("%s: %s\n", what, r.rows[len(r.rows)-1].value)
}

// title begins a part of the table.
func (r *report) title(format string, a ...any) {
	r.rows = append(r.rows, row{"**" + fmt.Sprintf(format, a...) + "**", ""})
	fmt.Printf("\n%s\n", fmt.Sprintf(format, a...))
}

// promise notes one that was not kept.
func (r *report) promise(kept bool, format string, a ...any) {
	if !kept {
		r.broken = append(r.broken, fmt.Errorf(format, a...))
	}
}

func (r *report) describe() error {
	r.date = time.Now()
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return err
	}
	proc, err := procfs.NewDefaultFS()
	if err != nil {
		return err
	}
	cpus, err := proc.CPUInfo()
	if err != nil {
		return err
	}
	load, err := proc.LoadAvg()
	if err != nil || len(cpus) == 0 {
		return err
	}
	r.machine = fmt.Sprintf("%s, %d × %s, Linux %s, load %.2f before", r.date.Format(time.DateOnly), len(cpus), cpus[0].ModelName,
		unix.ByteSliceToString(u.Release[:]), load.Load1)
	return nil
}

func (r *report) section() string {
	var b strings.Builder
	fmt.Fprintf(&b, `## Sessions

`+"`make bench-sessions`"+`, which took %v; written by it. %s.

Every client walks the whole path: a token from a state file with that many users, TLS, a request with the handshake in it,
WireGuard (wireguard-go, one device each), TCP through one TUN device, the proxy, HTTPS from a cloud host. Clients, daemon and
cloud share the machine.

| | |
|---|---|
`, time.Since(r.date).Round(time.Second), r.machine)
	for _, row := range r.rows {
		fmt.Fprintf(&b, "| %s | %s |\n", row.what, row.value)
	}
	return b.String()
}

// spread is median, 99 % and worst.
func spread(list []time.Duration) string {
	return fmt.Sprintf("median %v, 99 %% within %v, worst %v", rounded(quantile(list, 0.5)), rounded(quantile(list, 0.99)), rounded(quantile(list, 1)))
}

// quantile is by the nearest rank; zero of none.
func quantile(list []time.Duration, q float64) time.Duration {
	if len(list) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(list))
	return sorted[max(int(math.Ceil(q*float64(len(sorted))))-1, 0)]
}

// rounded keeps what a figure is worth.
func rounded(d time.Duration) time.Duration {
	switch {
	case d < 10*time.Millisecond:
		return d.Round(100 * time.Microsecond)
	case d < time.Second:
		return d.Round(time.Millisecond)
	}
	return d.Round(10 * time.Millisecond)
}
