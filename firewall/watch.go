package firewall

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"perimeterd/knock"
)

// watchEvery is how often the ruleset's generation is asked for; it costs one 16 µs system call.
const watchEvery = 100 * time.Millisecond

// Watch repairs the table when another tool deletes, flushes, replaces or edits it, until ctx ends. Windows, spent tokens,
// peers and admitted addresses come back with their remaining time; refill is called for the tokens when sets had to be
// made anew, with whether openings were missed before. In between the gate's sockets are deaf: see Interlock.
//
// The library's own monitor is no help: it dies for good at the first large refresh.
func (f *Firewall) Watch(ctx context.Context, refill func(lost bool) error) error {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	failed, empty, lost := "", false, false
	for n := 0; ; n++ {
		f.turns.Add(1)
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		repair, err := f.check(time.Now(), n%100 == 0)
		empty, lost = empty || repair.restored, lost || repair.lost
		if err == nil && empty {
			if err = refill(lost); err == nil {
				empty, lost = false, false
			}
		}
		switch {
		case err != nil && err.Error() != failed: // say it once, try again for ever: giving up would leave it broken
			failed = err.Error()
			f.log.Error("nftables table not repaired", "table", TableName, "err", err)
		case err == nil && repair.took > 0:
			failed = ""
			f.counter.Repaired(repair.took)
			f.log.Warn("nftables table was changed by another tool and is repaired", "table", TableName,
				"took_ms", float64(repair.took.Microseconds())/1000, "sets_restored", repair.restored)
		}
	}
}

// repair is what check had to do.
type repair struct {
	took     time.Duration // zero: nothing
	restored bool          // the sets were emptied and filled from the mirror: tokens are missing
	lost     bool          // and openings had been missed
}

// check compares the table with what was applied, when the ruleset changed since the last time.
func (f *Firewall) check(now time.Time, prune bool) (r repair, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.applied {
		return r, nil
	}
	if prune {
		f.state.prune(now)
	}
	gen, err := f.generationLocked()
	if err != nil || gen == f.gen && !f.restore {
		return r, err
	}
	print, handles, err := f.fingerprintLocked()
	if err != nil {
		return r, err
	}
	if print == f.print && !f.restore {
		f.gen = gen
		return r, nil
	}
	start := time.Now()
	// Rules first, which close the door; then spent tokens, then what was open.
	f.restore = f.restore || handles != f.handles
	fresh, err := f.claimLocked()
	if err != nil {
		return r, err
	}
	if err := f.applyLocked(f.cfg); err != nil {
		return r, err
	}
	if f.restore = f.restore || fresh; f.restore {
		if err := f.restoreLocked(now); err != nil {
			return r, err
		}
		r.restored, r.lost = true, f.state.lost
		f.restore, f.state.lost = false, false
	}
	r.took = time.Since(start)
	return r, nil
}

// restoreLocked makes the sets hold what the mirror says, whatever they hold now. Tokens are the loader's.
func (f *Firewall) restoreLocked(now time.Time) error {
	return f.fillLocked(now, "tokens", "spent", "open4", "open6", "seq4", "seq6", "admitted", "service", "peer4", "peer6", "progress4", "progress6")
}

