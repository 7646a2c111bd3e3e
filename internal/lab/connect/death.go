//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"perimeterd/internal/lab"
	"perimeterd/internal/lab/bench"
)

// isUDP tells what goes to the tunnel's port by UDP, or comes from it.
func isUDP(p lab.Packet) bool {
	b := p.Data
	return len(b) >= 28 && b[0] == 0x45 && b[9] == unix.IPPROTO_UDP && (binary.BigEndian.Uint16(b[20:]) == 1194 || binary.BigEndian.Uint16(b[22:]) == 1194)
}

// pauses notes the longest time without a byte.
type pauses struct {
	mu      sync.Mutex
	last    time.Time
	longest time.Duration
	got     int64
}

func (p *pauses) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if !p.last.IsZero() {
		p.longest = max(p.longest, now.Sub(p.last))
	}
	p.last = now
	p.got += int64(len(b))
	return len(b), nil
}

func (p *pauses) take() (longest time.Duration, got int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	longest, p.longest = p.longest, 0
	return longest, p.got
}

// deaths is how long an unpaced download stands still when UDP dies under it, and when it comes back.
func (r *report) deaths(ctx context.Context) error {
	s, err := open(ctx, lab.Options{Delay: 25 * time.Millisecond})
	if err != nil {
		return err
	}
	defer s.Close()
	if _, err := s.up(ctx); err != nil {
		return err
	}
	p := &pauses{}
	var complaint bytes.Buffer
	c := s.curl(ctx, ourProxy, "--max-time", "300", fmt.Sprintf("https://%s/bytes/%d", cloudName, int64(1)<<40))
	c.Stdout, c.Stderr = p, &complaint
	if err := c.Start(); err != nil {
		return err
	}
	ended := make(chan struct{})
	go func() { c.Wait(); close(ended) }()
	defer func() { c.Process.Kill(); <-ended }()
	wait := func(d time.Duration) error {
		select {
		case <-time.After(d):
			return nil
		case <-ended:
			return fmt.Errorf("the download broke off: %s", complaint.String())
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	by := func(transport string) error {
		for {
			st, err := s.status(ctx)
			if err != nil || st.Transport == transport {
				return err
			}
			if err := wait(50 * time.Millisecond); err != nil {
				return err
			}
		}
	}
	var dead, back []time.Duration
	var speeds [2][]float64
	for range 5 {
		if err := wait(2 * time.Second); err != nil {
			return err
		}
		for i, blocked := range []bool{true, false} {
			p.take()
			if blocked {
				s.Link.SetLoss(isUDP)
			} else {
				s.Link.SetLoss(nil)
			}
			if err := by([]string{"tls", "udp"}[i]); err != nil {
				return err
			}
			if err := wait(time.Second); err != nil {
				return err
			}
			pause, got := p.take()
			if err := wait(time.Second); err != nil {
				return err
			}
			_, more := p.take()
			speeds[i] = append(speeds[i], float64(more-got))
			if blocked {
				dead = append(dead, pause)
			} else {
				back = append(back, pause)
			}
		}
	}
	r.Add(bench.Figure{What: "download stands still when UDP dies", Who: "perimeterd", Unit: "s", Values: bench.Seconds(dead...)})
	r.Add(bench.Figure{What: "download stands still when UDP comes back", Who: "perimeterd", Unit: "s", Values: bench.Seconds(back...)})
	r.Add(bench.Figure{What: "download at 50 ms", Who: "perimeterd by TLS", Unit: "B/s", Values: speeds[0]})
	r.Add(bench.Figure{What: "download at 50 ms", Who: "perimeterd by UDP, just come back", Unit: "B/s", Values: speeds[1]})
	r.row("UDP dies under a download, round trip 50 ms", "it stands still: %s (5 times)", bench.Spread(dead))
	r.row("UDP comes back", "it stands still: %s", bench.Spread(back))
	return nil
}
