package client

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/tun"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// What the stack needs to fill a long way: at 50 ms and 1 Gb/s six megabytes are under way. One connection may have all of that;
// many share it, or a hundred would hold a gigabyte.
const (
	stackQueue    = 8192     // packets that wait for the device: more than a full window, which may leave at once
	receiveBuffer = 16 << 20 // bytes, of one connection at most: it grows with what the reader takes
	sendBuffer    = 8 << 20
	leastBuffer   = 512 << 10
	allBuffers    = 64 << 20 // of all connections, each way
	stackNIC      = 1
)

// netstack is a Link inside this process: gVisor's TCP/IP behind the WireGuard device. It takes no privilege, and nobody
// else reaches through it.
type netstack struct {
	stack  *stack.Stack
	out    *channel.Endpoint
	events chan tun.Event
	ctx    context.Context // of the device's reading
	cancel func()
	closed sync.Once

	openings openings
	earliest atomic.Int32 // an earliness: what came of the last early connection

	mu    sync.Mutex
	mtu   int
	conns int
}

// NewNetstack makes a Link that needs no privilege.
func NewNetstack() (Link, error) {
	n := &netstack{
		stack: stack.New(stack.Options{
			NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol},
			TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol},
		}),
		out:    channel.New(stackQueue, maxMTU, ""),
		events: make(chan tun.Event, 4),
		mtu:    maxMTU,
	}
	n.earliest.Store(int32(perhaps))
	n.ctx, n.cancel = context.WithCancel(context.Background())
	sack, moderate := tcpip.TCPSACKEnabled(true), tcpip.TCPModerateReceiveBufferOption(true)
	// Without RACK, which arms a timer at each acknowledgement.
	recovery, congestion := tcpip.TCPRecovery(0), tcpip.CongestionControlOption("cubic")
	for _, option := range []tcpip.SettableTransportProtocolOption{&sack, &moderate, &recovery, &congestion} {
		if err := n.stack.SetTransportProtocolOption(tcp.ProtocolNumber, option); err != nil {
			return nil, fmt.Errorf("netstack: %T: %v", option, err)
		}
	}
	if err := n.share(0); err != nil {
		return nil, err
	}
	if err := n.stack.CreateNIC(stackNIC, n.out); err != nil {
		return nil, fmt.Errorf("netstack: %v", err)
	}
	n.stack.AddRoute(tcpip.Route{Destination: header.IPv4EmptySubnet, NIC: stackNIC})
	n.events <- tun.EventUp
	return n, nil
}

// share gives each connection its part of the buffers: a new one both, one that there is the room to grow for what it receives.
func (n *netstack) share(more int) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.conns += more
	part := max(allBuffers/max(n.conns, 1), leastBuffer)
	receive := tcpip.TCPReceiveBufferSizeRangeOption{Min: 4096, Default: leastBuffer, Max: min(part, receiveBuffer)}
	send := tcpip.TCPSendBufferSizeRangeOption{Min: 4096, Default: min(part, sendBuffer), Max: min(part, sendBuffer)}
	for _, option := range []tcpip.SettableTransportProtocolOption{&receive, &send} {
		if err := n.stack.SetTransportProtocolOption(tcp.ProtocolNumber, option); err != nil {
			return fmt.Errorf("netstack: %T: %v", option, err)
		}
	}
	return nil
}

// Configure implements Link. What another link carries stays its own: takeOver has nothing to do.
func (n *netstack) Configure(address, _ netip.Addr, mtu int, _ bool) error {
	n.mu.Lock()
	n.mtu = mtu
	n.mu.Unlock()
	n.out.SetMTU(uint32(mtu))
	n.events <- tun.EventMTUUpdate
	err := n.stack.AddProtocolAddress(stackNIC, tcpip.ProtocolAddress{
		Protocol: ipv4.ProtocolNumber, AddressWithPrefix: tcpip.AddrFromSlice(address.AsSlice()).WithPrefix(),
	}, stack.AddressProperties{})
	if err != nil {
		return fmt.Errorf("netstack: address %v: %v", address, err)
	}
	return nil
}

// DialContext implements Link, for TCP to an IPv4 address.
func (n *netstack) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	return n.DialWith(ctx, network, address, nil)
}

// early implements earlyLink.
func (n *netstack) early() earliness { return earliness(n.earliest.Load()) }

