//go:build linux

package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"perimeterd/internal/lab"
)

// flood is packets from spoofed sources while friends knock.
type flood struct {
	name   string
	quick  bool
	rate   int // packets a second; 0: as fast as one thread can
	lead   int // packets before the first friend knocks
	packet func(s *stage) func(i int) []byte
	sets   []string // whose fill is told
	// Accepted: sequences are kept out, of which some are tried. Meanwhile is what the attacker sends between two of their
	// knocks; nil: nothing.
	sequences bool
	meanwhile func(s *stage, from netip.Addr) error
}

// most is how many packets a flood may send in all.
const most = 2_000_000

func floods() (list []attack) {
	for _, f := range []flood{
		{name: "resets in the knockers' names", quick: true, rate: 2000, lead: 500, sets: []string{"open4", "spent"}, packet: func(s *stage) func(int) []byte {
			return func(i int) []byte {
				from := netip.AddrPortFrom(s.friends[i%len(s.friends)].addr, uint16(32768+rand.IntN(28232))) // where Linux takes ports from
				port := uint16(gatePort)
				if i%8 == 7 {
					port = s.ports[rand.IntN(len(s.ports))]
				}
				return lab.Segment4(from, s.to(port), lab.RST, rand.Uint32(), 0)
			}
		}},
		{name: "tokens that are guesses", quick: true, lead: 100_000, sets: []string{"open4", "spent", "tokens"}, packet: func(s *stage) func(int) []byte {
			return func(i int) []byte {
				payload := make([]byte, 16)
				binary.BigEndian.PutUint64(payload, rand.Uint64())
				binary.BigEndian.PutUint64(payload[8:], rand.Uint64())
				return lab.Datagram4(spoofed(i), s.to(gatePort), payload)
			}
		}},
		{name: "connections and handshakes to the gate", quick: true, lead: 100_000, sets: []string{"open4", "peer4", "admitted"}, packet: func(s *stage) func(int) []byte {
			initiation := append([]byte{1}, make([]byte, 147)...)
			return func(i int) []byte {
				if i%2 == 0 {
					return lab.SYN4(spoofed(i), s.to(gatePort))
				}
				return lab.Datagram4(spoofed(i), s.to(gatePort), initiation)
			}
		}},
		{name: "sources and destinations of the tunnel's network", lead: 100_000, sets: []string{"open4", "admitted", "service"}, packet: func(s *stage) func(int) []byte {
			inside := netip.MustParseAddr("10.77.0.1")
			return func(i int) []byte {
				if i%2 == 0 {
					return lab.SYN4(spoofed(i), netip.AddrPortFrom(inside, 3128))
				}
				return lab.SYN4(netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 77, byte(i >> 8), byte(i)}), 1024), netip.AddrPortFrom(s.Bastion.Addr, gatePort))
			}
		}},
		{name: "the first knock of the sequence, from ever other sources", quick: true, lead: 150_000, sets: []string{"progress4", "pace4", "open4"}, sequences: true,
			packet: func(s *stage) func(int) []byte {
				return func(i int) []byte { return lab.SYN4(spoofed(i), s.to(s.ports[0])) }
			}},
		{name: "the whole sequence, from ever other sources", lead: 300_000, sets: []string{"seq4", "progress4", "open4"}, sequences: true,
			packet: func(s *stage) func(int) []byte {
				return func(i int) []byte {
					return lab.SYN4(spoofed(i/len(s.ports)), s.to(s.ports[i%len(s.ports)]))
				}
			}},
		{name: "other packets in the names of those who knock", rate: 2000, lead: 500, sets: []string{"progress4", "open4"}, sequences: true,
			packet: func(s *stage) func(int) []byte {
				return func(i int) []byte {
					from := netip.AddrPortFrom(s.friends[i%len(s.friends)].addr, uint16(1024+rand.IntN(60000)))
					return lab.SYN4(from, s.to(uint16(2000+rand.IntN(60000))))
				}
			},
			meanwhile: func(s *stage, from netip.Addr) error {
				return s.spoofer.Send(lab.SYN4(netip.AddrPortFrom(from, 1024), s.to(4242)))
			}},
		{name: "every port, TCP and UDP, from ever other sources", lead: 200_000, sets: []string{"progress4", "pace4", "open4"}, packet: func(s *stage) func(int) []byte {
			return func(i int) []byte {
				port := uint16(1 + rand.IntN(65535))
				if i%2 == 0 {
					return lab.SYN4(spoofed(i), s.to(port))
				}
				return lab.Datagram4(spoofed(i), s.to(port), []byte("flood"))
			}
		}},
	} {
		list = append(list, attack{"flood: " + f.name, f.quick, f.run})
	}
	return append(list, attack{"flood: unreplied datagrams, until the kernel tracks no more", false, fillTracking})
}

