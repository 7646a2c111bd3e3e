package firewall

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"perimeterd/knock"
)

// ErrNotApplied is returned by changes of elements before the first Apply.
var ErrNotApplied = errors.New("the nftables table is not applied yet")

// named is a set as element messages need it: the kernel finds it by table and name.
func named(name string) *nftables.Set {
	return &nftables.Set{Table: newTable(), Name: name, HasTimeout: true}
}

// Admit lets a tunnel address through to proxy and console until the time given, and to further TCP ports of the daemon's
// tunnel address.
func (f *Firewall) Admit(a netip.Addr, services []uint16, until time.Time) error {
	return f.change(func() {
		f.state.admitted[a] = admission{services, until}
		delete(f.gone.addresses, a)
	}, func(c *nftables.Conn, now time.Time) error {
		for _, port := range services {
			if err := renew(c, "service", nftables.SetElement{Key: service(a, port), Timeout: until.Sub(now)}); err != nil {
				return err
			}
		}
		return renew(c, "admitted", nftables.SetElement{Key: a.AsSlice(), Timeout: until.Sub(now)})
	})
}

// Dismiss takes Admit back. An address that is not admitted is no error. Forget does the rest.
func (f *Firewall) Dismiss(a netip.Addr) error {
	var services []uint16
	defer f.gone.wake()
	return f.take(func() {
		services = f.state.admitted[a].services
		delete(f.state.admitted, a)
		f.gone.addresses[a] = len(services) > 0
	}, func(c *nftables.Conn) error {
		for _, port := range services {
			if err := remove(c, "service", nftables.SetElement{Key: service(a, port)}); err != nil {
				return err
			}
		}
		return remove(c, "admitted", nftables.SetElement{Key: a.AsSlice()})
	})
}

// AddPeer lets UDP from an authenticated endpoint reach the tunnel without a window, until the time given.
func (f *Firewall) AddPeer(p netip.AddrPort, until time.Time) error {
	set, key := peer(p)
	return f.change(func() {
		f.state.peers[p] = until
		delete(f.gone.endpoints, p)
	}, func(c *nftables.Conn, now time.Time) error {
		return renew(c, set, nftables.SetElement{Key: key, Timeout: until.Sub(now)})
	})
}

// RemovePeer takes AddPeer back. An endpoint that is not there is no error. Forget does the rest.
func (f *Firewall) RemovePeer(p netip.AddrPort) error {
	set, key := peer(p)
	defer f.gone.wake()
	return f.take(func() {
		delete(f.state.peers, p)
		f.gone.endpoints[p] = true
	}, func(c *nftables.Conn) error {
		return remove(c, set, nftables.SetElement{Key: key})
	})
}

func peer(p netip.AddrPort) (set string, key []byte) {
	if a := p.Addr().Unmap(); a.Is4() {
		return "peer4", service(a, p.Port())
	}
	return "peer6", service(p.Addr(), p.Port())
}

// Resume makes these, and no others, the addresses that are admitted, their services, and the endpoints that need no window,
// each until its time: for a start, with the sessions that come back.
func (f *Firewall) Resume(admitted map[netip.Addr]time.Time, services map[netip.Addr][]uint16, peers map[netip.AddrPort]time.Time) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.applied {
		return ErrNotApplied
	}
	clear(f.state.admitted)
	for a, until := range admitted {
		f.state.admitted[a] = admission{services[a], until}
	}
	f.state.peers = maps.Clone(peers)
	if f.state.peers == nil {
		f.state.peers = map[netip.AddrPort]time.Time{}
	}
	if err := f.fillLocked(time.Now(), "admitted", "service", "peer4", "peer6"); err != nil {
		return fmt.Errorf("change table inet %s: %w", TableName, err)
	}
	return nil
}

// change lets something in: one small batch, built under the mutex, and if the kernel took it, a note in the mirror. When the
// table was deleted by another tool meanwhile, the mirror is right all the same: the repair that follows writes it.
func (f *Firewall) change(note func(), batch func(c *nftables.Conn, now time.Time) error) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.tryLocked(func(c *nftables.Conn) error { return batch(c, time.Now()) }); err != nil {
		return err
	}
	note()
	return nil
}

// take takes something out: first of the mirror, so that no repair lets it in again, then of the kernel. What the kernel
// did not take out, the next check does, by writing what the mirror says.
func (f *Firewall) take(forget func(), batch func(c *nftables.Conn) error) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	forget()
	err := f.tryLocked(batch)
	f.restore = f.restore || err != nil && f.applied
	return err
}

