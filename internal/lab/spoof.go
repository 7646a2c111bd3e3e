//go:build linux

package lab

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// Spoofer sends whole IPv4 packets to the bastion, past the kernel of the host that they leave from (packet(7)): sources
// that are others', addresses of the wrong kind, checksums that do not hold, fragments. It is for one goroutine at a time.
type Spoofer struct {
	fd int
	to unix.SockaddrLinklayer
}

// NewSpoofer makes one at a host of the outside segment.
func (l *Lab) NewSpoofer(from *Namespace) (*Spoofer, error) {
	var bastion net.HardwareAddr
	if err := l.Bastion.Do(func() error {
		dev, err := net.InterfaceByName("outside")
		if err == nil {
			bastion = dev.HardwareAddr
		}
		return err
	}); err != nil {
		return nil, fmt.Errorf("spoofer: %w", err)
	}
	s := &Spoofer{to: unix.SockaddrLinklayer{Protocol: binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_IP)), Halen: 6}}
	copy(s.to.Addr[:], bastion)
	err := from.Do(func() error {
		dev, err := net.InterfaceByName("outside")
		if err != nil {
			return err
		}
		s.to.Ifindex = dev.Index
		// Protocol 0: it hears nothing.
		s.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("spoofer in %s: %w", from.Name, err)
	}
	return s, nil
}

// Close ends it.
func (s *Spoofer) Close() error { return unix.Close(s.fd) }

// Send sends a packet as it is, but for a header checksum of zero, which is filled in.
func (s *Spoofer) Send(packet []byte) error {
	if packet[10] == 0 && packet[11] == 0 {
		var sum uint32
		for i := 0; i < int(packet[0]&15)*4; i += 2 {
			sum += uint32(packet[i])<<8 | uint32(packet[i+1])
		}
		for sum > 0xffff {
			sum = sum>>16 + sum&0xffff
		}
		binary.BigEndian.PutUint16(packet[10:], ^uint16(sum))
	}
	for {
		err := unix.Sendto(s.fd, packet, 0, &s.to)
		if !errors.Is(err, unix.ENOBUFS) && !errors.Is(err, unix.EINTR) { // a full queue is what a flood meets
			return err
		}
	}
}

// Flood sends n packets, rate a second or, with a rate of 0, as fast as one thread can, until ctx ends. It tells how many
// it sent.
func (s *Spoofer) Flood(ctx context.Context, rate, n int, packet func(i int) []byte) (sent int, err error) {
	start := time.Now()
	for ; sent < n && ctx.Err() == nil; sent++ {
		if rate > 0 {
			if ahead := time.Duration(sent)*time.Second/time.Duration(rate) - time.Since(start); ahead > time.Millisecond {
				time.Sleep(ahead)
			}
		}
		if err := s.Send(packet(sent)); err != nil {
			return sent, fmt.Errorf("flood: %w", err)
		}
	}
	return sent, nil
}

// TCP flags (RFC 9293, 3.1).
const RST = 0x04

// Segment4 is a TCP segment without payload, like SYN4 with other flags.
func Segment4(from, to netip.AddrPort, flags byte, seq, ack uint32) []byte {
	p := SYN4(from, to)
	tcp := p[ipv4Header:]
	binary.BigEndian.PutUint32(tcp[4:], seq)
	binary.BigEndian.PutUint32(tcp[8:], ack)
	tcp[13] = flags
	seal4(p)
	return p
}
