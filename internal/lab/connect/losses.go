//go:build linux

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"perimeterd/internal/lab"
	"perimeterd/internal/lab/bench"
)

// wholeEvery is how many runs with a loss follow one without.
const wholeEvery = 3

// losses drops each packet of the exchange once, the first, the second and so on, and says what that costs over runs without
// loss in between.
func (r *report) losses(ctx context.Context, times int, only time.Duration) error {
	s, err := open(ctx, lab.Options{LongLink: true})
	if err != nil {
		return err
	}
	defer s.Close()
	trips := roundTrips
	if only >= 0 {
		trips = []time.Duration{only}
	}
	for _, rtt := range trips {
		s.Link.SetDelay(rtt / 2)
		for _, warm := range []bool{false, true} {
			var whole []time.Duration
			lost := map[string][]time.Duration{} // by the packet's name
			for range times {
				for n := 1; ; n++ {
					if n%wholeEvery == 1 {
						took, _, err := s.losing(ctx, warm, 0)
						if err != nil {
							return fmt.Errorf("%s, round trip %v: %w", kind(warm), rtt, err)
						}
						whole = append(whole, took)
					}
					took, name, err := s.losing(ctx, warm, n)
					if err != nil {
						return fmt.Errorf("%s, round trip %v, packet %d lost (%s): %w", kind(warm), rtt, n, name, err)
					}
					if name == "" {
						break
					}
					lost[name] = append(lost[name], took)
				}
			}
			r.lost(rtt, warm, whole, lost)
		}
	}
	return nil
}

// lost adds a row and the figures of what was measured.
func (r *report) lost(rtt time.Duration, warm bool, whole []time.Duration, lost map[string][]time.Duration) {
	without := bench.Quantile(whole, 0.5)
	cost := func(name string) time.Duration { return bench.Quantile(lost[name], 0.5) - without }
	names := slices.SortedFunc(maps.Keys(lost), func(a, b string) int { return cmp.Compare(cost(b), cost(a)) })
	for _, name := range names {
		r.Add(bench.Figure{What: tunnelUp + kind(warm) + ", lost " + name, Who: ours, Unit: "s", At: float64(rtt) / float64(time.Millisecond), Axis: tripAxis, Values: bench.Seconds(lost[name]...)})
		fmt.Printf("  %+7.1f ms  %s (%d)\n", float64(cost(name).Microseconds())/1000, name, len(lost[name]))
	}
	r.row(fmt.Sprintf("%s, round trip %v, each packet lost once", kind(warm), rtt), "worst %+d ms (%s); without loss %s",
		cost(names[0]).Milliseconds(), names[0], bench.Spread(whole))
}

// losing is how long `vpn up` takes with the nth packet lost, which name is of; n 0: none. No name: there was no nth packet.
func (s *stage) losing(ctx context.Context, warm bool, n int) (took time.Duration, name string, err error) {
	if err := s.next(ctx); err != nil {
		return 0, "", err
	}
	if warm {
		if _, err := s.up(ctx); err != nil {
			return 0, "", err
		}
		if err := s.keeps(ctx, ""); err != nil {
			return 0, "", err
		}
		if err := errors.Join(s.end(ctx, true), s.shut(ctx)); err != nil {
			return 0, "", err
		}
	}
	names, seen := namer{}, 0
	s.Link.SetLoss(func(p lab.Packet) bool {
		text := names.name(p)
		if seen++; seen == n {
			name = text
		}
		return seen == n
	})
	took, err = s.up(ctx)
	s.Link.SetLoss(nil)
	return took, name, errors.Join(err, s.end(ctx, false))
}

// keeps waits until the client has written its session down, which it does behind `vpn up`, and with it that it was at host, if any.
func (s *stage) keeps(ctx context.Context, host string) error {
	for {
		files, err := filepath.Glob(filepath.Join(s.alice.Home, ".config", "perimeter", "*.session"))
		if err != nil {
			return err
		}
		for _, f := range files {
			if text, err := os.ReadFile(f); err == nil && bytes.Contains(text, []byte(host)) {
				return nil
			}
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// namer tells packets of the exchange apart. It maps the client's ports to the first sequence number of each direction.
type namer map[uint16]*[2]uint32

func (names namer) name(p lab.Packet) string {
	b := p.Data
	if len(b) < 28 || b[0] != 0x45 {
		return fmt.Sprintf("%v: %d bytes", p.Direction, len(b))
	}
	switch body := b[20:]; {
	case b[9] == unix.IPPROTO_UDP:
		payload := body[8:]
		what := "datagram"
		switch {
		case len(payload) == 16:
			what = "token"
		case len(payload) == 148:
			what = "initiation"
		case len(payload) == 92 && payload[0] == 2:
			what = "response"
		case len(payload) >= 32 && payload[0] == 4:
			what = "data"
		}
		return fmt.Sprintf("%v: UDP %s of %d bytes", p.Direction, what, len(payload))
	case b[9] == unix.IPPROTO_TCP && len(body) >= 20:
		port := binary.BigEndian.Uint16(body[2*p.Direction:])
		sequence, flags := binary.BigEndian.Uint32(body[4:]), body[13]
		first := names[port]
		if first == nil {
			first = new([2]uint32)
			names[port] = first
		}
		const fin, syn, rst, ack = 1, 2, 4, 16
		text := fmt.Sprintf("%v: TCP ", p.Direction)
		if flags&syn != 0 {
			first[p.Direction] = sequence + 1
			if flags&ack != 0 {
				return text + "SYN-ACK"
			}
			return text + fmt.Sprintf("SYN %d", len(names))
		}
		at, size := sequence-first[p.Direction], int(binary.BigEndian.Uint16(b[2:]))-20-int(body[12]>>4)*4
		switch {
		case flags&rst != 0:
			return text + "RST"
		case size > 0:
			return text + fmt.Sprintf("data from %d on", (at+50)/100*100) // certificates and signatures differ by some bytes
		case flags&fin != 0:
			return text + "FIN"
		}
		return text + fmt.Sprintf("ACK at %d", (at+50)/100*100)
	}
	return fmt.Sprintf("%v: %d bytes", p.Direction, len(b))
}
