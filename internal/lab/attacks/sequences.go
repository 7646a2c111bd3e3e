//go:build linux

package main

import (
	"fmt"
	"net/netip"
	"time"

	"perimeterd/internal/lab"
)

func sequences() []attack {
	return []attack{
		{"packets to the gate between the knocks of a sequence", true, walk(true, func(s *stage, from netip.Addr, knocks int) error {
			initiation := append([]byte{1}, make([]byte, 147)...)
			for _, p := range [][]byte{
				lab.SYN4(s.from(from), s.to(gatePort)),
				lab.Datagram4(s.from(from), s.to(gatePort), initiation),
				lab.Datagram4(s.from(from), s.to(gatePort), make([]byte, 16)),
			} {
				if err := s.honest.Send(p); err != nil {
					return err
				}
			}
			return nil
		})},
		{"SYNs of a sequence sent again", true, walk(true, func(s *stage, from netip.Addr, knocks int) error {
			return s.hit(from, s.ports[:knocks]...)
		})},
		{"another packet between the knocks of a sequence", true, walk(false, func(s *stage, from netip.Addr, knocks int) error {
			if knocks%2 == 0 {
				return s.honest.Send(lab.Datagram4(s.from(from), s.to(5353), []byte("stray")))
			}
			return s.hit(from, 4242)
		})},
		{"a sequence sent at once, without a pause", true, walk(true, func(*stage, netip.Addr, int) error { return nil })},
	}
}

// walk knocks the sequence from ever other sources, with something between each two knocks, which must not matter or must.
func walk(opens bool, between func(s *stage, from netip.Addr, knocks int) error) func(*stage) (result, error) {
	return func(s *stage) (result, error) {
		const rounds = 20
		var let int
		within := briefly
		if opens {
			within = patience
		}
		_, sequences, err := s.gained(func() (err error) {
			var sources []netip.Addr
			for range rounds {
				from := s.walker()
				sources = append(sources, from)
				for i, p := range s.ports {
					if i > 0 {
						if err := between(s, from, i); err != nil {
							return err
						}
					}
					if err := s.hit(from, p); err != nil {
						return err
					}
				}
			}
			let, err = s.accepted(within, sources...)
			return err
		})
		want := 0
		if opens {
			want = rounds
		}
		return result{rounds, "sequences", fmt.Sprintf("%d opened, want %d; the gate took %d connections", sequences, want, let), sequences == want && let == want}, err
	}
}

// sequenceKnocks are what friends without a token do, from addresses of their own: it tells how many get in.
func (s *stage) sequenceKnocks(n int, meanwhile func(from netip.Addr) error) (in int, err error) {
	var sources []netip.Addr
	for range n {
		from := s.walker()
		sources = append(sources, from)
		for _, p := range s.ports {
			if err := s.hit(from, p); err != nil {
				return 0, err
			}
			if err := meanwhile(from); err != nil {
				return 0, err
			}
			time.Sleep(time.Millisecond)
		}
	}
	return s.accepted(patience, sources...)
}
