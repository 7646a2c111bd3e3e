package client

import (
	"bytes"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.zx2c4.com/wireguard/conn"

	"perimeterd/vpn"
)

// ways are the two ways to the gate. With a stream there, its first packets try UDP as well, and the first answer by UDP
// ends the stream: both ways at once would make the gate's answers flap between them. Later only a handshake tries UDP, from time
// to time, since its answer proves both directions.
type ways struct {
	gate   atomic.Pointer[netip.AddrPort] // by UDP
	stream atomic.Pointer[way]
	trying atomic.Bool // the device's next initiation is for UDP alone
	broken atomic.Bool // the stream ended by itself, and UDP was not known to work
	onUDP  func()      // the way changed to UDP

	mu      sync.Mutex
	indexes [4][4]byte // that this device's latest handshakes gave to the gate, to mark its answers by
	next    int
}

type way struct {
	*vpn.Stream
	both time.Time    // until then packets go by UDP as well
	more atomic.Int32 // and so do so many batches, if they come later
}

// tries says whether a batch goes by UDP as well. What is left is not counted on below nothing: a stream may last for days, and the
// count would come round.
func (w *way) tries(now time.Time) bool {
	return w.more.Load() > 0 && w.more.Add(-1) >= 0 || now.Before(w.both)
}

const (
	// bothFor is how long a new stream's packets try UDP too: longer than round trips are. The gate answers by the way that a packet
	// came first, which may be the stream's where its machine has much to do: one packet says little, and so few must try at least.
	bothFor   = time.Second
	bothTimes = 16
	// leaveAfter is how long a stream stays when UDP has answered, for what is on its way.
	leaveAfter = 2 * time.Second
)

// send takes the way, or both.
func (w *ways) send(b *vpn.Bind, bufs [][]byte, ep conn.Endpoint) error {
	s := w.stream.Load()
	if s == nil {
		return b.Send(bufs, ep)
	}
	if s.tries(time.Now()) {
		_ = b.Send(bufs, ep) // first, so that the gate answers there; an error is that of a way that may be no way
	}
	return b.Send(bufs, s.Stream)
}

func (w *ways) onStream() bool { return w.stream.Load() != nil }

// mine notes an index that the gate's answers to this device carry.
func (w *ways) mine(index [4]byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.indexes[w.next%len(w.indexes)] = index
	w.next++
}

// came looks at what arrived by UDP while a stream is there. It is not authenticated here: but it comes from the gate's address,
// and knows an index of 32 bits that only who sees the packets knows, who might as well hold them up.
func (w *ways) came(message []byte, from conn.Endpoint) {
	s := w.stream.Load()
	if s == nil || len(message) < keepaliveSize {
		return
	}
	var index []byte
	switch message[0] {
	case messageTransport:
		index = message[4:8]
	case messageResponse:
		index = message[8:12]
	default:
		return
	}
	gate := w.gate.Load()
	if at, err := netip.ParseAddrPort(from.DstToString()); err != nil || gate == nil || at != *gate {
		return
	}
	w.mu.Lock()
	known := false
	for _, i := range w.indexes[:min(w.next, len(w.indexes))] {
		known = known || bytes.Equal(i[:], index)
	}
	w.mu.Unlock()
	if known && w.stream.CompareAndSwap(s, nil) {
		time.AfterFunc(leaveAfter, func() { s.Close() })
		if w.onUDP != nil {
			go w.onUDP()
		}
	}
}

// take makes a stream the way from now on, in the place of another, and carries what comes to the device, as from the endpoint
// that it knows. Run is the stream's life.
func (w *ways) take(s *vpn.Stream, run func() error) {
	next := &way{Stream: s, both: time.Now().Add(bothFor)}
	next.more.Store(bothTimes)
	w.broken.Store(false)
	if old := w.stream.Swap(next); old != nil {
		old.Close()
	}
	go func() {
		run()
		if w.stream.CompareAndSwap(next, nil) {
			w.broken.Store(true)
		}
	}()
}

// refuse ends a stream that the gate did not take: it has not broken, and asking again changes nothing.
func (w *ways) refuse(s *vpn.Stream) {
	if now := w.stream.Load(); now != nil && now.Stream == s {
		w.stream.CompareAndSwap(now, nil)
	}
	s.Close()
}

// leave ends the stream, without another way being known.
func (w *ways) leave() {
	if s := w.stream.Swap(nil); s != nil {
		s.Close()
	}
}
