package gate

import (
	"bytes"
	"net/netip"
	"sync"
	"time"

	"perimeterd/vpn"
)

// answers are the latest responses by UDP. A client whose initiation brings no answer sends it again within milliseconds, and the
// device refuses that as a replay: had the response got lost, only a new initiation would help, more than a round trip later. So the
// same bytes from the same address and port get the same response again, a few times and not for long. It is shorter than what asks
// for it, and was on this very way before. Memory is bounded: who finds another in his slot goes without.
type answers struct {
	mu    sync.Mutex
	slots [256]answered
}

type answered struct {
	initiation [vpn.InitiationSize]byte
	response   [vpn.ResponseSize]byte
	peer       netip.AddrPort
	at         time.Time // when the initiation came
	done       bool
	left       int // how often the response may be sent again
}

const (
	answerLife    = time.Second
	answerRepeats = 4
)

// slot is chosen by the client's own index: the sender of his initiation, the receiver of the response.
func (a *answers) slot(index []byte) *answered { return &a.slots[index[0]] }

// again is the response to what was answered already. Anything else is noted, for its response to come.
func (a *answers) again(initiation []byte, from netip.AddrPort, now time.Time) []byte {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := a.slot(initiation[4:])
	fresh := now.Sub(s.at) < answerLife
	if s.peer == from && fresh && [vpn.InitiationSize]byte(initiation) == s.initiation {
		if s.left == 0 {
			return nil
		}
		s.left--
		return bytes.Clone(s.response[:])
	}
	if !fresh || !s.done {
		*s = answered{initiation: [vpn.InitiationSize]byte(initiation), peer: from, at: now}
	}
	return nil
}

// note keeps the response to an initiation that again was asked for.
func (a *answers) note(response []byte, to netip.AddrPort) {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := a.slot(response[8:])
	if s.peer == to && !s.done && [4]byte(response[8:]) == [4]byte(s.initiation[4:]) {
		s.response, s.done, s.left = [vpn.ResponseSize]byte(response), true, answerRepeats
	}
}

// forget leaves nothing to answer with: a session has ended, and what it was told is not told again.
func (a *answers) forget() {
	a.mu.Lock()
	defer a.mu.Unlock()
	clear(a.slots[:])
}
