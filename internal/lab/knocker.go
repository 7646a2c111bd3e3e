//go:build linux

package lab

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"
)

// CrowdSize is how many addresses Crowd gives.
const CrowdSize = 1 << 15

// Crowd gives the client all addresses of 198.18.128.0/17 at once, by a route, and has the hosts (the bastion among them, if
// given) answer them by way of the client, so that they need not ask who has which. The function gives the addresses in turn.
func (l *Lab) Crowd(ctx context.Context, hosts ...*Namespace) (next func() netip.Addr, err error) {
	if err := l.Client.ip(ctx, "route replace local 198.18.128.0/17 dev lo"); err != nil {
		return nil, err
	}
	for _, h := range hosts {
		if err := h.ip(ctx, "route replace 198.18.128.0/17 via 198.18.1.2"); err != nil {
			return nil, err
		}
	}
	var mu sync.Mutex
	n := 0
	return func() netip.Addr {
		mu.Lock()
		defer mu.Unlock()
		n = (n + 1) % CrowdSize
		return netip.AddrFrom4([4]byte{198, 18, 128 | byte(n>>8), byte(n)})
	}, nil
}

// Knock is what someone sends to have a door opened: whole IPv4 packets, with a pause between two.
type Knock struct {
	Packets [][]byte
	Gap     time.Duration
}

// Knocker sends knocks and SYNs that it makes itself, from any address of a Crowd, and sees which SYNs are answered; so it knows
// when each left. The kernel resets what is answered, since no socket of its own has asked.
type Knocker struct {
	ns       *Namespace
	out      net.PacketConn
	in       *ipv4.RawConn
	received sync.WaitGroup

	opens atomic.Uint32 // how many Opens there were: the sequence number of the SYNs of each

	mu      sync.Mutex
	expects map[netip.Addr]expectation // by the source of the SYNs
}

// expectation is what somebody waits for: answers to SYNs of one sequence number. Others are late, of what was sent before.
type expectation struct {
	seq      uint32
	answered chan<- uint16 // the ports
}

// NewKnocker makes one at the client.
func (l *Lab) NewKnocker() (*Knocker, error) {
	k := &Knocker{ns: l.Client, expects: map[netip.Addr]expectation{}}
	var err error
	// Of protocol 255 (IPPROTO_RAW) whatever is written holds its own IP header; raw(7).
	if k.out, err = l.Client.ListenPacket("ip4:255", "0.0.0.0"); err != nil {
		return nil, err
	}
	in, err := l.Client.ListenPacket("ip4:tcp", "0.0.0.0")
	if err == nil {
		k.in, err = ipv4.NewRawConn(in)
	}
	if err != nil {
		return nil, errors.Join(err, k.out.Close())
	}
	k.received.Go(k.receive)
	return k, nil
}

// Close ends it.
func (k *Knocker) Close() error {
	err := errors.Join(k.out.Close(), k.in.Close())
	k.received.Wait()
	return err
}

func (k *Knocker) receive() {
	buf := make([]byte, 256)
	for {
		h, tcp, _, err := k.in.ReadFrom(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil || len(tcp) < 14 || tcp[13]&(synFlag|ackFlag) != synFlag|ackFlag {
			continue
		}
		to, _ := netip.AddrFromSlice(h.Dst.To4())
		k.mu.Lock()
		e := k.expects[to]
		k.mu.Unlock()
		if binary.BigEndian.Uint32(tcp[8:]) != e.seq+1 {
			continue
		}
		select {
		case e.answered <- uint16(tcp[2])<<8 | uint16(tcp[3]):
		default: // nobody asked, or he knows enough
		}
	}
}

// Expect gives the source ports of SYNs of sequence number seq from an address that are answered, until forget is called.
func (k *Knocker) Expect(source netip.Addr, seq uint32) (answered <-chan uint16, forget func()) {
	c := make(chan uint16, 64)
	k.mu.Lock()
	k.expects[source] = expectation{seq, c}
	k.mu.Unlock()
	return c, func() {
		k.mu.Lock()
		delete(k.expects, source)
		k.mu.Unlock()
	}
}

// Send sends a whole IPv4 packet to addr.
func (k *Knocker) Send(packet []byte, addr netip.Addr) error {
	_, err := k.out.WriteTo(packet, &net.IPAddr{IP: addr.AsSlice()})
	return err
}

// Opening is what came of a knock.
type Opening struct {
	Opened bool
	After  time.Duration // from the system call that sent the last packet of the knock to the one that sent the first SYN that was answered
	SYNs   int           // how many had been sent by then, that one included
}

// firstPort is the source port of the first SYN after a knock; the one before the knock comes from the port below it.
const firstPort = 10000

// ErrOpenBefore is returned when the door answered before the knock.
var ErrOpenBefore = errors.New("the door was open before the knock")

// Open knocks from source and sends SYNs to the port behind the door, the first right behind the knock, then one each pace, until
// one is answered or patience ends. A SYN before the knock proves that the door was closed.
func (k *Knocker) Open(ctx context.Context, source netip.Addr, behind netip.AddrPort, knock Knock, pace, patience time.Duration) (o Opening, err error) {
	if len(knock.Packets) == 0 || pace <= 0 || patience/pace > 50000 {
		return o, fmt.Errorf("knock of %d packets, a SYN each %v for %v: want a packet, a pace, and at most 50000 SYNs", len(knock.Packets), pace, patience)
	}
	seq := k.opens.Add(1)
	answered, forget := k.Expect(source, seq)
	defer forget()
	syn := func(port uint16) error {
		p := SYN4(netip.AddrPortFrom(source, port), behind)
		binary.BigEndian.PutUint32(p[ipv4Header+4:], seq)
		seal4(p)
		return k.Send(p, behind.Addr())
	}
	// A thread of its own, whose sleeps may be made exact without leaving a trace.
	err = k.ns.Do(func() error {
		if err := unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0); err != nil {
			return fmt.Errorf("timer slack: %w", err)
		}
		if err := syn(firstPort - 1); err != nil {
			return err
		}
		sleepUntil(time.Now().Add(max(knock.Gap, time.Millisecond)))
		var last time.Time
		for i, p := range knock.Packets {
			if i > 0 {
				sleepUntil(last.Add(knock.Gap))
			}
			last = time.Now()
			if err := k.Send(p, behind.Addr()); err != nil {
				return err
			}
		}
		var sent []time.Time
		first := func(port uint16) error {
			if port < firstPort {
				return ErrOpenBefore
			}
			if after := sent[port-firstPort].Sub(last); !o.Opened || after < o.After {
				o = Opening{true, after, int(port-firstPort) + 1}
			}
			return nil
		}
		for ctx.Err() == nil && time.Since(last) < patience {
			sent = append(sent, time.Now())
			if err := syn(firstPort + uint16(len(sent)-1)); err != nil {
				return err
			}
			next := sent[len(sent)-1].Add(pace)
			select {
			case port := <-answered:
				// The answer to an earlier one may be on its way.
				sleepUntil(time.Now().Add(2 * time.Millisecond))
				for err := first(port); ; err = first(<-answered) {
					if err != nil || len(answered) == 0 {
						return err
					}
				}
			default:
				sleepUntil(next)
			}
		}
		return ctx.Err()
	})
	return o, err
}

// sleepUntil sleeps on the calling thread, whose timer slack says how exactly.
func sleepUntil(t time.Time) {
	for left := time.Until(t); left > 0; left = time.Until(t) {
		ts := unix.NsecToTimespec(int64(left))
		unix.Nanosleep(&ts, nil) // a signal cuts it short, and it goes on
	}
}
