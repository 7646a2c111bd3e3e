//go:build linux

package lab

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"slices"
	"testing"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
)

// ping sends echo requests to the bastion, one after the other, and returns their round trips.
func ping(t *testing.T, l *Lab, count int) []time.Duration {
	t.Helper()
	c, err := l.Client.ListenPacket("ip4:icmp", "198.18.1.2")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var trips []time.Duration
	buf := make([]byte, 1500)
	for seq := range count {
		request, err := (&icmp.Message{Type: ipv4.ICMPTypeEcho, Body: &icmp.Echo{ID: 7, Seq: seq}}).Marshal(nil)
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(5 * time.Second))
		sent := time.Now()
		if _, err := c.WriteTo(request, &net.IPAddr{IP: net.IP(l.Bastion.Addr.AsSlice())}); err != nil {
			t.Fatal(err)
		}
		for answered := false; !answered; {
			n, _, err := c.ReadFrom(buf)
			if err != nil {
				t.Fatalf("ping %d: %v", seq, err)
			}
			m, err := icmp.ParseMessage(1, buf[:n])
			if err != nil {
				t.Fatal(err)
			}
			echo, ok := m.Body.(*icmp.Echo)
			answered = ok && m.Type == ipv4.ICMPTypeEchoReply && echo.ID == 7 && echo.Seq == seq
		}
		trips = append(trips, time.Since(sent))
	}
	slices.Sort(trips)
	return trips
}

func TestRoundTripIsTwiceTheDelay(t *testing.T) {
	l := Start(t, Options{Delay: 25 * time.Millisecond})
	trips := ping(t, l, 21)
	t.Logf("25 ms one way: round trips from %v to %v, median %v", trips[0], trips[20], trips[10])
	if trips[0] < 50*time.Millisecond {
		t.Errorf("a packet was back after %v", trips[0])
	}
	l.Link.SetDelay(0)
	trips = ping(t, l, 21)
	t.Logf("0 ms one way: round trips from %v to %v, median %v", trips[0], trips[20], trips[10])
	if trips[0] >= 50*time.Millisecond {
		t.Errorf("with the delay taken away, no packet was back before %v", trips[0])
	}
}

// stream sends count numbered datagrams from the client to the bastion, and returns the numbers that arrive until none has come
// for half a second.
func stream(t *testing.T, l *Lab, count int, before func(i int)) []int {
	t.Helper()
	in, err := l.Bastion.ListenPacket("udp", "198.18.1.1:7000")
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := l.Client.Dial(t.Context(), "udp", "198.18.1.1:7000")
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	for i := range count {
		before(i)
		if _, err := out.Write(binary.BigEndian.AppendUint32(nil, uint32(i))); err != nil {
			t.Fatal(err)
		}
	}
	var got []int
	for buf := make([]byte, 64); ; {
		in.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
		n, _, err := in.ReadFrom(buf)
		if err != nil {
			return got
		}
		if n != 4 {
			t.Fatalf("datagram of %d bytes", n)
		}
		got = append(got, int(binary.BigEndian.Uint32(buf)))
	}
}

func TestOrderStaysWhenTheDelayChanges(t *testing.T) {
	l := Start(t, Options{Delay: 100 * time.Millisecond})
	ping(t, l, 1) // as below
	delays := []time.Duration{100 * time.Millisecond, 0, 30 * time.Millisecond, 5 * time.Millisecond}
	got := stream(t, l, 200, func(i int) {
		if i%10 == 0 {
			l.Link.SetDelay(delays[i/10%len(delays)])
		}
		time.Sleep(time.Millisecond / 4)
	})
	if len(got) != 200 || !slices.IsSorted(got) {
		t.Errorf("%d of 200 arrived, in the order %v", len(got), got)
	}
}

func TestLossTakesExactlyWhatTheRuleNames(t *testing.T) {
	l := Start(t, Options{LongLink: true})
	ping(t, l, 1) // as below
	l.Link.SetLoss(EveryNth(FromClient, 4))
	got := stream(t, l, 16, func(int) {})
	if want := []int{0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14}; !slices.Equal(got, want) {
		t.Errorf("arrived: %v, want %v", got, want)
	}
	if lost, overflowed := l.Link.Drops(); lost != 4 || overflowed != 0 {
		t.Errorf("%d lost, %d overflowed", lost, overflowed)
	}
	l.Link.SetLoss(nil)
	if got := stream(t, l, 16, func(int) {}); len(got) != 16 {
		t.Errorf("without a rule, %d of 16 arrived", len(got))
	}
}

func TestFullQueueDropsItsTail(t *testing.T) {
	l := Start(t, Options{LongLink: true, QueuePackets: 10})
	ping(t, l, 1) // while the address is being resolved, the kernel itself would reorder a burst
	l.Link.SetDelay(300 * time.Millisecond)
	got := stream(t, l, 50, func(int) {})
	// Ten are queued and one is in hand.
	if len(got) < 10 || len(got) > 11 || got[9] != 9 {
		t.Errorf("arrived: %v", got)
	}
	if lost, overflowed := l.Link.Drops(); lost != 0 || overflowed != int64(50-len(got)) {
		t.Errorf("%d lost, %d overflowed, %d arrived", lost, overflowed, len(got))
	}
}

