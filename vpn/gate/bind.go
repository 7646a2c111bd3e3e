package gate

import (
	"sync/atomic"
	"time"

	"golang.zx2c4.com/wireguard/conn"

	"perimeterd/vpn"
)

// First bytes of WireGuard messages (https://www.wireguard.com/papers/wireguard.pdf, 5.4).
const (
	messageInitiation = 1
	messageResponse   = 2
)

// watched is the tunnel's bind with a look at the handshakes that pass.
type watched struct {
	*vpn.Bind
	heed      func(initiation []byte) bool // false: the device does not get it
	sent      atomic.Uint64                // handshake responses
	responses atomic.Uint64                // that came
	answers   answers                      // for initiations that come again
}

// Open implements conn.Bind.
func (w *watched) Open(port uint16) ([]conn.ReceiveFunc, uint16, error) {
	fns, port, err := w.Bind.Open(port)
	for i, receive := range fns {
		fns[i] = func(bufs [][]byte, sizes []int, eps []conn.Endpoint) (int, error) {
			n, err := receive(bufs, sizes, eps)
			for j := range n {
				switch {
				case sizes[j] == vpn.InitiationSize && bufs[j][0] == messageInitiation:
					if w.repeat(bufs[j][:sizes[j]], eps[j]) || !w.heed(bufs[j][:sizes[j]]) {
						sizes[j] = 0
					}
				case sizes[j] == vpn.ResponseSize && bufs[j][0] == messageResponse:
					w.responses.Add(1)
				}
			}
			return n, err
		}
	}
	return fns, port, err
}

// Send implements conn.Bind.
func (w *watched) Send(bufs [][]byte, ep conn.Endpoint) error {
	if len(bufs[0]) == vpn.ResponseSize && bufs[0][0] == messageResponse {
		w.sent.Add(1)
		if udp, ok := ep.(*conn.StdNetEndpoint); ok {
			w.answers.note(bufs[0], udp.AddrPort)
		}
	}
	return w.Bind.Send(bufs, ep)
}

// repeat answers an initiation that was answered a moment ago, and says whether it was one.
func (w *watched) repeat(initiation []byte, from conn.Endpoint) bool {
	udp, ok := from.(*conn.StdNetEndpoint)
	if !ok {
		return false // what came by TLS is not lost
	}
	response := w.answers.again(initiation, udp.AddrPort, time.Now())
	if response == nil {
		return false
	}
	_ = w.Bind.Send([][]byte{response}, from) // as lost as the first, if it fails
	return true
}

// Handshakes counts handshake responses, sent and received. When it moves, some peer's endpoint may have.
func (w *watched) Handshakes() uint64 { return w.sent.Load() + w.responses.Load() }

// Responses counts those that came.
func (w *watched) Responses() uint64 { return w.responses.Load() }
