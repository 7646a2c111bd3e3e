//go:build linux

package main

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// repeats of each full scan.
const repeats = 5

func scans() []attack {
	nmap := func(args ...string) func(*stage) error {
		return func(s *stage) error {
			return s.tool("nmap", append([]string{"-Pn", "-n", "-sS", "--max-retries", "1", "-T5", "--min-rate", "8000"}, append(args, s.Bastion.Addr.String())...)...)
		}
	}
	return []attack{
		{"nmap, every port, ascending (-r)", false, scan(repeats, nmap("-r", "-p", "1-65535"))},
		{"nmap, every port, in the order that it draws", false, scan(repeats, nmap("-p", "1-65535"))},
		// nmap sorts what it is given; knockd's client keeps the order.
		{"knockd's knock, every port, descending", false, scan(repeats, func(s *stage) error {
			var ports []string
			for p := 65535; p > 0; p-- {
				ports = append(ports, strconv.Itoa(p))
			}
			return s.stockKnock("0", ports...)
		})},
		{"nmap, every port but the sequence's", false, scan(1, func(s *stage) error {
			return nmap("-r", "-p", "1-65535", "--exclude-ports", strings.Join(s.portList(s.ports...), ","))(s)
		})},
		{"nmap, the 1000 commonest ports, TCP and UDP", true, scan(1, nmap("-sU", "--max-retries", "0"))},
		{"the sequence's ports alone, in every order but the right one", true, wrongOrders},
	}
}

// tool runs a stock tool at the client.
func (s *stage) tool(name string, args ...string) error {
	if out, err := s.Client.Command(s.ctx, name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, out)
	}
	return nil
}

// stockKnock is knockd's client, with so many milliseconds between two ports.
func (s *stage) stockKnock(delay string, ports ...string) error {
	return s.tool("/usr/bin/knock", append([]string{"-d", delay, s.Bastion.Addr.String()}, ports...)...)
}

func (s *stage) portList(ports ...uint16) (list []string) {
	for _, p := range ports {
		list = append(list, strconv.Itoa(int(p)))
	}
	return list
}

func scan(times int, once func(*stage) error) func(*stage) (result, error) {
	return func(s *stage) (result, error) {
		if err := s.closed(); err != nil {
			return result{}, err
		}
		let := 0
		tokens, sequences, err := s.gained(func() error {
			for range times {
				if err := once(s); err != nil {
					return err
				}
				in, err := s.accepted(briefly, s.Client.Addr)
				if err != nil {
					return err
				}
				let += in
			}
			return nil
		})
		return result{times, "scans", fmt.Sprintf("%d windows; the gate took %d connections", tokens+sequences, let), tokens+sequences+let == 0}, err
	}
}

// paced is a delay that stays below the door's pace, beyond which knocks do not count.
const paced = "60"

// wrongOrders tries them all, and then the right one, which must open: else the others prove nothing.
func wrongOrders(s *stage) (result, error) {
	orders := 0
	tokens, sequences, err := s.gained(func() error {
		for _, order := range permutations(s.ports) {
			if slices.Equal(order, s.ports) {
				continue
			}
			orders++
			// The end of one and the beginning of the next could be the right order: a stray packet parts them.
			if err := s.stockKnock(paced, s.portList(append(order, 4242)...)...); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return result{}, err
	}
	_, right, err := s.gained(func() error { return s.stockKnock(paced, s.portList(s.ports...)...) })
	return result{orders, "orders", fmt.Sprintf("%d windows; the right order then opens %d", tokens+sequences, right), tokens+sequences == 0 && right == 1}, err
}

func permutations(list []uint16) (all [][]uint16) {
	if len(list) == 0 {
		return [][]uint16{nil}
	}
	for i, first := range list {
		rest := slices.Concat(list[:i], list[i+1:])
		for _, p := range permutations(rest) {
			all = append(all, append([]uint16{first}, p...))
		}
	}
	return all
}