// fillLocked makes some sets hold what the mirror says, in one commit.
func (f *Firewall) fillLocked(now time.Time, sets ...string) error {
	f.state.prune(now)
	elements := map[string][]nftables.SetElement{}
	add := func(set string, key, val []byte, until time.Time) {
		if life := until.Sub(now); life >= time.Millisecond {
			elements[set] = append(elements[set], nftables.SetElement{Key: key, Val: val, Timeout: life})
		}
	}
	for _, w := range f.state.windows {
		add(w.set(), w.Source.AsSlice(), native.PutUint32(w.mark()), w.Expires)
	}
	for a, s := range f.state.admitted {
		add("admitted", a.AsSlice(), nil, s.until)
		for _, port := range s.services {
			add("service", service(a, port), nil, s.until)
		}
	}
	for p, until := range f.state.peers {
		set, key := peer(p)
		add(set, key, nil, until)
	}
	for t, until := range f.state.spent {
		add("spent", t[:], nil, until)
	}
	return f.commitLocked(func(c *nftables.Conn) error {
		for _, set := range sets {
			c.FlushSet(named(set))
			for part := range slices.Chunk(elements[set], chunk) {
				if err := c.SetAddElements(named(set), part); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

// generationLocked is the number of commits to the ruleset (linux/netfilter/nf_tables.h: NFT_MSG_GETGEN).
func (f *Firewall) generationLocked() (uint32, error) {
	replies, err := f.queryLocked(unix.NFT_MSG_GETGEN, 0)
	if err != nil {
		return 0, fmt.Errorf("read the ruleset's generation: %w", err)
	}
	for _, m := range replies {
		ad, err := netlink.NewAttributeDecoder(m.Data[4:])
		if err != nil {
			return 0, err
		}
		for ad.Next() {
			if ad.Type() == unix.NFTA_GEN_ID {
				return binary.BigEndian.Uint32(ad.Bytes()), nil
			}
		}
	}
	return 0, errors.New("read the ruleset's generation: the kernel's answer has none")
}

// Attributes that x/sys/unix has no names for (linux/netfilter/nf_tables.h).
const (
	tableHandle = 4
	setHandle   = 16
)

// fingerprintLocked is a digest of the table, its chains, rules and sets as the kernel writes them, without elements. It works
// on raw attributes: the library drops expressions that it does not know. The handles of the table and its named sets are
// in it, and digested by themselves too: a set of the same kind with another handle holds what another tool put there.
func (f *Firewall) fingerprintLocked() (print, handles [32]byte, err error) {
	all, named := sha256.New(), sha256.New()
	for _, q := range []struct {
		message, table uint16
		keep           []uint16
	}{
		{unix.NFT_MSG_GETTABLE, unix.NFTA_TABLE_NAME, []uint16{unix.NFTA_TABLE_FLAGS, tableHandle}},
		{unix.NFT_MSG_GETCHAIN, unix.NFTA_CHAIN_TABLE, []uint16{unix.NFTA_CHAIN_NAME, unix.NFTA_CHAIN_HOOK, unix.NFTA_CHAIN_POLICY, unix.NFTA_CHAIN_TYPE}},
		{unix.NFT_MSG_GETRULE, unix.NFTA_RULE_TABLE, []uint16{unix.NFTA_RULE_CHAIN, unix.NFTA_RULE_EXPRESSIONS}},
		{unix.NFT_MSG_GETSET, unix.NFTA_SET_TABLE, []uint16{unix.NFTA_SET_NAME, unix.NFTA_SET_FLAGS, unix.NFTA_SET_KEY_TYPE, unix.NFTA_SET_KEY_LEN, setHandle}},
	} {
		replies, err := f.queryLocked(q.message, netlink.Dump)
		if err != nil {
			return print, handles, fmt.Errorf("read table inet %s: %w", TableName, err)
		}
		for _, m := range replies {
			if len(m.Data) < 4 || m.Data[0] != unix.NFPROTO_INET {
				continue
			}
			attributes, err := netlink.UnmarshalAttributes(m.Data[4:])
			if err != nil {
				return print, handles, err
			}
			values := map[uint16][]byte{}
			for _, a := range attributes {
				values[a.Type&^unix.NLA_F_NESTED] = a.Data
			}
			if string(values[q.table]) != TableName+"\x00" {
				continue
			}
			for _, kind := range q.keep {
				fmt.Fprintf(all, "%d %d %x\n", q.message, kind, values[kind])
			}
			switch {
			case q.message == unix.NFT_MSG_GETTABLE:
				fmt.Fprintf(named, "%x\n", values[tableHandle])
			case q.message == unix.NFT_MSG_GETSET && !bytes.HasPrefix(values[unix.NFTA_SET_NAME], []byte("__")):
				fmt.Fprintf(named, "%s %x\n", values[unix.NFTA_SET_NAME], values[setHandle])
			}
		}
	}
	return [32]byte(all.Sum(nil)), [32]byte(named.Sum(nil)), nil
}

// queryLocked asks nf_tables for something about every table of every family.
func (f *Firewall) queryLocked(message uint16, flags netlink.HeaderFlags) ([]netlink.Message, error) {
	if _, err := f.connLocked(); err != nil {
		return nil, err
	}
	replies, err := f.nl.Execute(netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | message), Flags: netlink.Request | flags},
		Data:   []byte{unix.NFPROTO_UNSPEC, unix.NFNETLINK_V0, 0, 0}})
	if err != nil {
		f.dropLocked()
	}
	return replies, err
}

// opened notes an opening, so that a repair brings it back.
func (f *Firewall) opened(o Opening) {
	f.mu.Lock()
	defer f.mu.Unlock()
	w := Window{o.Source, o.Credential, o.Sequence, o.At.Add(f.rulingLocked(o.At).Window)}
	f.state.windows[w.key()] = w
	switch {
	case o.Sequence:
	case o.Token == (knock.Token{}):
		f.state.lost = true // it is somewhere behind IPv6 extension headers
	default:
		f.state.spent[o.Token] = o.At.Add(spentTimeout)
	}
}

func (f *Firewall) missed() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.state.lost = true
}
