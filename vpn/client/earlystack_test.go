package client

import (
	"bytes"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// datagram is an IPv4 packet with a TCP segment, its sums right, in a buffer with room behind it.
func datagram(from, to uint16, seq, ack uint32, flags header.TCPFlags, payload string) []byte {
	b := make([]byte, header.IPv4MinimumSize+header.TCPMinimumSize+len(payload), 2000)
	ip := header.IPv4(b)
	ip.Encode(&header.IPv4Fields{TotalLength: uint16(len(b)), TTL: 64, Protocol: uint8(tcp.ProtocolNumber),
		SrcAddr: tcpip.AddrFrom4([4]byte{10, 77, 0, 2}), DstAddr: tcpip.AddrFrom4([4]byte{10, 77, 0, 1})})
	t := header.TCP(b[header.IPv4MinimumSize:])
	t.Encode(&header.TCPFields{SrcPort: from, DstPort: to, SeqNum: seq, AckNum: ack, DataOffset: header.TCPMinimumSize, Flags: flags, WindowSize: 1000})
	copy(t.Payload(), payload)
	seal(ip, t)
	return b
}

func sound(packet []byte) bool {
	ip, t := segment(packet)
	payload := t.Payload()
	return ip.IsChecksumValid() && t.IsChecksumValid(ip.SourceAddress(), ip.DestinationAddress(), checksum.Checksum(payload, 0), uint16(len(payload)))
}

func TestFirstBytesRideOnceAndTheStackHearsOfTheSYNAlone(t *testing.T) {
	const seq, begin = 0xfffffffe, 0xffffffff // and on past zero
	for _, c := range []struct {
		name  string
		mtu   int
		rides string
		acked uint32
		heard uint32
		taken bool
	}{
		{"all taken", 1420, "CONNECT", 6, begin, true},
		{"part taken", 1420, "CONNECT", 3, begin, true},
		{"none taken", 1420, "CONNECT", begin, begin, false},
		{"room for four", 44, "CONN", 3, begin, true},
		{"no room", 40, "", begin, begin, false},
		{"an answer to what never left", 1420, "CONNECT", 77, 77, false},
	} {
		var o openings
		o.add(4711, []byte("CONNECT"))
		if other := datagram(4712, 3128, 1, 0, header.TCPFlagSyn, ""); o.leaves(other[:cap(other)], len(other), c.mtu) != len(other) {
			t.Errorf("%s: another connection's SYN carries something", c.name)
		}
		syn := datagram(4711, 3128, seq, 0, header.TCPFlagSyn, "")
		size := o.leaves(syn[:cap(syn)], len(syn), c.mtu)
		if got := syn[len(syn):size]; string(got) != c.rides || !sound(syn[:size]) {
			t.Errorf("%s: %q rides, sound %v", c.name, got, sound(syn[:size]))
		}
		if again := datagram(4711, 3128, seq, 0, header.TCPFlagSyn, ""); o.leaves(again[:cap(again)], len(again), c.mtu) != len(again) {
			t.Errorf("%s: it rides again", c.name)
		}
		answer := datagram(3128, 4711, 1, c.acked, header.TCPFlagSyn|header.TCPFlagAck, "")
		o.comes(answer)
		if _, got := segment(answer); got.AckNumber() != c.heard || !sound(answer) {
			t.Errorf("%s: the stack hears %#x, want %#x, sound %v", c.name, got.AckNumber(), c.heard, sound(answer))
		}
		if taken := o.remove(4711); taken != c.taken || o.busy() {
			t.Errorf("%s: taken %v, busy %v", c.name, taken, o.busy())
		}
	}
}

// FuzzOpenings: no packet harms, and of those that come only the acknowledgement changes.
func FuzzOpenings(f *testing.F) {
	f.Add(datagram(3128, 4711, 1, 8, header.TCPFlagSyn|header.TCPFlagAck, ""))
	f.Add(datagram(4711, 3128, 1, 0, header.TCPFlagSyn, "x"))
	f.Add([]byte{0x45})
	f.Fuzz(func(t *testing.T, b []byte) {
		var o openings
		p := o.add(4711, []byte("CONNECT"))
		out := append(bytes.Clone(b), make([]byte, 100)...)
		if size := o.leaves(out, len(b), 1420); size < len(b) || size > len(b)+7 || len(b) > 1420 && size != len(b) {
			t.Fatalf("%d bytes became %d", len(b), size)
		}
		p.begin, p.left = 1, 7
		in := bytes.Clone(b)
		o.comes(in)
		if bytes.Equal(in, b) {
			return
		}
		ip, s := segment(in)
		_, was := segment(b)
		if s.AckNumber() != 1 || was.AckNumber() < 2 || was.AckNumber() > 8 || !sound(in) {
			t.Fatalf("%x became %x", b, in)
		}
		for i := range b {
			inIP, inTCP := i == 10 || i == 11, i-int(ip.HeaderLength())
			if in[i] != b[i] && !inIP && (inTCP < 8 || inTCP > 11) && inTCP != 16 && inTCP != 17 {
				t.Fatalf("byte %d: %x became %x", i, b, in)
			}
		}
	})
}
