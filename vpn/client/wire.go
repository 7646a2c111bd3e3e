package client

import (
	"bytes"
	"net/netip"
	"sync/atomic"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/tun"

	"perimeterd/vpn"
)

// First bytes of WireGuard messages (https://www.wireguard.com/papers/wireguard.pdf, 5.4).
const (
	messageInitiation = 1
	messageResponse   = 2
	messageTransport  = 4
	keepaliveSize     = 32 // a transport message without a packet
)

// wire is the device's bind, watched, and with initiations sent more than once. It knows the two ways to the gate, UDP and a
// stream, and which to take; the device knows one endpoint.
type wire struct {
	*vpn.Bind
	ways
	keyed      chan struct{} // gets a token when the device has keys: a transport message left
	initiation atomic.Pointer[sentInitiation]
	knocked    atomic.Pointer[sentToken]
	answered   atomic.Int64  // when the last handshake response came, Unix nanoseconds
	first      atomic.Int64  // when data left to which nothing has come back, Unix nanoseconds; 0: all is answered
	last       atomic.Int64  // and the latest since
	heard      atomic.Uint64 // bytes of data that came, WireGuard's own included
}

type sentInitiation struct {
	datagram []byte
	to       conn.Endpoint
	at       time.Time
}

type sentToken struct {
	datagram []byte
	to       conn.Endpoint
	at       time.Time
}

// oneFlight is how long after a token an initiation is of the same flight.
const oneFlight = 50 * time.Millisecond

func newWire() *wire { return &wire{Bind: vpn.NewBind(), keyed: make(chan struct{}, 1)} }

// Open implements conn.Bind.
func (w *wire) Open(port uint16) ([]conn.ReceiveFunc, uint16, error) {
	fns, port, err := w.Bind.Open(port)
	for i, receive := range fns {
		byUDP := i < len(fns)-1
		fns[i] = func(bufs [][]byte, sizes []int, eps []conn.Endpoint) (int, error) {
			n, err := receive(bufs, sizes, eps)
			streaming, data := byUDP && w.onStream(), 0
			for j := range n {
				if streaming {
					w.came(bufs[j][:sizes[j]], eps[j])
				}
				switch {
				case sizes[j] > 0 && bufs[j][0] == messageTransport:
					data += sizes[j]
				case sizes[j] == vpn.ResponseSize && bufs[j][0] == messageResponse:
					// Not authenticated here: a forged one only ends the resending, and leaves silence to WireGuard's timers.
					w.answered.Store(time.Now().UnixNano())
					w.first.Store(0)
				}
			}
			if data > 0 {
				w.heard.Add(uint64(data))
				if w.first.Load() != 0 {
					w.first.Store(0)
				}
			}
			return n, err
		}
	}
	return fns, port, err
}

// Send implements conn.Bind.
func (w *wire) Send(bufs [][]byte, ep conn.Endpoint) error {
	_, inside := ep.(*vpn.Flight)
	if len(bufs[0]) >= 8 && (bufs[0][0] == messageInitiation || bufs[0][0] == messageResponse) {
		w.mine([4]byte(bufs[0][4:]))
	}
	switch bufs[0][0] {
	case messageTransport:
		select {
		case w.keyed <- struct{}{}:
		default:
		}
		if len(bufs) > 1 || len(bufs[0]) > keepaliveSize {
			now := time.Now().UnixNano()
			w.last.Store(now)
			w.first.CompareAndSwap(0, now)
		}
	case messageInitiation:
		if !inside && len(bufs[0]) == vpn.InitiationSize {
			i := &sentInitiation{bytes.Clone(bufs[0]), ep, time.Now()}
			if w.trying.Load() { // its silence says nothing of the tunnel
				go w.resend(i, i.at, w.onStream)
				return w.Bind.Send(bufs, ep)
			}
			w.initiation.Store(i)
			go w.resend(i, i.at, func() bool { return w.initiation.Load() == i && !w.onStream() })
		}
	}
	if inside {
		return w.Bind.Send(bufs, ep)
	}
	return w.send(w.Bind, bufs, ep)
}

// unheard is when data left to which nothing has come back, although some was sent again: TCP ends many exchanges with
// one packet that asks for no answer. Zero: there is none.
func (w *wire) unheard() time.Time {
	first, last := w.first.Load(), w.last.Load()
	if first == 0 || last-first < int64(repeatedAfter) {
		return time.Time{}
	}
	return time.Unix(0, first)
}

// repeatedAfter is less than TCP's shortest retransmission timeout, and more than its longest delayed acknowledgement
// on Linux (200 ms and 40 ms).
const repeatedAfter = 150 * time.Millisecond

// resends are when an unanswered initiation goes out again: its loss costs five seconds otherwise. The gate answers a duplicate as it
// has answered the first, or refuses it as a replay.
var resends = [...]time.Duration{30 * time.Millisecond, 90 * time.Millisecond, 250 * time.Millisecond}

func (w *wire) resend(i *sentInitiation, start time.Time, wanted func() bool) {
	knock := w.knocked.Load() // that it came behind; nil: none
	if knock != nil && (i.at.Before(knock.at) || i.at.Sub(knock.at) > oneFlight) {
		knock = nil
	}
	for _, at := range resends {
		time.Sleep(time.Until(start.Add(at)))
		if w.answered.Load() > i.at.UnixNano() || !wanted() {
			return
		}
		if knock != nil { // it may be what was lost; and a copy of one that came opens nothing
			w.Bind.Send([][]byte{knock.datagram}, knock.to)
		}
		w.Bind.Send([][]byte{i.datagram}, i.to) // an error is that of a closed or unreachable network: the next may do
	}
}

// token sends a knock from the tunnel's own socket, so that it shares flow, queue and NAT mapping with what follows.
func (w *wire) token(token []byte, to netip.AddrPort) error {
	ep, err := w.ParseEndpoint(to.String())
	if err != nil {
		return err
	}
	w.knocked.Store(&sentToken{token, ep, time.Now()})
	return w.Bind.Send([][]byte{token}, ep)
}

// quietTUN keeps the interface's up and down from the device: an interface that is not up yet would close the device's
// sockets in the middle of the first handshake.
type quietTUN struct {
	tun.Device
	events chan tun.Event
}

func newQuietTUN(d tun.Device) *quietTUN {
	q := &quietTUN{d, make(chan tun.Event)}
	go func() {
		defer close(q.events)
		for e := range d.Events() {
			if e &= tun.EventMTUUpdate; e != 0 {
				q.events <- e
			}
		}
	}()
	return q
}

// Events implements tun.Device.
func (q *quietTUN) Events() <-chan tun.Event { return q.events }
