package vpn

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.zx2c4.com/wireguard/conn"
)

// StreamPath carries WireGuard datagrams over the gate's TLS, for networks that block UDP. A GET of StreamPath?session=ID with
// "Connection: Upgrade" and "Upgrade: perimeter-wg/1" (RFC 9110, 7.8) is answered by 101; from then on each way is a row of datagrams,
// a length in two bytes, big-endian, before each. Datagrams may follow the request at once. A session has one stream: the
// latest.
const (
	StreamPath     = "/v1/stream"
	StreamProtocol = "perimeter-wg/1"
)

// Sizes of a datagram on a stream, bytes: none of WireGuard's is shorter, and none longer where the tunnel's MTU is at most 1420.
const (
	MinDatagram = 32
	MaxDatagram = 1500
)

const (
	// streamQueue bounds what waits for a stream's peer to read, datagrams. A full queue drops, as a router does.
	streamQueue = 256
	// streamStuck is how long a peer may take nothing before the stream ends.
	streamStuck = 15 * time.Second
	// streamBatch is how much leaves in one piece: a TLS record at most.
	streamBatch = 16 << 10
)

// frame is a datagram with its length before it, in a buffer that is used again.
type frame struct {
	b [2 + MaxDatagram]byte
	n int // of the datagram
}

func (f *frame) datagram() []byte { return f.b[2 : 2+f.n] }
func (f *frame) whole() []byte    { return f.b[:2+f.n] }

// read takes one datagram off a stream. After an error the stream is of no more use.
func (f *frame) read(r io.Reader) error {
	if _, err := io.ReadFull(r, f.b[:2]); err != nil {
		return err
	}
	if f.n = int(binary.BigEndian.Uint16(f.b[:2])); f.n < MinDatagram || f.n > MaxDatagram {
		return fmt.Errorf("a datagram of %d bytes: want %d to %d", f.n, MinDatagram, MaxDatagram)
	}
	if _, err := io.ReadFull(r, f.datagram()); err != nil {
		return fmt.Errorf("a datagram that is cut off: %w", err)
	}
	return nil
}

// Stream is a connection that carries datagrams. It is an endpoint too: what the device sends to it leaves through it. Sending
// never waits for the peer.
type Stream struct {
	bind  *Bind
	conn  net.Conn
	in    *bufio.Reader
	outer netip.AddrPort
	out   chan *frame
	ended chan struct{}
	end   sync.Once
}

// NewStream makes a stream of a connection to outer, of which in may have read on already.
func (b *Bind) NewStream(c net.Conn, in *bufio.Reader, outer netip.AddrPort) *Stream {
	return &Stream{bind: b, conn: c, in: in, outer: outer, out: make(chan *frame, streamQueue), ended: make(chan struct{})}
}

// Run hands the device what comes and the peer what is sent, until one of them ends or Close is called. Begin, unless it is nil,
// reads what comes before the datagrams. To the device these come from the endpoint from; those that pass refuses do not get
// there.
func (s *Stream) Run(begin func() error, from conn.Endpoint, pass func(datagram []byte) bool) error {
	defer s.Close()
	sent := make(chan error, 1)
	go func() {
		defer s.Close() // which ends the reader
		sent <- s.send()
	}()
	var err error
	if begin != nil {
		err = begin()
	}
	if err == nil {
		err = s.receive(from, pass)
	}
	s.Close()
	return errors.Join(err, <-sent)
}

func (s *Stream) receive(from conn.Endpoint, pass func([]byte) bool) error {
	for {
		f := s.bind.frame()
		if err := f.read(s.in); err != nil {
			return err
		}
		if pass != nil && !pass(f.datagram()) {
			s.bind.frames.Put(f)
			continue
		}
		select { // a device that does not keep up slows this connection down, and no other
		case s.bind.streams <- streamed{f, from}:
		case <-s.ended:
			return net.ErrClosed
		}
	}
}

func (s *Stream) send() error {
	batch := make([]byte, 0, streamBatch)
	for {
		select {
		case f := <-s.out:
			batch = append(batch[:0], f.whole()...)
			s.bind.frames.Put(f)
		case <-s.ended:
			return nil
		}
	more:
		for len(batch)+len(frame{}.b) <= streamBatch {
			select {
			case f := <-s.out:
				batch = append(batch, f.whole()...)
				s.bind.frames.Put(f)
			default:
				break more
			}
		}
		s.conn.SetWriteDeadline(time.Now().Add(streamStuck))
		if _, err := s.conn.Write(batch); err != nil {
			select {
			case <-s.ended:
				return nil
			default:
				return err
			}
		}
	}
}

// take copies, since the device reuses its buffers, and drops what finds no room.
func (s *Stream) take(bufs [][]byte) {
	for _, d := range bufs {
		if len(d) < MinDatagram || len(d) > MaxDatagram {
			continue
		}
		f := s.bind.frame()
		f.n = copy(f.b[2:], d)
		binary.BigEndian.PutUint16(f.b[:2], uint16(f.n))
		select {
		case s.out <- f:
		default:
			s.bind.frames.Put(f)
		}
	}
}

// Ended is closed when the stream is.
func (s *Stream) Ended() <-chan struct{} { return s.ended }

// Close ends the stream and its connection.
func (s *Stream) Close() error {
	s.end.Do(func() { close(s.ended) })
	// Not by TLS's way, which waits for a peer that reads nothing: WireGuard has its own proof of what arrived.
	if t, ok := s.conn.(interface{ NetConn() net.Conn }); ok {
		return t.NetConn().Close()
	}
	return s.conn.Close()
}

// StreamMark begins the text of an endpoint that is a stream, so that nobody takes it for an address of UDP.
const StreamMark = "tls:"

// ClearSrc implements conn.Endpoint.
func (s *Stream) ClearSrc() {}

// SrcToString implements conn.Endpoint.
func (s *Stream) SrcToString() string { return "" }

// DstToString implements conn.Endpoint.
func (s *Stream) DstToString() string { return StreamMark + s.outer.String() }

// DstToBytes implements conn.Endpoint: what cookies are bound to.
func (s *Stream) DstToBytes() []byte { b, _ := s.outer.MarshalBinary(); return b }

// DstIP implements conn.Endpoint.
func (s *Stream) DstIP() netip.Addr { return s.outer.Addr() }

// SrcIP implements conn.Endpoint.
func (s *Stream) SrcIP() netip.Addr { return netip.Addr{} }