func (f *Firewall) tryLocked(batch func(c *nftables.Conn) error) error {
	if !f.applied {
		return ErrNotApplied
	}
	switch err := f.commitLocked(batch); {
	case errors.Is(err, unix.ENOENT): // the table is not there
		f.restore = true
	case err != nil:
		return fmt.Errorf("change table inet %s: %w", TableName, err)
	}
	return nil
}

// renew adds an element with a new timeout whether it exists or not: before kernel 6.12 adding an element that exists
// leaves its timeout as it is, and deleting one that does not exist fails the batch.
func renew(c *nftables.Conn, set string, e nftables.SetElement) error {
	if e.Timeout < time.Millisecond {
		return fmt.Errorf("set %s: a timeout of %v is in the past", set, e.Timeout)
	}
	if err := remove(c, set, e); err != nil {
		return err
	}
	return c.SetAddElements(named(set), []nftables.SetElement{e})
}

func remove(c *nftables.Conn, set string, e nftables.SetElement) error {
	e.Timeout = max(e.Timeout, time.Second)
	if err := c.SetAddElements(named(set), []nftables.SetElement{e}); err != nil {
		return err
	}
	return c.SetDeleteElements(named(set), []nftables.SetElement{{Key: e.Key}})
}

// Token is an element of the map tokens.
type Token struct {
	Token      knock.Token
	Credential uint32
	Expires    time.Time
}

// AddTokens writes at most chunk tokens in one commit. What is expired by now is left out.
func (f *Firewall) AddTokens(list []Token) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.applied {
		return ErrNotApplied
	}
	now := time.Now()
	elements := make([]nftables.SetElement, 0, len(list))
	for i := range list {
		t := &list[i]
		if life := t.Expires.Sub(now); life >= time.Millisecond {
			elements = append(elements, nftables.SetElement{Key: t.Token[:], Val: native.PutUint32(t.Credential), Timeout: life})
		}
	}
	for part := range slices.Chunk(elements, chunk) {
		if err := f.sendLocked("tokens", part); err != nil {
			return err
		}
	}
	return nil
}

// sendLocked adds elements in a commit of their own.
func (f *Firewall) sendLocked(set string, elements []nftables.SetElement) error {
	if len(elements) == 0 {
		return nil
	}
	err := f.commitLocked(func(c *nftables.Conn) error { return c.SetAddElements(named(set), elements) })
	if err != nil {
		return fmt.Errorf("add %d elements to set %s of table inet %s: %w", len(elements), set, TableName, err)
	}
	return nil
}

// FlushTokens takes all tokens out; those spent stay spent.
func (f *Firewall) FlushTokens() error {
	return f.take(func() {}, func(c *nftables.Conn) error {
		c.FlushSet(named("tokens"))
		return nil
	})
}

// Revoke ends everything that a credential holds at the door: the tokens given, which may be there or not, and his windows.
// Tokens go first, or one could open again what was just closed.
func (f *Firewall) Revoke(credential uint32, tokens []knock.Token) error {
	var errs []error
	for part := range slices.Chunk(tokens, chunk) {
		errs = append(errs, f.take(func() {}, func(c *nftables.Conn) error {
			for _, t := range part {
				if err := remove(c, "tokens", nftables.SetElement{Key: t[:], Val: native.PutUint32(credential)}); err != nil {
					return err
				}
			}
			return nil
		}))
	}
	windows, err := f.Windows()
	errs = append(errs, err)
	for _, w := range windows {
		if w.Credential == credential {
			errs = append(errs, f.CloseWindow(w))
		}
	}
	return errors.Join(errs...)
}

// CloseWindow ends one window, as Windows listed it. One that is closed already is no error, nor one that someone else behind
// the same address opened meanwhile, which is his.
func (f *Firewall) CloseWindow(w Window) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.state.windows[w.key()].Credential == w.Credential {
		delete(f.state.windows, w.key())
	}
	err := f.tryLocked(func(c *nftables.Conn) error {
		return remove(c, w.set(), nftables.SetElement{Key: w.Source.AsSlice(), Val: native.PutUint32(w.mark())})
	})
	if errors.Is(err, unix.EEXIST) || errors.Is(err, unix.EBUSY) {
		return nil
	}
	f.restore = f.restore || err != nil && f.applied
	return err
}
