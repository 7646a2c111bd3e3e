package firewall

import (
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

// Watch repairs the table when another tool deletes, flushes or edits it, until ctx ends. Windows, tokens, spent tokens,
// peers and admitted addresses come back with their remaining time. In between the gate's sockets are deaf: see Interlock.
//
// The library's own monitor is no help: it dies for good at the first large refresh.
func (f *Firewall) Watch(ctx context.Context) error {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	failed := ""
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		repaired, err := f.check()
		switch {
		case err != nil && err.Error() != failed: // say it once, try again for ever: giving up would leave it broken
			failed = err.Error()
			f.log.Error("nftables table not repaired", "table", TableName, "err", err)
		case err == nil && repaired > 0:
			failed = ""
			f.log.Warn("nftables table was changed by another tool and is repaired", "table", TableName, "took_ms", float64(repaired.Microseconds())/1000)
		}
	}
}

// check compares the table with what was applied, when the ruleset changed since the last time. Took is not zero when it
// had to be repaired.
func (f *Firewall) check() (took time.Duration, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	gen, err := f.generationLocked()
	if err != nil || !f.applied || gen == f.gen {
		return 0, err
	}
	now, err := f.fingerprintLocked()
	if err != nil {
		return 0, err
	}
	if now == f.print {
		f.gen = gen
		return 0, nil
	}
	start := time.Now()
	if err := f.repairLocked(start); err != nil {
		return 0, err
	}
	return time.Since(start), nil
}

// repairLocked puts back rules first, which close the door, then spent tokens, then what was open.
func (f *Firewall) repairLocked(now time.Time) error {
	absent, err := f.claimLocked()
	if err != nil {
		return err
	}
	if err := f.applyLocked(f.cfg); err != nil {
		return err
	}
	if absent {
		if err := f.restoreLocked(now); err != nil {
			return err
		}
	}
	return f.rememberLocked()
}

func (f *Firewall) restoreLocked(now time.Time) error {
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
	for a, until := range f.state.admitted {
		add("admitted", a.AsSlice(), nil, until)
	}
	for p, until := range f.state.peers {
		set, key := peer(p)
		add(set, key, nil, until)
	}
	for set, list := range elements {
		for part := range slices.Chunk(list, chunk) {
			if err := f.sendLocked(set, part); err != nil {
				return err
			}
		}
	}
	if f.state.lost {
		// Some openings went unseen, so any of these may have been spent. The next step's are safe.
		for t, l := range f.state.tokens {
			f.state.spent[t] = l.expires
		}
		f.state.lost = false
	}
	// The spent ones come first, for whoever loads these steps again after a restart.
	var spent []nftables.SetElement
	for t, until := range f.state.spent {
		spent = append(spent, nftables.SetElement{Key: t[:], Timeout: max(until.Sub(now), time.Second)})
	}
	for part := range slices.Chunk(spent, chunk) {
		if err := f.sendLocked("spent", part); err != nil {
			return err
		}
	}
	var tokens []Token
	for t, l := range f.state.tokens {
		if _, spent := f.state.spent[t]; !spent {
			tokens = append(tokens, Token{t, l.credential, l.expires})
		}
	}
	return f.writeTokensLocked(tokens, now)
}

// rememberLocked takes the table as it is for the one to keep.
func (f *Firewall) rememberLocked() (err error) {
	if f.gen, err = f.generationLocked(); err != nil {
		return err
	}
	f.print, err = f.fingerprintLocked()
	return err
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

// fingerprintLocked is a digest of chains, rules and set definitions as the kernel writes them, elements and handles left out.
// It works on raw attributes: the library drops expressions that it does not know.
func (f *Firewall) fingerprintLocked() (sum [32]byte, err error) {
	h := sha256.New()
	for _, q := range []struct {
		message, table uint16
		keep           []uint16
	}{
		{unix.NFT_MSG_GETCHAIN, unix.NFTA_CHAIN_TABLE, []uint16{unix.NFTA_CHAIN_NAME, unix.NFTA_CHAIN_HOOK, unix.NFTA_CHAIN_POLICY, unix.NFTA_CHAIN_TYPE}},
		{unix.NFT_MSG_GETRULE, unix.NFTA_RULE_TABLE, []uint16{unix.NFTA_RULE_CHAIN, unix.NFTA_RULE_EXPRESSIONS}},
		{unix.NFT_MSG_GETSET, unix.NFTA_SET_TABLE, []uint16{unix.NFTA_SET_NAME, unix.NFTA_SET_FLAGS, unix.NFTA_SET_KEY_TYPE, unix.NFTA_SET_KEY_LEN}},
	} {
		replies, err := f.queryLocked(q.message, netlink.Dump)
		if err != nil {
			return sum, fmt.Errorf("read table inet %s: %w", TableName, err)
		}
		for _, m := range replies {
			if len(m.Data) < 4 || m.Data[0] != unix.NFPROTO_INET {
				continue
			}
			attributes, err := netlink.UnmarshalAttributes(m.Data[4:])
			if err != nil {
				return sum, err
			}
			values := map[uint16][]byte{}
			for _, a := range attributes {
				values[a.Type&^unix.NLA_F_NESTED] = a.Data
			}
			if string(values[q.table]) != TableName+"\x00" {
				continue
			}
			for _, kind := range q.keep {
				fmt.Fprintf(h, "%d %d %x\n", q.message, kind, values[kind])
			}
		}
	}
	return [32]byte(h.Sum(nil)), nil
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
	w := Window{o.Source, o.Credential, o.Sequence, o.At.Add(f.cfg.Window)}
	f.state.windows[w.key()] = w
	if o.Token != (knock.Token{}) {
		f.state.spent[o.Token] = o.At.Add(spentTimeout)
	}
}

func (f *Firewall) missed() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.state.lost = true
}
