//go:build linux

package lab

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"time"

	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"
)

// Garbage is a kind of packet of a flood: a SYN, or a datagram with random bytes.
type Garbage struct {
	Proto  uint8  // unix.IPPROTO_TCP or unix.IPPROTO_UDP
	Port   uint16 // 0: a random one in each packet
	Length int    // of a datagram's payload, bytes
	Base64 bool   // the payload is of its letters
}

// Flood sends garbage to one host from spoofed sources: random ones of 198.18.0.0/15 which no host of a lab has and which
// are not of its Crowd.
type Flood struct {
	To    netip.Addr
	Kinds []Garbage     // in turn
	Max   int           // packets in all
	For   time.Duration // at most

	sent int
	took time.Duration
}

// floodBatch is how many packets one system call sends (sendmmsg).
const floodBatch = 64

// Run floods from inside ns, as fast as one thread can, until ctx ends, Max packets are sent or For is over: all three
// are nil. On a cable of veth that thread also carries each packet through the bridge and the firewall at its end.
func (f *Flood) Run(ctx context.Context, ns *Namespace) error {
	if len(f.Kinds) == 0 || f.Max < 1 || f.For <= 0 || !f.To.Is4() {
		return fmt.Errorf("flood of %d kinds, %d packets, for %v, to %v: each must be given", len(f.Kinds), f.Max, f.For, f.To)
	}
	raw, err := ns.ListenPacket("ip4:255", "0.0.0.0") // packets with their own IP header; raw(7)
	if err != nil {
		return err
	}
	defer raw.Close()
	out := ipv4.NewPacketConn(raw)
	random := rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64()))
	batch := make([]ipv4.Message, floodBatch)
	start := time.Now()
	defer func() { f.took = time.Since(start) }()
	for ctx.Err() == nil && f.sent < f.Max && time.Since(start) < f.For {
		n := min(len(batch), f.Max-f.sent)
		for i := range n {
			k := f.Kinds[(f.sent+i)%len(f.Kinds)]
			batch[i] = ipv4.Message{Buffers: [][]byte{k.packet(random, f.To)}, Addr: &net.IPAddr{IP: f.To.AsSlice()}}
		}
		for rest := batch[:n]; len(rest) > 0; {
			n, err := out.WriteBatch(rest, 0)
			if err != nil && !errors.Is(err, unix.ENOBUFS) { // a full queue is what a flood meets
				return fmt.Errorf("flood: %w", err)
			}
			f.sent += n
			rest = rest[max(n, 1):]
		}
	}
	return nil
}

// Sent is what the flood sent, and in which time, once Run has returned.
func (f *Flood) Sent() (packets int, took time.Duration) { return f.sent, f.took }

const base64Letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

func (g Garbage) packet(random *rand.Rand, to netip.Addr) []byte {
	from := netip.AddrPortFrom(spoofed(random), uint16(1024+random.IntN(64512)))
	port := g.Port
	if port == 0 {
		port = uint16(1 + random.IntN(65535))
	}
	if g.Proto == unix.IPPROTO_TCP {
		return SYN4(from, netip.AddrPortFrom(to, port))
	}
	payload := make([]byte, g.Length+8)
	for i := 0; i < g.Length; i += 8 {
		binary.LittleEndian.PutUint64(payload[i:], random.Uint64())
	}
	payload = payload[:g.Length]
	if g.Base64 {
		for i, b := range payload {
			payload[i] = base64Letters[b%64]
		}
	}
	return Datagram4(from, netip.AddrPortFrom(to, port), payload)
}

// spoofed is an address of 198.18.2.0-198.18.127.255 or 198.19.2.0-198.19.255.255.
func spoofed(random *rand.Rand) netip.Addr {
	n := random.IntN(126<<8 + 254<<8)
	if n < 126<<8 {
		return netip.AddrFrom4([4]byte{198, 18, byte(n>>8) + 2, byte(n)})
	}
	n -= 126 << 8
	return netip.AddrFrom4([4]byte{198, 19, byte(n>>8) + 2, byte(n)})
}
