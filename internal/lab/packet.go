//go:build linux

package lab

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"
)

const ipv4Header = 20 // bytes, without options

// Datagram4 is a UDP datagram in an IPv4 packet, whole, as a raw socket sends it. Addresses are IPv4.
func Datagram4(from, to netip.AddrPort, payload []byte) []byte {
	p := packet4(unix.IPPROTO_UDP, from, to, 8+len(payload))
	udp := p[ipv4Header:]
	binary.BigEndian.PutUint16(udp[4:], uint16(len(udp)))
	copy(udp[8:], payload)
	seal4(p)
	return p
}

// SYN4 is a TCP SYN in an IPv4 packet, whole, as a raw socket sends it. Addresses are IPv4.
func SYN4(from, to netip.AddrPort) []byte {
	p := packet4(unix.IPPROTO_TCP, from, to, 24)
	tcp := p[ipv4Header:]
	copy(tcp[12:], []byte{
		6 << 4, synFlag, 0xfa, 0xf0, // header in words, flags, window
		0, 0, 0, 0, // checksum, urgent pointer
		2, 4, 0x05, 0xb4, // the largest segment: 1460 (RFC 9293, 3.7.1)
	})
	seal4(p)
	return p
}

const (
	synFlag = 0x02
	ackFlag = 0x10
)

func packet4(proto byte, from, to netip.AddrPort, length int) []byte {
	p := make([]byte, ipv4Header+length)
	source, destination := from.Addr().As4(), to.Addr().As4()
	copy(p, []byte{0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, proto}) // version and words; do not fragment; hops
	binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
	copy(p[12:], source[:])
	copy(p[16:], destination[:])
	binary.BigEndian.PutUint16(p[ipv4Header:], from.Port())
	binary.BigEndian.PutUint16(p[ipv4Header+2:], to.Port())
	return p
}

// seal4 writes the checksum of the datagram or segment, whose field is zero or holds an old one (RFC 768, RFC 9293). The
// kernel writes that of the IP header.
func seal4(p []byte) {
	body, at := p[ipv4Header:], 16
	if p[9] == unix.IPPROTO_UDP {
		at = 6
	}
	body[at], body[at+1] = 0, 0
	sum := uint32(p[9]) + uint32(len(body))
	for i := 12; i < ipv4Header; i += 2 { // the addresses, which the pseudo header repeats
		sum += uint32(p[i])<<8 | uint32(p[i+1])
	}
	for i := 0; i+1 < len(body); i += 2 {
		sum += uint32(body[i])<<8 | uint32(body[i+1])
	}
	if len(body)%2 == 1 {
		sum += uint32(body[len(body)-1]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	if sum == 0xffff { // all ones stand for zero, which means none
		sum = 0
	}
	binary.BigEndian.PutUint16(body[at:], ^uint16(sum))
}