func TestTapTellsTheTimeline(t *testing.T) {
	const delay = 10 * time.Millisecond
	l := Start(t, Options{Delay: delay})
	type step struct {
		way   Direction
		flags byte
		at    time.Time
	}
	seen := make(chan step, 100)
	l.Link.OnPacket(func(p Packet) {
		if p.Data[0] == 0x45 && p.Data[9] == 6 {
			seen <- step{p.Direction, p.Data[20+13], p.At}
		}
	})
	listener, err := l.Bastion.Listen("tcp", "198.18.1.1:7000")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	c, err := l.Client.Dial(t.Context(), "tcp", "198.18.1.1:7000")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	const syn, synAck, ack = 0x02, 0x12, 0x10
	var last time.Time
	for i, want := range []step{{FromClient, syn, last}, {ToClient, synAck, last}, {FromClient, ack, last}} {
		got := <-seen
		if got.way != want.way || got.flags != want.flags {
			t.Fatalf("packet %d: %v flags %#x, want %v flags %#x", i, got.way, got.flags, want.way, want.flags)
		}
		if i > 0 && got.at.Sub(last) < delay {
			t.Errorf("packet %d followed after %v", i, got.at.Sub(last))
		}
		last = got.at
	}
}

func frame(etherType uint16, ip ...byte) []byte {
	return append(binary.BigEndian.AppendUint16(make([]byte, 12), etherType), ip...)
}

// ip6 is a header with the first two bytes of its addresses, and the first byte after it.
func ip6(next, srcHigh, srcLow, dstHigh, dstLow, payload byte) []byte {
	b := make([]byte, 41)
	b[0], b[6], b[8], b[9], b[24], b[25], b[40] = 0x60, next, srcHigh, srcLow, dstHigh, dstLow, payload
	return frame(0x86dd, b...)
}

func TestNeighbourDiscoveryIsOfTheLocalWire(t *testing.T) {
	for _, tt := range []struct {
		name  string
		frame []byte
		local bool
	}{
		{"nothing", nil, true},
		{"ARP", frame(0x0806, 0, 1), true},
		{"IPv4", frame(0x0800, 0x45), false},
		{"cut IPv6", frame(0x86dd, 0x60), true},
		{"TCP over IPv6", ip6(6, 0x20, 0x01, 0x20, 0x01, 0), false},
		{"echo over IPv6", ip6(58, 0x20, 0x01, 0x20, 0x01, 128), false},
		{"neighbour advertisement", ip6(58, 0x20, 0x01, 0x20, 0x01, 136), true},
		{"from a link-local address", ip6(6, 0xfe, 0x80, 0x20, 0x01, 0), true},
		{"to a link-local address", ip6(6, 0x20, 0x01, 0xfe, 0xbf, 0), true},
		{"to all nodes of the link", ip6(17, 0x20, 0x01, 0xff, 0x02, 0), true},
		{"to a site's multicast", ip6(17, 0x20, 0x01, 0xff, 0x05, 0), false},
	} {
		if got := ofLocalWire(tt.frame); got != tt.local {
			t.Errorf("%s: local is %v", tt.name, got)
		}
	}
}

func BenchmarkLinkWithoutDelay(b *testing.B) { benchmarkTCP(b, Options{LongLink: true}) }
func BenchmarkLink25ms(b *testing.B)         { benchmarkTCP(b, Options{Delay: 25 * time.Millisecond}) }
func BenchmarkCable(b *testing.B)            { benchmarkTCP(b, Options{}) }

// benchmarkTCP sends b.N blocks of 64 KiB from the bastion to the client.
func benchmarkTCP(b *testing.B, o Options) {
	l := Start(b, o)
	// Windows as wide as the link is long; the kernel's own would carry 0.4 Gb/s over 50 ms.
	for _, err := range []error{
		l.Client.Sysctl("net.ipv4.tcp_rmem", "4096 131072 67108864"),
		l.Bastion.Sysctl("net.ipv4.tcp_wmem", "4096 65536 67108864"),
	} {
		if err != nil {
			b.Fatal(err)
		}
	}
	listener, err := l.Bastion.Listen("tcp", "198.18.1.1:7000")
	if err != nil {
		b.Fatal(err)
	}
	defer listener.Close()
	block := make([]byte, 64<<10)
	b.SetBytes(int64(len(block)))
	b.ResetTimer()
	sent := make(chan error, 1)
	go func() {
		c, err := listener.Accept()
		if err != nil {
			sent <- fmt.Errorf("accept: %w", err)
			return
		}
		defer c.Close()
		for range b.N {
			if _, err := c.Write(block); err != nil {
				sent <- fmt.Errorf("write: %w", err)
				return
			}
		}
		sent <- nil
	}()
	c, err := l.Client.Dial(b.Context(), "tcp", "198.18.1.1:7000")
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	got, err := io.Copy(io.Discard, c)
	if err != nil || got != int64(b.N)*int64(len(block)) {
		b.Fatalf("received %d bytes of %d blocks: %v; sender: %v", got, b.N, err, <-sent)
	}
	b.StopTimer()
	if l.Link != nil {
		_, overflowed := l.Link.Drops()
		b.ReportMetric(float64(overflowed), "overflows")
	}
}
