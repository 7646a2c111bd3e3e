//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"perimeterd/internal/lab"
	"perimeterd/internal/lab/bench"
	"perimeterd/vpn/client"
)

var roundTrips = []time.Duration{20 * time.Millisecond, 50 * time.Millisecond, 150 * time.Millisecond}

func (s *stage) status(ctx context.Context) (st client.Status, err error) {
	out, _ := s.alice.VPN(ctx, "status", "--json").Output() // exit status 1: down
	return st, json.Unmarshal(out, &st)
}

// up is how long `vpn up` takes.
func (s *stage) up(ctx context.Context) (time.Duration, error) {
	start := time.Now()
	_, err := output(s.alice.VPN(ctx, "up"))
	return time.Since(start), err
}

// first is how long it takes from now to the first byte of a page.
func (s *stage) first(ctx context.Context) (time.Duration, error) {
	start := time.Now()
	out, err := output(s.curl(ctx, "-o", os.DevNull, "-w", "%{time_starttransfer} %{time_total}", "https://"+cloudName+"/"))
	if err != nil {
		return 0, err
	}
	took := time.Since(start)
	var first, total float64
	if _, err := fmt.Sscan(out, &first, &total); err != nil {
		return 0, fmt.Errorf("curl said %q: %w", out, err)
	}
	return took - time.Duration((total-first)*float64(time.Second)), nil
}

// end takes the tunnel down: for the next cold start as its owner does, for a warm one as a power cut does.
func (s *stage) end(ctx context.Context, warm bool) error {
	if !warm {
		_, err := output(s.alice.VPN(ctx, "down"))
		return err
	}
	st, err := s.status(ctx)
	if err != nil {
		return err
	}
	if _, err := output(s.Client.Command(ctx, "kill", "-9", fmt.Sprint(st.PID))); err != nil {
		return err
	}
	for st.State != "down" {
		if st, err = s.status(ctx); err != nil {
			return err
		}
	}
	return nil
}

func kind(warm bool) string {
	if warm {
		return "warm"
	}
	return "cold"
}

func (r *report) times(ctx context.Context, runs int) error {
	s, err := open(ctx, lab.Options{LongLink: true})
	if err != nil {
		return err
	}
	defer s.Close()
	medians := map[string][]time.Duration{}
	for _, rtt := range append([]time.Duration{0}, roundTrips...) { // the first warms up, and is what the machine itself costs
		s.Link.SetDelay(rtt / 2)
		ups, firsts := map[bool][]time.Duration{}, map[bool][]time.Duration{}
		for range runs {
			if err := s.next(ctx); err != nil {
				return err
			}
			for _, warm := range []bool{false, true} {
				if warm {
					if err := errors.Join(s.end(ctx, true), s.shut(ctx)); err != nil {
						return err
					}
				}
				up, err := s.up(ctx)
				if err != nil {
					return err
				}
				first, err := s.first(ctx)
				if err != nil {
					return err
				}
				ups[warm], firsts[warm] = append(ups[warm], up), append(firsts[warm], up+first)
			}
			if err := s.end(ctx, false); err != nil {
				return err
			}
		}
		for _, warm := range []bool{false, true} {
			ms := float64(rtt) / float64(time.Millisecond)
			r.Add(bench.Figure{What: kind(warm) + ": vpn up", Who: "perimeterd", Unit: "s", At: ms, Axis: "round trip, ms", Values: bench.Seconds(ups[warm]...)})
			r.Add(bench.Figure{What: kind(warm) + ": first HTTPS byte", Who: "perimeterd", Unit: "s", At: ms, Axis: "round trip, ms", Values: bench.Seconds(firsts[warm]...)})
			u, f := bench.Quantile(ups[warm], 0.5), bench.Quantile(firsts[warm], 0.5)
			medians[kind(warm)] = append(medians[kind(warm)], u)
			medians[kind(warm)+" first"] = append(medians[kind(warm)+" first"], f)
			r.row(fmt.Sprintf("%s, round trip %v", kind(warm), rtt), "tunnel %v, first HTTPS byte %v (%d runs, medians)", bench.Rounded(u), bench.Rounded(f), runs)
		}
	}
	// What grows with the link is the link's.
	for _, k := range []string{"cold", "warm"} {
		trips := func(list []time.Duration) float64 {
			return float64(list[3]-list[1]) / float64(roundTrips[2]-roundTrips[0])
		}
		r.row(k+", in round trips", "%.2f to the tunnel, %.2f to the first HTTPS byte", trips(medians[k]), trips(medians[k+" first"]))
	}
	return nil
}

// losses drops each packet of the exchange once, the first, the second and so on.
func (r *report) losses(ctx context.Context) error {
	s, err := open(ctx, lab.Options{LongLink: true})
	if err != nil {
		return err
	}
	defer s.Close()
	for _, rtt := range roundTrips {
		s.Link.SetDelay(rtt / 2)
		for _, warm := range []bool{false, true} {
			var whole []time.Duration
			var worst time.Duration
			var worstAt int
			for n := 0; ; n++ { // 0: none is lost
				if err := s.next(ctx); err != nil {
					return err
				}
				if warm {
					if _, err := s.up(ctx); err != nil {
						return err
					}
					if err := errors.Join(s.end(ctx, true), s.shut(ctx)); err != nil {
						return err
					}
				}
				rule, passed := lab.Only(n)
				if n > 0 {
					s.Link.SetLoss(rule)
				}
				took, err := s.up(ctx)
				lost := passed()
				s.Link.SetLoss(nil)
				if err != nil {
					return fmt.Errorf("packet %d lost, %s, round trip %v: %w", n, kind(warm), rtt, err)
				}
				if err := s.end(ctx, false); err != nil {
					return err
				}
				if n == 0 {
					whole = append(whole, took)
					continue
				}
				if !lost {
					break
				}
				if r.Add(bench.Figure{What: kind(warm) + ": vpn up with a packet lost", Who: "perimeterd", Unit: "s", At: float64(rtt) / float64(time.Millisecond), Axis: "round trip, ms", Values: bench.Seconds(took)}); took > worst {
					worst, worstAt = took, n
				}
			}
			r.row(fmt.Sprintf("%s, round trip %v, each packet lost once", kind(warm), rtt), "worst %v (packet %d), without loss %v", bench.Rounded(worst), worstAt, bench.Rounded(whole[0]))
		}
	}
	return nil
}
