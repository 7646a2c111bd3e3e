package client

import (
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// openings make the stack's connections begin as those of a kernel with TCP Fast Open and no cookies do (RFC 7413), which the stack
// cannot. A copy of the first bytes rides with the SYN. Where the answer acknowledges them, the stack hears of the SYN alone: it
// sends the bytes once more, as if they had not left, and the other end drops them as it does any that come again. So sequence
// numbers are never shifted, and an end that takes nothing with a SYN sees a connection like any other.
type openings struct {
	count atomic.Int32 // of by

	mu sync.Mutex
	by map[uint16]*opening // by the local port
}

// opening is a connection that begins.
type opening struct {
	first []byte // empty once they have left
	begin uint32 // their sequence number, then
	left  int    // how many of them
	taken bool   // the other end has acknowledged them, or some
}

func (o *openings) add(port uint16, first []byte) *opening {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.by == nil {
		o.by = map[uint16]*opening{}
	}
	p := &opening{first: first}
	o.by[port] = p
	o.count.Store(int32(len(o.by)))
	return p
}

// remove says whether the first bytes were taken. The stack must have them by then.
func (o *openings) remove(port uint16) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	p := o.by[port]
	delete(o.by, port)
	o.count.Store(int32(len(o.by)))
	return p != nil && p.taken
}

// segment finds the TCP header of an IPv4 packet that is whole and no fragment.
func segment(packet []byte) (header.IPv4, header.TCP) {
	ip := header.IPv4(packet)
	if len(packet) < header.IPv4MinimumSize || !ip.IsValid(len(packet)) || ip.Protocol() != uint8(tcp.ProtocolNumber) || ip.More() || ip.FragmentOffset() != 0 {
		return nil, nil
	}
	t := header.TCP(packet[ip.HeaderLength():ip.TotalLength()])
	if len(t) < header.TCPMinimumSize || int(t.DataOffset()) < header.TCPMinimumSize || int(t.DataOffset()) > len(t) {
		return nil, nil
	}
	return ip, t
}

func seal(ip header.IPv4, t header.TCP) {
	sum := header.PseudoHeaderChecksum(tcp.ProtocolNumber, ip.SourceAddress(), ip.DestinationAddress(), uint16(len(t)))
	t.SetChecksum(0)
	t.SetChecksum(^checksum.Checksum(t, sum))
	ip.SetChecksum(0)
	ip.SetChecksum(^ip.CalculateChecksum())
}

// busy says whether packets must be seen here.
func (o *openings) busy() bool { return o.count.Load() > 0 }

// leaves sees the packet in buf[:size] before it goes out, and returns its size with what now rides along, mtu at most.
func (o *openings) leaves(buf []byte, size, mtu int) int {
	ip, t := segment(buf[:size])
	if t == nil || t.Flags() != header.TCPFlagSyn {
		return size
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	p := o.by[t.SourcePort()]
	if p == nil || len(p.first) == 0 {
		return size
	}
	n := copy(buf[size:max(min(len(buf), mtu), size)], p.first)
	p.first, p.begin, p.left = nil, t.SequenceNumber()+1, n // once: a SYN that is sent again goes without
	ip.SetTotalLength(uint16(size + n))
	seal(ip, header.TCP(buf[ip.HeaderLength():size+n]))
	return size + n
}

// comes sees a packet before the stack does.
func (o *openings) comes(packet []byte) {
	ip, t := segment(packet)
	if t == nil || !t.Flags().Contains(header.TCPFlagAck) {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	p := o.by[t.DestinationPort()]
	if p == nil {
		return
	}
	if more := t.AckNumber() - p.begin; more == 0 || more > uint32(p.left) {
		return
	}
	p.taken = true
	t.SetAckNumber(p.begin)
	seal(ip, t)
}
