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
)

// wire is the device's bind, watched, and with initiations sent more than once.
type wire struct {
	*vpn.Bind
	keyed      chan struct{} // gets a token when the device has keys: a transport message left
	initiation atomic.Pointer[sentInitiation]
	answered   atomic.Int64 // when the last handshake response came, Unix nanoseconds
}

type sentInitiation struct {
	datagram []byte
	to       conn.Endpoint
	at       time.Time
}

func newWire() *wire { return &wire{Bind: vpn.NewBind(), keyed: make(chan struct{}, 1)} }

// Open implements conn.Bind.
func (w *wire) Open(port uint16) ([]conn.ReceiveFunc, uint16, error) {
	fns, port, err := w.Bind.Open(port)
	for i, receive := range fns {
		fns[i] = func(bufs [][]byte, sizes []int, eps []conn.Endpoint) (int, error) {
			n, err := receive(bufs, sizes, eps)
			for j := range n {
				// Not authenticated here: a forged one only ends the resending.
				if sizes[j] == vpn.ResponseSize && bufs[j][0] == messageResponse {
					w.answered.Store(time.Now().UnixNano())
				}
			}
			return n, err
		}
	}
	return fns, port, err
}

// Send implements conn.Bind.
func (w *wire) Send(bufs [][]byte, ep conn.Endpoint) error {
	switch bufs[0][0] {
	case messageTransport:
		select {
		case w.keyed <- struct{}{}:
		default:
		}
	case messageInitiation:
		if _, inside := ep.(*vpn.Flight); !inside && len(bufs[0]) == vpn.InitiationSize {
			i := &sentInitiation{bytes.Clone(bufs[0]), ep, time.Now()}
			w.initiation.Store(i)
			go w.resend(i, time.Now())
		}
	}
	return w.Bind.Send(bufs, ep)
}

// resends are when an unanswered initiation goes out again: its loss costs five seconds otherwise, and a duplicate is
// refused as a replay.
var resends = [...]time.Duration{30 * time.Millisecond, 90 * time.Millisecond, 250 * time.Millisecond}

func (w *wire) resend(i *sentInitiation, start time.Time) {
	for _, at := range resends {
		time.Sleep(time.Until(start.Add(at)))
		if w.answered.Load() > i.at.UnixNano() || w.initiation.Load() != i {
			return
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
