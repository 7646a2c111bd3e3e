//go:build linux

package main

import (
	"context"
	"fmt"
	"net"
	"time"

	"perimeterd/internal/lab"
	"perimeterd/internal/lab/bench"
)

// scans is how often each door is scanned.
const scans = 3

// scanned is what a port scan does to a door.
type scanned struct {
	Door   string `json:"door"`
	Scans  int    `json:"scans"`
	Opened int    `json:"opened"`
}

// scan is nmap's, every port in ascending order, from the client's address, and then one connect from there. Doors take turns, so that
// the window of one is over when it is scanned again.
func (r *results) scan(ctx context.Context, l *lab.Lab, doors []*door) error {
	for _, d := range doors {
		r.Scans = append(r.Scans, &scanned{Door: d.name})
	}
	values := make([][]float64, len(doors))
	for range scans {
		for i, d := range doors {
			began := time.Now()
			c := l.Client.Command(ctx, "nmap", "-Pn", "-n", "-sS", "-r", "-T5", "--min-rate", "30000", "--max-retries", "0", "-p", "1-65535", d.host.Addr.String())
			if out, err := c.CombinedOutput(); err != nil {
				return fmt.Errorf("%s: nmap: %w: %s", d.name, err, out)
			}
			took := time.Since(began)
			connecting, cancel := context.WithTimeout(ctx, time.Second)
			conn, err := l.Client.Dial(connecting, "tcp", net.JoinHostPort(d.host.Addr.String(), fmt.Sprint(gatePort)))
			cancel()
			s := r.Scans[i]
			s.Scans++
			opened := 0.0
			if err == nil {
				conn.Close()
				s.Opened++
				opened = 1
			}
			values[i] = append(values[i], opened)
			fmt.Printf("  %-12s scanned in %v: opened %v\n", d.name, took.Round(time.Millisecond), err == nil)
		}
	}
	for i, d := range doors {
		r.Add(bench.Figure{What: "opened by a port scan", Who: d.name, Unit: "of a scan", Values: values[i]})
	}
	return nil
}

func (r *results) scanSection(p func(string, ...any)) {
	p(`
### Under a port scan

` + "`nmap -sS -r`" + ` sends a SYN to every port, in ascending order, which the stock sequence is too. Then one connect to the port behind the door, from the
same address.

| door | scans | opened |
|---|---|---|
`)
	for _, s := range r.Scans {
		p("| %s | %d | %d |\n", s.Door, s.Scans, s.Opened)
	}
}