// spoofed is the ith source of some four million, of 100.64.0.0/10.
func spoofed(i int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{100, 64 | byte(i>>16)&63, byte(i >> 8), byte(i)}), 40000)
}

func (f flood) run(s *stage) (result, error) {
	if f.sequences { // or what an earlier flood left would deny them
		if err := s.empty("progress4", "pace4"); err != nil {
			return result{}, err
		}
	}
	r, err := s.under(f.rate, f.lead, f.sets, f.packet(s), func() (string, error) {
		if !f.sequences {
			return "", nil
		}
		const n = 5
		in, err := s.sequenceKnocks(n, func(from netip.Addr) error {
			if f.meanwhile == nil {
				return nil
			}
			return f.meanwhile(s, from)
		})
		return fmt.Sprintf("; sequences: %d of %d got in (accepted: spoofed packets can deny them)", in, n), err
	})
	return r, err
}

// under has friends knock while a flood goes on. What is tried besides comes behind them.
func (s *stage) under(rate, lead int, sets []string, packet func(i int) []byte, besides func() (string, error)) (result, error) {
	if err := s.closed(); err != nil {
		return result{}, err
	}
	before, err := s.fill()
	if err != nil {
		return result{}, err
	}
	ctx, cancel := context.WithCancel(s.ctx)
	defer cancel()
	var count atomic.Int64
	type ended struct {
		sent int
		err  error
	}
	done := make(chan ended, 1)
	start := time.Now()
	flooder, err := s.NewSpoofer(s.attacker)
	if err != nil {
		return result{}, err
	}
	defer flooder.Close()
	go func() {
		sent, err := flooder.Flood(ctx, rate, most, func(i int) []byte { count.Store(int64(i)); return packet(i) })
		done <- ended{sent, err}
	}()
	for count.Load() < int64(lead) && ctx.Err() == nil {
		select {
		case e := <-done:
			return result{}, fmt.Errorf("the flood ended after %d packets: %w", e.sent, e.err)
		case <-time.After(10 * time.Millisecond):
		}
	}
	in, why := s.knocks()
	after, err := s.fill()
	if err != nil {
		return result{}, err
	}
	text, err := besides()
	if err != nil {
		return result{}, err
	}
	over := count.Load() >= most-1
	cancel()
	e := <-done
	took := time.Since(start)
	if e.err != nil {
		return result{}, e.err
	}
	if over {
		text += fmt.Sprintf(" [the flood was over before its end: %d packets]", most)
	}
	var fills []string
	for _, set := range sets {
		fills = append(fills, fmt.Sprintf("%s %d→%d", set, before[set], after[set]))
	}
	return result{e.sent, "packets", fmt.Sprintf("tokens: %d of %d got in at %.0f packets/s; %s%s%s", in, len(s.friends),
		float64(e.sent)/took.Seconds(), strings.Join(fills, ", "), text, why), in == len(s.friends) && !over}, nil
}

// fillTracking makes the kernel track as many connections as it can.
func fillTracking(s *stage) (result, error) {
	read := func(name string) (int, error) {
		var text []byte
		err := s.Bastion.Do(func() (err error) {
			text, err = os.ReadFile("/proc/sys/net/netfilter/" + name)
			return err
		})
		if err != nil {
			return 0, err
		}
		return strconv.Atoi(strings.TrimSpace(string(text)))
	}
	limit, err := read("nf_conntrack_max")
	if err != nil {
		return result{}, err
	}
	deaf, err := s.Bastion.ListenPacket("udp", ":5353")
	if err != nil {
		return result{}, err
	}
	defer deaf.Close()
	var tracked int
	r, err := s.under(0, limit, []string{"open4"}, func(i int) []byte {
		return lab.Datagram4(spoofed(i), s.to(5353), []byte("unreplied"))
	}, func() (string, error) {
		tracked, err = read("nf_conntrack_count")
		return fmt.Sprintf("; %d of %d connections tracked", tracked, limit), err
	})
	r.held = r.held && tracked >= limit*9/10
	return r, err
}
