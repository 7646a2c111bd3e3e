package vpn

import (
	"net"
	"reflect"
	"sync"

	"golang.org/x/net/ipv6"
	"golang.zx2c4.com/wireguard/conn"
)

// six sends to IPv6 addresses, through the standard bind's socket and past its Send: that has one pool of destinations for both
// families, and copies an IPv6 address into a slice that an IPv4 one has left four bytes long, so that three of four datagrams go
// astray where both are in use (golang.zx2c4.com/wireguard, conn/bind_std.go, ecfc5a8d5446). It sends in batches, without GSO.
type six struct {
	*ipv6.PacketConn
	messages sync.Pool // of *[]ipv6.Message
}

// newSix finds the socket of an open bind. Nil: it has none, or is of another kind, which has another Send.
func newSix(bind conn.Bind) *six {
	std, ok := bind.(*conn.StdNetBind)
	if !ok {
		return nil
	}
	f := reflect.ValueOf(std).Elem().FieldByName("ipv6")
	if !f.IsValid() || f.Type() != reflect.TypeFor[*net.UDPConn]() || f.IsNil() {
		return nil
	}
	return &six{
		PacketConn: ipv6.NewPacketConn((*net.UDPConn)(f.UnsafePointer())),
		messages: sync.Pool{New: func() any {
			m := make([]ipv6.Message, conn.IdealBatchSize)
			for i := range m {
				m[i].Buffers = make([][]byte, 1)
			}
			return &m
		}},
	}
}

// send is conn.Bind.Send, from the address that the peer has written to, where the bind knows it.
func (s *six) send(bufs [][]byte, ep *conn.StdNetEndpoint) error {
	to := net.UDPAddrFromAddrPort(ep.AddrPort)
	var control []byte
	if src := ep.SrcIP(); src.Is6() {
		control = (&ipv6.ControlMessage{Src: src.AsSlice(), IfIndex: int(ep.SrcIfidx())}).Marshal()
	}
	pooled := s.messages.Get().(*[]ipv6.Message)
	defer s.messages.Put(pooled)
	for len(bufs) > 0 {
		messages := (*pooled)[:min(len(bufs), len(*pooled))]
		for i := range messages {
			messages[i].Buffers[0], messages[i].Addr, messages[i].OOB = bufs[i], to, control
		}
		n, err := s.WriteBatch(messages, 0)
		if err != nil {
			return err
		}
		bufs = bufs[n:]
	}
	return nil
}
