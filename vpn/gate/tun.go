package gate

import (
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.zx2c4.com/wireguard/tun"

	"perimeterd/internal/session"
)

// admitting is a TUN device that notices the first packet of each pending session. WireGuard has checked by then that
// the packet came through the keys that own its source address, which is the proof that the session's client holds its
// private key. With no session pending it costs one atomic load a batch.
type admitting struct {
	tun.Device
	admit func(session.Session) bool

	count   atomic.Int64
	mu      sync.RWMutex
	pending map[[4]byte]session.Session
	newest  time.Time // that the latest was expected
}

// Write implements tun.Device: packets towards the host.
func (a *admitting) Write(bufs [][]byte, offset int) (int, error) {
	if a.count.Load() != 0 {
		for _, b := range bufs {
			if p := b[offset:]; len(p) >= 20 && p[0]>>4 == 4 { // RFC 791: source at 12
				a.check([4]byte(p[12:16]))
			}
		}
	}
	return a.Device.Write(bufs, offset)
}

func (a *admitting) check(source [4]byte) {
	a.mu.RLock()
	s, ok := a.pending[source]
	a.mu.RUnlock()
	if ok { // else someone else is pending
		a.prove(s)
	}
}

// prove admits a session that is still pending, since its client holds its private key.
func (a *admitting) prove(s session.Session) {
	a.mu.Lock()
	defer a.mu.Unlock() // held over admit: the session may not end between
	if p, ok := a.pending[s.Address.As4()]; ok && p.ID == s.ID && a.admit(s) {
		delete(a.pending, s.Address.As4())
		a.count.Store(int64(len(a.pending)))
	}
}

func (a *admitting) expect(s session.Session) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.pending[s.Address.As4()], a.newest = s, time.Now()
	a.count.Store(int64(len(a.pending)))
}

// waiting is who is pending, and since when the newest is.
func (a *admitting) waiting() ([]session.Session, time.Time) {
	a.mu.RLock()
	defer a.mu.RUnlock()
	return slices.Collect(maps.Values(a.pending)), a.newest
}

func (a *admitting) forget(s session.Session) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if p, ok := a.pending[s.Address.As4()]; ok && p.ID == s.ID {
		delete(a.pending, s.Address.As4())
		a.count.Store(int64(len(a.pending)))
	}
}
