//go:build linux

package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
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

// first is how long it takes from now to the first byte of a page, by stock curl.
func (s *stage) first(ctx context.Context, proxy string) (time.Duration, error) {
	start := time.Now()
	out, err := output(s.curl(ctx, proxy, "-o", os.DevNull, "-w", "%{time_starttransfer} %{time_total}", "https://"+cloudName+"/"))
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

// running is the same by an HTTP client that is there already, as in a browser or an agent: no program starts.
func (s *stage) running(ctx context.Context, proxy string) (time.Duration, error) {
	through, err := url.Parse(proxy)
	if err != nil {
		return 0, err
	}
	t := &http.Transport{Proxy: http.ProxyURL(through), DialContext: s.Client.Dial, TLSClientConfig: &tls.Config{RootCAs: s.cloud.CAs}}
	defer t.CloseIdleConnections()
	start := time.Now()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+cloudName+"/", nil)
	if err != nil {
		return 0, err
	}
	resp, err := t.RoundTrip(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	_, err = resp.Body.Read(make([]byte, 1))
	if err == io.EOF {
		err = nil
	}
	return time.Since(start), err
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

// path is a way to connect: up, to a page through proxy, and down again.
type path struct {
	who, proxy string
	up         func(context.Context) (time.Duration, error)
	end        func(ctx context.Context, warm bool) error
}

// Names of what is measured.
const (
	tunnelUp     = "tunnel up, "
	firstByte    = "first byte, "
	firstRunning = "first byte to an HTTP client that runs, "
	tripAxis     = "ms round trip"
)

// times takes each path in turn, with nothing kept and then with what a power cut leaves.
func (r *report) times(ctx context.Context, runs int) error {
	s, err := open(ctx, lab.Options{LongLink: true})
	if err != nil {
		return err
	}
	defer s.Close()
	old, err := s.replace(ctx)
	if err != nil {
		return err
	}
	paths := []path{{ours, localProxy, s.up, s.end}, {stack, replacedProxy, old.up, old.end}}
	for _, rtt := range append([]time.Duration{0}, roundTrips...) { // the first is what the machine itself costs
		s.Link.SetDelay(rtt / 2)
		clients := []struct {
			what string
			get  func(context.Context, string) (time.Duration, error)
		}{{firstByte, s.first}, {firstRunning, s.running}}
		if rtt > 0 {
			clients = clients[:1]
		}
		for range runs {
			for _, client := range clients {
				if err := s.next(ctx); err != nil {
					return err
				}
				for _, p := range paths {
					for _, warm := range []bool{false, true} {
						if warm {
							if p.who == ours {
								if err := s.keeps(ctx, cloudName); err != nil {
									return err
								}
							}
							if err := errors.Join(p.end(ctx, true), s.shut(ctx)); err != nil {
								return err
							}
						}
						up, err := p.up(ctx)
						if err != nil {
							return fmt.Errorf("%s, %s, round trip %v: %w", p.who, kind(warm), rtt, err)
						}
						first, err := client.get(ctx, p.proxy)
						if err != nil {
							return fmt.Errorf("%s, %s, round trip %v: %w", p.who, kind(warm), rtt, err)
						}
						at := float64(rtt) / float64(time.Millisecond)
						r.Add(bench.Figure{What: tunnelUp + kind(warm), Who: p.who, Unit: "s", At: at, Axis: tripAxis, Values: bench.Seconds(up)})
						r.Add(bench.Figure{What: client.what + kind(warm), Who: p.who, Unit: "s", At: at, Axis: tripAxis, Values: bench.Seconds(up + first)})
					}
					if err := p.end(ctx, false); err != nil {
						return err
					}
				}
			}
		}
		fmt.Printf("round trip %v: done\n", rtt)
	}
	return nil
}
