package firewall

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"perimeterd/knock"
)

// testTUN is a device whose other end is this program: what is written to it comes in from outside.
type testTUN struct{ fd int }

// vnetHeader is what IFF_VNET_HDR puts before each packet (linux/virtio_net.h: struct virtio_net_hdr). Zeros say that
// nothing is left to do for the kernel.
const vnetHeader = 10

func openTestTUN(name string) (*testTUN, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("/dev/net/tun: %w", err)
	}
	r, err := unix.NewIfreq(name)
	if err == nil {
		r.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, r)
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("make a TUN device with offload headers: %w", err)
	}
	return &testTUN{fd}, nil
}

func (t *testTUN) send(packet []byte) error {
	if _, err := unix.Write(t.fd, append(make([]byte, vnetHeader), packet...)); err != nil {
		return fmt.Errorf("write a packet to the TUN device: %w", err)
	}
	return nil
}

// receive waits for the next IPv4 TCP segment that the host sends out.
func (t *testTUN) receive(deadline time.Time) (s segment, ok bool) {
	buf := make([]byte, 4096)
	for {
		n, err := unix.Read(t.fd, buf)
		if err == nil {
			if s, ok := parseSegment(buf[min(n, vnetHeader):n]); ok {
				return s, true
			}
			continue
		}
		left := time.Until(deadline)
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) || left <= 0 {
			return s, false
		}
		unix.Poll([]unix.PollFd{{Fd: int32(t.fd), Events: unix.POLLIN}}, int(left.Milliseconds())+1)
	}
}

// answers sends a SYN and tells whether a SYN-ACK comes. So as not to wait for what does not come, a second SYN goes to a
// port where nobody listens: its reset comes after an answer to the first.
func (t *testTUN) answers(p *tcpPeer) bool {
	p.source = 43000 + uint16(p.from.As4()[3])
	p.seq = 1000
	const closed = 9 // discard
	if t.send(tcpPacket(p.from, p.to, p.source, p.port, p.seq, 0, flagSYN, nil)) != nil ||
		t.send(tcpPacket(p.from, p.to, p.source, closed, p.seq, 0, flagSYN, nil)) != nil {
		return false
	}
	p.seq++
	for deadline := time.Now().Add(patience); ; {
		s, ok := t.receive(deadline)
		switch {
		case !ok || s.from == closed && s.to == p.source:
			return false
		case s.from == p.port && s.to == p.source && s.flags&(flagSYN|flagACK) == flagSYN|flagACK:
			p.ack = s.seq + 1
			return true
		}
	}
}

// tcpPeer is the outside end of a connection.
type tcpPeer struct {
	tun          *testTUN
	from, to     netip.Addr
	source, port uint16
	seq, ack     uint32
}

func (p *tcpPeer) establish() error {
	return p.tun.send(tcpPacket(p.from, p.to, p.source, p.port, p.seq, p.ack, flagACK, nil))
}

func (p *tcpPeer) data(text string) error {
	return p.tun.send(tcpPacket(p.from, p.to, p.source, p.port, p.seq, p.ack, flagACK|flagPSH, []byte(text)))
}

// Flags of TCP (RFC 9293, 3.1).
const (
	flagFIN = 0x01
	flagSYN = 0x02
	flagRST = 0x04
	flagPSH = 0x08
	flagACK = 0x10
)

type segment struct {
	from, to uint16
	seq      uint32
	flags    byte
}

func parseSegment(b []byte) (s segment, ok bool) {
	if len(b) < 20 || b[0]>>4 != 4 || b[9] != knock.TCP {
		return s, false
	}
	n := int(b[0]&15) * 4
	if n < 20 || len(b) < n+20 {
		return s, false
	}
	t := b[n:]
	return segment{binary.BigEndian.Uint16(t), binary.BigEndian.Uint16(t[2:]), binary.BigEndian.Uint32(t[4:]), t[13]}, true
}

func tcpPacket(from, to netip.Addr, source, port uint16, seq, ack uint32, flags byte, payload []byte) []byte {
	t := binary.BigEndian.AppendUint16(nil, source)
	t = binary.BigEndian.AppendUint16(t, port)
	t = binary.BigEndian.AppendUint32(t, seq)
	t = binary.BigEndian.AppendUint32(t, ack)
	t = append(t, 5<<4, flags, 0xff, 0xff, 0, 0, 0, 0)
	return ipPacket(from, to, knock.TCP, 16, append(t, payload...))
}

func udpPacket(from, to netip.Addr, source, port uint16, payload []byte) []byte {
	u := binary.BigEndian.AppendUint16(nil, source)
	u = binary.BigEndian.AppendUint16(u, port)
	u = binary.BigEndian.AppendUint16(u, uint16(8+len(payload)))
	return ipPacket(from, to, knock.UDP, 6, append(append(u, 0, 0), payload...))
}

// ipPacket puts a header (RFC 791, RFC 8200) before a transport segment and fills in the checksum at its offset.
func ipPacket(from, to netip.Addr, proto byte, offset int, segment []byte) []byte {
	pseudo := append(append(from.AsSlice(), to.AsSlice()...), 0, proto)
	pseudo = binary.BigEndian.AppendUint16(pseudo, uint16(len(segment)))
	binary.BigEndian.PutUint16(segment[offset:], checksum(append(pseudo, segment...)))
	if from.Is6() {
		h := []byte{0x60, 0, 0, 0}
		h = binary.BigEndian.AppendUint16(h, uint16(len(segment)))
		h = append(append(append(h, proto, 64), from.AsSlice()...), to.AsSlice()...)
		return append(h, segment...)
	}
	h := []byte{0x45, 0}
	h = binary.BigEndian.AppendUint16(h, uint16(20+len(segment)))
	h = append(h, 0, 0, 0, 0, 64, proto, 0, 0)
	h = append(append(h, from.AsSlice()...), to.AsSlice()...)
	binary.BigEndian.PutUint16(h[10:], checksum(h))
	return append(h, segment...)
}

// checksum is the Internet's (RFC 1071).
func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(b[i])<<8 | uint32(b[i+1])
	}
	if len(b)%2 == 1 {
		sum += uint32(b[len(b)-1]) << 8
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}
