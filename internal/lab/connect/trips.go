//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"perimeterd/internal/lab"
	"perimeterd/internal/lab/bench"
)

// way is how a program reaches the cloud by our client.
type way struct {
	who    string
	vpn    string   // the client's program
	prefix []string // it runs under
	proxy  string   // of curl; empty: curl is a command of `vpn exec`
	after  [2]int   // round trips from the tunnel to the first byte, cold and warm: connection to the proxy; CONNECT, TLS, GET; or less (docs/client.md)
}

// The names of ways.
const (
	byDevice   = "device, the proxy's own address"
	byListener = "device, the local listener"
	byExec     = "device, vpn exec"
	rootless   = "rootless, the local listener"
	rootExec   = "rootless, vpn exec"
)

const localProxy = "http://127.0.0.1:3128"

// unprivileged may make no device.
var unprivileged = []string{"setpriv", "--bounding-set=-net_admin"}

func ways(programs []string) (all []way) {
	for _, w := range []way{{byDevice, "", nil, ourProxy, [2]int{4, 4}}, {byListener, "", nil, localProxy, [2]int{3, 2}}, {byExec, "", nil, "", [2]int{3, 2}},
		{rootless, "", unprivileged, localProxy, [2]int{3, 2}}, {rootExec, "", unprivileged, "", [2]int{3, 2}}} {
		for i, vpn := range programs {
			of := w
			if of.vpn = vpn; len(programs) > 1 {
				of.who += fmt.Sprintf(" (client %d)", i+1)
			}
			all = append(all, of)
		}
	}
	return all
}

// Names of what is measured.
const (
	upTrips    = "tunnel up by each way, "
	wholeTrips = "first byte by each way, "
)

func (s *stage) vpn(ctx context.Context, w way, args ...string) *lab.Cmd {
	line := append(append(append([]string{}, w.prefix...), w.vpn), args...)
	return s.alice.Command(ctx, line[0], line[1:]...)
}

// page is how long it takes until a command that fetches a page writes its first byte.
func page(c *lab.Cmd) (time.Duration, error) {
	r, out, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	defer r.Close()
	var said strings.Builder
	c.Stdout, c.Stderr = out, &said
	start := time.Now()
	err = c.Start()
	out.Close()
	if err != nil {
		return 0, err
	}
	_, err = r.Read(make([]byte, 1))
	took := time.Since(start)
	if err == nil {
		_, err = io.Copy(io.Discard, r)
	}
	if err := errors.Join(c.Wait(), err); err != nil {
		return 0, fmt.Errorf("%s: %w\n%s", strings.Join(c.Args, " "), err, said.String())
	}
	return took, nil
}

// take is how long it takes to a tunnel, where that shows, and to the first byte of a page.
func (s *stage) take(ctx context.Context, w way, curl []string) (up, whole time.Duration, err error) {
	if w.proxy == "" {
		whole, err = page(s.vpn(ctx, w, append([]string{"exec", "--"}, curl...)...))
		return 0, whole, err
	}
	start := time.Now()
	if _, err = output(s.vpn(ctx, w, "up")); err != nil {
		return 0, 0, err
	}
	up = time.Since(start)
	first, err := page(s.alice.Command(ctx, curl[0], append(curl[1:len(curl):len(curl)], "--proxy", w.proxy)...))
	return up, up + first, err
}

// trips takes each way in turn, cold and warm: what is the link's in it, and what is ours.
func (r *report) trips(ctx context.Context, runs int, clients string, trip time.Duration) error {
	all := append([]time.Duration{0}, roundTrips...)
	if trip >= 0 {
		all = []time.Duration{trip}
	}
	if clients == "" {
		bin, err := lab.Bin("vpn")
		if err != nil {
			return err
		}
		clients = bin
	}
	s, err := open(ctx, lab.Options{LongLink: true})
	if err != nil {
		return err
	}
	defer s.Close()
	curl := []string{"curl", "-sSN", "--max-time", "60", "--cacert", s.cloud.CAFile, "https://" + cloudName + "/"}
	ways := ways(strings.Split(clients, ","))
	for _, rtt := range all {
		s.Link.SetDelay(rtt / 2)
		at := float64(rtt) / float64(time.Millisecond)
		for range runs {
			for _, w := range ways {
				if err := s.next(ctx); err != nil {
					return err
				}
				for _, warm := range []bool{false, true} {
					if warm {
						if w.proxy == localProxy {
							err = s.keeps(ctx, cloudName)
						}
						if w.proxy != "" && err == nil { // exec leaves a session, as a power cut does
							err = s.end(ctx, true)
						}
						if err := errors.Join(err, s.shut(ctx)); err != nil {
							return err
						}
					}
					up, whole, err := s.take(ctx, w, curl)
					if err != nil {
						return fmt.Errorf("%s, %s, round trip %v: %w", w.who, kind(warm), rtt, err)
					}
					if up > 0 {
						r.Add(bench.Figure{What: upTrips + kind(warm), Who: w.who, Unit: "s", At: at, Axis: tripAxis, Values: bench.Seconds(up)})
					}
					r.Add(bench.Figure{What: wholeTrips + kind(warm), Who: w.who, Unit: "s", At: at, Axis: tripAxis, Values: bench.Seconds(whole)})
				}
				for _, ask := range []string{"up", "down"} { // only so the session that exec leaves ends
					if _, err := output(s.vpn(ctx, w, ask)); err != nil {
						return err
					}
				}
			}
		}
		fmt.Printf("round trip %v: done\n", rtt)
	}
	r.overheads = r.tripsTable(ways, all)
	fmt.Println(r.overheads)
	return nil
}

// tripsTable shows what is the link's, in whole round trips, and what is the programs'.
func (r *report) tripsTable(all []way, trips []time.Duration) string {
	var b strings.Builder
	b.WriteString("| | | round trip | tunnel | first byte |\n|---|---|---|---|---|\n")
	for _, w := range all {
		for _, warm := range []bool{false, true} {
			up, after := 3, w.after[0]
			if warm {
				up, after = 1, w.after[1]
			}
			for _, rtt := range trips {
				cell := func(what string, trips int) string {
					list := r.values(what+kind(warm), w.who, float64(rtt)/float64(time.Millisecond))
					if len(list) == 0 {
						return ""
					}
					took := time.Duration(bench.Quantile(list, 0.5) * float64(time.Second))
					return fmt.Sprintf("%v = %d trips + %v", bench.Rounded(took), trips, bench.Rounded(took-time.Duration(trips)*rtt))
				}
				fmt.Fprintf(&b, "| %s | %s | %v | %s | %s |\n", w.who, kind(warm), rtt, cell(upTrips, up), cell(wholeTrips, up+after))
			}
		}
	}
	return b.String()
}
