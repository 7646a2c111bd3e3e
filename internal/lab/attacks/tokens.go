//go:build linux

package main

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"perimeterd/internal/lab"
	"perimeterd/knock"
)

func tokens() []attack {
	return []attack{
		{"a token sent again, from its own source and from another", true, replay},
		{"a token with one bit flipped, each of the 128", true, bitFlips},
		{"payloads of another length that begin with a token", true, lengths},
		{"a token with a bad UDP checksum", true, odd(func(_ *stage, p []byte) [][]byte { p[26] ^= 0x55; return [][]byte{p} })},
		{"a token under a bad IP checksum", true, odd(func(_ *stage, p []byte) [][]byte { p[10], p[11] = 0x12, 0x34; return [][]byte{p} })},
		{"a token to broadcast", true, odd(to("198.18.1.255", "255.255.255.255"))},
		{"a token to multicast", true, odd(to("224.0.0.1", "239.1.2.3"))},
		{"a token in a fragment that stays alone", true, odd(func(_ *stage, p []byte) [][]byte {
			first, last := append([]byte(nil), p...), append([]byte(nil), p...)
			first[6] = 0x20 // more fragments
			last[6], last[7] = 0, 1
			return [][]byte{first, last}
		})},
		{"a token by UDP-Lite", true, odd(func(_ *stage, p []byte) [][]byte {
			p[9] = unix.IPPROTO_UDPLITE // the kernel judges its checksum as UDP's
			return [][]byte{p}
		})},
		{"a token by TCP, behind a SYN and behind an ACK", true, odd(func(s *stage, p []byte) [][]byte {
			from, payload := netip.AddrFrom4([4]byte(p[12:])), p[28:]
			var list [][]byte
			for _, flags := range []byte{0x02, 0x10} {
				seg := lab.Segment4(s.from(from), s.to(gatePort), flags, 1, 1)
				list = append(list, append(seg, payload...))
			}
			return list
		})},
	}
}

func replay(s *stage) (result, error) {
	const n = 20
	var sent []knock.Token
	var own, others []netip.Addr
	first, _, err := s.gained(func() error {
		for range n {
			t, err := s.crowd.Next(s.ctx)
			if err != nil {
				return err
			}
			sent, own, others = append(sent, t), append(own, s.walker()), append(others, s.walker())
			if err := s.datagram(own[len(own)-1], t[:]); err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil {
		err = s.closed()
	}
	if err != nil {
		return result{}, err
	}
	var let int
	again, _, err := s.gained(func() (err error) {
		for i, t := range sent {
			if err := errors.Join(s.datagram(own[i], t[:]), s.datagram(others[i], t[:])); err != nil {
				return err
			}
		}
		let, err = s.accepted(briefly, slices.Concat(own, others)...)
		return err
	})
	return result{2 * n, "replays", fmt.Sprintf("%d windows; the gate took %d connections (the first time %d opened)", again, let, first), again+let == 0 && first == n}, err
}

// misses sends what must open nothing, and then the token itself, which must: it was not spent.
func (s *stage) misses(n int, of string, miss func(t knock.Token, i int) error) (result, error) {
	t, err := s.crowd.Next(s.ctx)
	if err != nil {
		return result{}, err
	}
	gained, _, err := s.gained(func() error {
		for i := range n {
			if err := miss(t, i); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return result{}, err
	}
	good, _, err := s.gained(func() error { return s.datagram(s.walker(), t[:]) })
	return result{n, of, fmt.Sprintf("%d windows; the token itself then opens %d", gained, good), gained == 0 && good == 1}, err
}

func bitFlips(s *stage) (result, error) {
	return s.misses(8*knock.TokenSize, "tokens", func(t knock.Token, i int) error {
		t[i/8] ^= 1 << (i % 8)
		return s.datagram(s.walker(), t[:])
	})
}

func lengths(s *stage) (result, error) {
	lengths := []int{15, 17}
	for n := range 64 {
		if n != knock.TokenSize {
			lengths = append(lengths, n)
		}
	}
	lengths = append(lengths, 148, 1200, 1472)
	return s.misses(len(lengths), "payloads", func(t knock.Token, i int) error {
		payload := make([]byte, lengths[i])
		copy(payload, t[:])
		return s.datagram(s.walker(), payload)
	})
}

// odd sends tokens in packets that are changed.
func odd(change func(s *stage, p []byte) [][]byte) func(*stage) (result, error) {
	return func(s *stage) (result, error) {
		return s.misses(5, "tokens", func(t knock.Token, _ int) error {
			p := lab.Datagram4(s.from(s.walker()), s.to(gatePort), t[:])
			for _, p := range change(s, p) {
				if err := s.honest.Send(p); err != nil {
					return err
				}
			}
			return nil
		})
	}
}

// to sends to other addresses. The UDP checksum stays right: it is left out (RFC 768).
func to(addrs ...string) func(*stage, []byte) [][]byte {
	return func(_ *stage, p []byte) (list [][]byte) {
		for _, a := range addrs {
			q := append([]byte(nil), p...)
			d := netip.MustParseAddr(a).As4()
			copy(q[16:], d[:])
			q[26], q[27] = 0, 0
			list = append(list, q)
		}
		return list
	}
}
