package firewall

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/google/nftables"

	"perimeterd/knock"
)

// Window is an open door for one source.
type Window struct {
	Source     netip.Addr
	Credential uint32
	Sequence   bool // opened by a sequence, not by a token
	Expires    time.Time
}

type windowKey struct {
	source   netip.Addr
	sequence bool
}

func (w Window) key() windowKey { return windowKey{w.Source, w.Sequence} }

func (w Window) mark() uint32 {
	if w.Sequence {
		return w.Credential | knock.Complete
	}
	return w.Credential
}

// set is where the kernel keeps it.
func (w Window) set() string {
	switch {
	case w.Sequence && w.Source.Is4():
		return "seq4"
	case w.Sequence:
		return "seq6"
	case w.Source.Is4():
		return "open4"
	}
	return "open6"
}

// mirror is what must come back when another tool deletes the table under a running daemon.
type mirror struct {
	windows  map[windowKey]Window
	admitted map[netip.Addr]admission
	peers    map[netip.AddrPort]time.Time
	spent    map[knock.Token]time.Time
	lost     bool // openings were missed: any token of these steps may have been spent
}

type admission struct {
	services []uint16
	until    time.Time
}

func newMirror() mirror {
	return mirror{map[windowKey]Window{}, map[netip.Addr]admission{}, map[netip.AddrPort]time.Time{},
		map[knock.Token]time.Time{}, false}
}

// prune forgets what expired.
func (m *mirror) prune(now time.Time) {
	for k, w := range m.windows {
		if !w.Expires.After(now) {
			delete(m.windows, k)
		}
	}
	for k, t := range m.spent {
		if !t.After(now) {
			delete(m.spent, k)
		}
	}
	for k, a := range m.admitted {
		if !a.until.After(now) {
			delete(m.admitted, k)
		}
	}
	for k, t := range m.peers {
		if !t.After(now) {
			delete(m.peers, k)
		}
	}
}

// elementsLocked are those of a set of the table, as the kernel has them now.
func (f *Firewall) elementsLocked(set string) ([]nftables.SetElement, error) {
	c, err := f.connLocked()
	if err != nil {
		return nil, err
	}
	e, err := c.GetSetElements(&nftables.Set{Table: newTable(), Name: set})
	if err != nil {
		return nil, fmt.Errorf("read set %s of table inet %s: %w", set, TableName, err)
	}
	return e, nil
}

// readBackLocked fills the mirror from a table that an earlier run left.
func (f *Firewall) readBackLocked(now time.Time) error {
	windows, err := f.readWindowsLocked(now)
	if err != nil {
		return err
	}
	for _, w := range windows {
		f.state.windows[w.key()] = w
	}
	spent, err := f.elementsLocked("spent")
	if err != nil {
		return err
	}
	for _, e := range spent {
		if len(e.Key) == knock.TokenSize {
			f.state.spent[knock.Token(e.Key)] = now.Add(e.Expires)
		}
	}
	return nil
}

// Windows lists the open windows as the kernel has them.
func (f *Firewall) Windows() ([]Window, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.readWindowsLocked(time.Now())
}

// TokenWindow tells whether a source opened a window by token that is open now, as far as the log has told.
func (f *Firewall) TokenWindow(source netip.Addr) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.state.windows[windowKey{source, false}].Expires.After(time.Now())
}

func (f *Firewall) readWindowsLocked(now time.Time) (list []Window, err error) {
	for _, set := range []string{"open4", "open6", "seq4", "seq6"} {
		elements, err := f.elementsLocked(set)
		if err != nil {
			return nil, err
		}
		for _, e := range elements {
			a, ok := netip.AddrFromSlice(e.Key)
			if !ok || len(e.Val) != 4 {
				return nil, fmt.Errorf("set %s holds %x: %x, which is no source and mark", set, e.Key, e.Val)
			}
			mark := native.Uint32(e.Val)
			list = append(list, Window{a, mark &^ knock.Complete, mark&knock.Complete != 0, now.Add(e.Expires)})
		}
	}
	return list, nil
}