// DialWith implements earlyLink.
func (n *netstack) DialWith(ctx context.Context, network, address string, first []byte) (net.Conn, error) {
	to, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil, err
	}
	fail := func(err error) (net.Conn, error) {
		return nil, &net.OpError{Op: "dial", Net: network, Addr: net.TCPAddrFromAddrPort(to), Err: err}
	}
	if err := n.share(+1); err != nil {
		return fail(err)
	}
	free := sync.OnceFunc(func() { n.share(-1) })
	queue := new(waiter.Queue)
	end, no := n.stack.NewEndpoint(tcp.ProtocolNumber, ipv4.ProtocolNumber, queue)
	if no != nil {
		free()
		return fail(errors.New(no.String()))
	}
	port := uint16(0)
	if len(first) > 0 {
		if no := end.Bind(tcpip.FullAddress{}); no == nil {
			if own, no := end.GetLocalAddress(); no == nil {
				port = own.Port
				n.openings.add(port, first)
			}
		}
	}
	entry, writable := waiter.NewChannelEntry(waiter.WritableEvents | waiter.EventErr | waiter.EventHUp)
	queue.EventRegister(&entry)
	defer queue.EventUnregister(&entry)
	no = end.Connect(tcpip.FullAddress{NIC: stackNIC, Addr: tcpip.AddrFromSlice(to.Addr().AsSlice()), Port: to.Port()})
	if _, started := no.(*tcpip.ErrConnectStarted); started {
		select {
		case <-ctx.Done():
			n.openings.remove(port)
			end.Abort()
			free()
			return fail(ctx.Err())
		case <-writable:
		}
		no = end.LastError()
	}
	switch no.(type) {
	case nil:
		c := &stackConn{gonet.NewTCPConn(queue, end), end, free}
		if len(first) > 0 {
			_, err = c.Write(first)
			n.begun(port)
		}
		if err != nil {
			c.Close()
			return fail(err)
		}
		return c, nil
	case *tcpip.ErrConnectionRefused:
		err = syscall.ECONNREFUSED
	default:
		err = errors.New(no.String())
	}
	n.openings.remove(port)
	end.Abort()
	free()
	return fail(err)
}

// begun notes whether the connection from a port has begun early.
func (n *netstack) begun(port uint16) {
	is := never
	if n.openings.remove(port) {
		is = likely
	}
	n.earliest.Store(int32(is))
}

// stackConn is a connection of the stack's.
type stackConn struct {
	*gonet.TCPConn
	end  tcpip.Endpoint
	free func() // its part of the buffers
}

// Close implements net.Conn.
func (c *stackConn) Close() error {
	c.free()
	return c.TCPConn.Close()
}

// reset ends a connection so that the other side knows that it is not whole.
func (c *stackConn) reset() {
	c.free()
	c.end.Abort()
}

// Read implements tun.Device: all that waits, as far as it fits.
func (n *netstack) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	packet := n.out.ReadContext(n.ctx)
	count := 0
	for packet != nil {
		size := offset
		for _, piece := range packet.AsSlices() {
			size += copy(bufs[count][size:], piece)
		}
		packet.DecRef()
		sizes[count] = size - offset
		if n.openings.busy() {
			sizes[count] = n.openings.leaves(bufs[count][offset:], sizes[count], int(n.out.MTU()))
		}
		if count++; count == len(bufs) {
			break
		}
		packet = n.out.Read()
	}
	if count == 0 {
		return 0, os.ErrClosed
	}
	return count, nil
}

// Write implements tun.Device.
func (n *netstack) Write(bufs [][]byte, offset int) (int, error) {
	for _, b := range bufs {
		if b = b[offset:]; len(b) == 0 || b[0]>>4 != 4 {
			continue
		}
		if n.openings.busy() {
			n.openings.comes(b)
		}
		packet := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(b)})
		n.out.InjectInbound(header.IPv4ProtocolNumber, packet)
		packet.DecRef()
	}
	return len(bufs), nil
}

// Close implements tun.Device. What it carried is reset.
func (n *netstack) Close() error {
	n.closed.Do(func() {
		n.cancel()
		n.stack.Close()
		n.stack.RemoveNIC(stackNIC)
		n.out.Close()
		close(n.events)
	})
	return nil
}

// MTU implements tun.Device.
func (n *netstack) MTU() (int, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.mtu, nil
}

// File implements tun.Device.
func (n *netstack) File() *os.File { return nil }

// Name implements tun.Device: there is no interface to name.
func (n *netstack) Name() (string, error) { return "", nil }

// Events implements tun.Device.
func (n *netstack) Events() <-chan tun.Event { return n.events }

// BatchSize implements tun.Device.
func (n *netstack) BatchSize() int { return conn.IdealBatchSize }
