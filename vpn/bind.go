package vpn

import (
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"

	"golang.zx2c4.com/wireguard/conn"
)

// Bind is WireGuard's UDP bind with one more way in: datagrams that arrived inside something else. Those in the body of a
// session request or its reply enter through Inject, and what the device answers to a Flight leaves through it; those of a
// connection enter and leave through a Stream.
//
// Contract with the device (golang.zx2c4.com/wireguard/conn.Bind): Send never blocks on anything but the UDP socket, and
// receive functions return only net.ErrClosed, since any other error ends the device's receiver for good.
type Bind struct {
	udp     conn.Bind
	in      chan injected
	streams chan streamed
	frames  sync.Pool

	mu     sync.Mutex
	closed chan struct{} // nil while closed

	six atomic.Pointer[six] // nil while closed, and where there is no IPv6
}

type injected struct {
	datagram []byte
	from     conn.Endpoint
}

type streamed struct {
	*frame
	from conn.Endpoint
}

// injectQueue bounds datagrams that wait for the device. A full queue drops: handshakes are repeated by their sender.
const injectQueue = 256

// NewBind wraps the platform's standard UDP bind.
func NewBind() *Bind {
	return &Bind{udp: conn.NewDefaultBind(), in: make(chan injected, injectQueue), streams: make(chan streamed, conn.IdealBatchSize)}
}

func (b *Bind) frame() *frame {
	if f, ok := b.frames.Get().(*frame); ok {
		return f
	}
	return new(frame)
}

// Open implements conn.Bind. The last of the functions is for what came inside something else.
func (b *Bind) Open(port uint16) ([]conn.ReceiveFunc, uint16, error) {
	fns, port, err := b.udp.Open(port)
	if err != nil {
		return nil, 0, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	closed := make(chan struct{})
	b.closed = closed
	b.six.Store(newSix(b.udp))
	return append(fns, func(bufs [][]byte, sizes []int, eps []conn.Endpoint) (int, error) {
		select {
		case d := <-b.in:
			sizes[0] = copy(bufs[0], d.datagram)
			eps[0] = d.from
			return 1, nil
		case d := <-b.streams:
			for n := 0; ; {
				sizes[n], eps[n] = copy(bufs[n], d.datagram()), d.from
				b.frames.Put(d.frame)
				if n++; n == len(bufs) {
					return n, nil
				}
				select {
				case d = <-b.streams:
				default:
					return n, nil
				}
			}
		case <-closed:
			return 0, net.ErrClosed
		}
	}), port, nil
}

// Close implements conn.Bind.
func (b *Bind) Close() error {
	b.mu.Lock()
	if b.closed != nil {
		close(b.closed)
		b.closed = nil
		b.six.Store(nil)
	}
	b.mu.Unlock()
	return b.udp.Close()
}

// SetMark implements conn.Bind.
func (b *Bind) SetMark(mark uint32) error { return b.udp.SetMark(mark) }

// BatchSize implements conn.Bind.
func (b *Bind) BatchSize() int { return b.udp.BatchSize() }

// ParseEndpoint implements conn.Bind. It takes a literal address and port.
func (b *Bind) ParseEndpoint(s string) (conn.Endpoint, error) { return b.udp.ParseEndpoint(s) }

// Send implements conn.Bind.
func (b *Bind) Send(bufs [][]byte, ep conn.Endpoint) error {
	// The standard bind asserts its own endpoint type, so ours must be told apart first.
	switch e := ep.(type) {
	case *Flight:
		e.take(bufs)
		return nil
	case *Stream:
		e.take(bufs)
		return nil
	}
	if std, ok := ep.(*conn.StdNetEndpoint); ok && std.Addr().Is6() {
		if s := b.six.Load(); s != nil {
			return s.send(bufs, std)
		}
	}
	return b.udp.Send(bufs, ep)
}

// ErrBusy is returned when the device does not take injected datagrams as fast as they come.
var ErrBusy = errors.New("the tunnel takes no more handshakes now")

// Inject hands the device a datagram as if it had arrived from ep. It never blocks; datagram must not be changed after.
func (b *Bind) Inject(datagram []byte, ep conn.Endpoint) error {
	select {
	case b.in <- injected{datagram, ep}:
		return nil
	default:
		return ErrBusy
	}
}

// Flight is the endpoint of a peer whose datagrams travel inside a request: the first handshake message the device sends
// to it is handed out, everything else is dropped. So a handshake that came in one certificate's request is answered in
// that request and nowhere else.
type Flight struct {
	outer netip.AddrPort
	out   chan []byte
}

// NewFlight makes an endpoint for one request. Outer is the request's TCP peer, for the device's cookie arithmetic only.
func NewFlight(outer netip.AddrPort) *Flight {
	return &Flight{outer: outer, out: make(chan []byte, 1)}
}

// Message delivers the handshake message, once.
func (f *Flight) Message() <-chan []byte { return f.out }

func (f *Flight) take(bufs [][]byte) {
	for _, d := range bufs {
		if len(d) != InitiationSize && len(d) != ResponseSize {
			continue
		}
		select {
		case f.out <- append([]byte(nil), d...): // the device reuses its buffers
		default:
		}
	}
}

// ClearSrc implements conn.Endpoint.
func (f *Flight) ClearSrc() {}

// SrcToString implements conn.Endpoint.
func (f *Flight) SrcToString() string { return "" }

// DstToString implements conn.Endpoint.
func (f *Flight) DstToString() string { return f.outer.String() }

// DstToBytes implements conn.Endpoint: what cookies are bound to.
func (f *Flight) DstToBytes() []byte { b, _ := f.outer.MarshalBinary(); return b }

// DstIP implements conn.Endpoint.
func (f *Flight) DstIP() netip.Addr { return f.outer.Addr() }

// SrcIP implements conn.Endpoint.
func (f *Flight) SrcIP() netip.Addr { return netip.Addr{} }
