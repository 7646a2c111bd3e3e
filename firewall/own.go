package firewall

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Flags of a table (linux/netfilter/nf_tables.h: enum nft_table_flags). A table with both belongs to the socket that made
// it, so that another tool's flush and delete bounce off, and outlives that socket as an orphan, which the next daemon
// adopts. Owner alone would die with the daemon and leave the host open.
const (
	tableOwner   = 0x2
	tablePersist = 0x4 // kernel 6.9
)

// rawMessage is a request to nf_tables that the library cannot make.
type rawMessage struct {
	kind       int
	flags      netlink.HeaderFlags // besides Request and Acknowledge
	attributes []netlink.Attribute
}

func newTableMessage(table uint32, flags netlink.HeaderFlags) rawMessage {
	return rawMessage{unix.NFT_MSG_NEWTABLE, flags, []netlink.Attribute{
		{Type: unix.NFTA_TABLE_NAME, Data: []byte(TableName + "\x00")}, {Type: unix.NFTA_TABLE_FLAGS, Data: network.PutUint32(table)}}}
}

// batchLocked sends messages as one batch on the open socket.
func (f *Firewall) batchLocked(messages ...rawMessage) error {
	if _, err := f.connLocked(); err != nil {
		return err
	}
	edge := func(kind netlink.HeaderType) netlink.Message {
		return netlink.Message{Header: netlink.Header{Type: kind, Flags: netlink.Request},
			Data: []byte{unix.NFPROTO_UNSPEC, unix.NFNETLINK_V0, 0, unix.NFNL_SUBSYS_NFTABLES}}
	}
	batch := []netlink.Message{edge(unix.NFNL_MSG_BATCH_BEGIN)}
	for _, m := range messages {
		data, err := netlink.MarshalAttributes(m.attributes)
		if err != nil {
			return err
		}
		batch = append(batch, netlink.Message{Header: netlink.Header{Type: netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | m.kind),
			Flags: netlink.Request | netlink.Acknowledge | m.flags},
			Data: slices.Concat([]byte{unix.NFPROTO_INET, unix.NFNETLINK_V0, 0, 0}, data)})
	}
	_, err := f.nl.SendMessages(append(batch, edge(unix.NFNL_MSG_BATCH_END)))
	for range messages {
		if err == nil {
			_, err = f.nl.Receive()
		}
	}
	if err != nil {
		f.dropLocked()
	}
	return err
}

// claimLocked makes the table, owned where the kernel allows it, or takes up the one that is there. A plain table stays
// plain: the kernel gives it no owner later.
func (f *Firewall) claimLocked() (fresh bool, err error) {
	flags, there, err := f.tableFlagsLocked()
	if err != nil {
		return false, err
	}
	switch {
	case there && flags&tablePersist == 0:
		f.owned = false
		return false, f.batchLocked(newTableMessage(0, netlink.Create)) // wakes it where another tool made it dormant
	case there && f.owned && flags&tableOwner != 0:
		return false, nil
	case f.plain:
		return !there, f.batchLocked(newTableMessage(0, netlink.Create))
	}
	err = f.batchLocked(newTableMessage(tableOwner|tablePersist, netlink.Create))
	switch {
	case err == nil:
		f.owned = true
		return !there, nil
	case there && errors.Is(err, unix.EPERM):
		return false, fmt.Errorf("table inet %s belongs to another process: is another daemon running?", TableName)
	case there:
		return false, fmt.Errorf("adopt table inet %s: %w", TableName, err)
	}
	// Before kernel 6.9 there is no persist.
	f.owned = false
	if err := f.batchLocked(newTableMessage(0, netlink.Create)); err != nil {
		return false, fmt.Errorf("create table inet %s: %w", TableName, err)
	}
	return true, nil
}

// Exists says whether a table of our name is there, whoever made it.
func (f *Firewall) Exists() (bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	_, there, err := f.tableFlagsLocked()
	return there, err
}

// Owned tells whether other tools are kept from changing the table.
func (f *Firewall) Owned() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.owned
}

func (f *Firewall) tableFlagsLocked() (flags uint32, there bool, err error) {
	replies, err := f.queryLocked(unix.NFT_MSG_GETTABLE, netlink.Dump)
	if err != nil {
		return 0, false, fmt.Errorf("list nftables tables: %w", err)
	}
	for _, m := range replies {
		if len(m.Data) < 4 || m.Data[0] != unix.NFPROTO_INET {
			continue
		}
		attributes, err := netlink.UnmarshalAttributes(m.Data[4:])
		if err != nil {
			return 0, false, err
		}
		name, flags := "", uint32(0)
		for _, a := range attributes {
			switch a.Type {
			case unix.NFTA_TABLE_NAME:
				name = string(a.Data)
			case unix.NFTA_TABLE_FLAGS:
				flags = binary.BigEndian.Uint32(a.Data)
			}
		}
		if name == TableName+"\x00" {
			return flags, true, nil
		}
	}
	return 0, false, nil
}
