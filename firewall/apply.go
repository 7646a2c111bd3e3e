package firewall

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"perimeterd/knock"
)

// Firewall owns the table. Its methods may be called from several goroutines: one mutex holds over every batch, since
// concurrent users of one batch would lose each other's messages.
type Firewall struct {
	log     *slog.Logger
	netns   int // file descriptor of a network namespace; 0: the thread's own
	counter Counter
	turns   atomic.Int64 // of Watch

	mu      sync.Mutex
	nft     *nftables.Conn // on the socket nl; nil when closed
	nl      *netlink.Conn
	cfg     Config
	applied bool
	plain   bool // never own the table
	owned   bool // the table is owned by the socket nl, and outlives it
	state   mirror
	print   [32]byte // of the table as last applied; zero where another tool came between, so that nothing matches it
	gen     uint32   // ruleset generation at which print was last seen to hold
	handles [32]byte // of the table and its sets, as last applied
	restore bool     // what the sets hold is not what the mirror says
	next    *next    // on trial; nil: nothing is
	gone    departed
}

// New makes a Firewall; it changes nothing until Apply. Netns is a file descriptor of the network namespace to work in,
// 0 for the caller's own.
func New(log *slog.Logger, netns int) *Firewall {
	return &Firewall{log: log, netns: netns, counter: uncounted{}, state: newMirror(), gone: newDeparted()}
}

// Apply makes the table hold what cfg says, in one atomic batch that touches no other table. Windows, tokens, spent
// tokens, peers and admitted addresses stay. Fresh says that the table was not there before: nothing is known then of the
// tokens that were spent. A trial ends with it.
func (f *Firewall) Apply(cfg Config) (fresh bool, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.replaceLocked(cfg, nil)
}

func (f *Firewall) replaceLocked(cfg Config, next *next) (fresh bool, err error) {
	if f.applied { // what another tool did meanwhile must not be taken for ours
		_, handles, err := f.fingerprintLocked()
		if err != nil {
			return false, err
		}
		f.restore = f.restore || handles != f.handles
	}
	if cfg.Mode != Guard && cfg.Mode != Host {
		return false, fmt.Errorf("firewall.mode %q: want %q or %q", cfg.Mode, Guard, Host)
	}
	if fresh, err = f.claimLocked(); err != nil {
		return false, err
	}
	if !fresh && !f.applied {
		ours, err := f.hasSetsLocked()
		switch {
		case err != nil:
			return false, err
		case !ours: // a table of our name that another tool made or emptied: what was spent is not known
			fresh = true
		default:
			if err := f.readBackLocked(time.Now()); err != nil {
				return false, err
			}
		}
	}
	before := f.next
	f.next = next
	if err := f.applyLocked(cfg); err != nil {
		f.next = before
		return false, err
	}
	f.cfg, f.applied = cfg, true
	return fresh, nil
}

// readBuffer has room for the answers to a batch, one a message, which the library reads only when all is sent: two
// configurations of a trial are more than the kernel's default of 208 KiB holds. It is a bound, not an allocation.
const readBuffer = 4 << 20

// writeBuffer has room for the largest batch, which leaves in one message: full sets after a repair, some 100 bytes an element.
// It is a bound too.
const writeBuffer = 64 << 20

// connLocked is the one socket for everything. It stays open: closing a netfilter socket waits until the kernel has freed
// what the last commit took out, some 14 ms, while a commit itself takes 0.1 ms.
func (f *Firewall) connLocked() (*nftables.Conn, error) {
	if f.nft != nil {
		return f.nft, nil
	}
	c, err := nftables.New(nftables.AsLasting(), nftables.WithNetNSFd(f.netns), nftables.WithSockOptions(func(nl *netlink.Conn) error {
		f.nl = nl
		return errors.Join(nl.SetReadBuffer(readBuffer), nl.SetWriteBuffer(writeBuffer))
	}))
	if err != nil {
		return nil, fmt.Errorf("netlink socket to nftables: %w", err)
	}
	f.nft = c
	if f.owned {
		// The old socket's end left the table without an owner, and perhaps it is gone since: then check makes it again.
		if err := f.batchLocked(newTableMessage(tableOwner|tablePersist, 0)); err != nil {
			f.owned, f.restore = false, true
			f.log.Warn("nftables table has no owner for a moment", "table", TableName, "err", err)
			return f.connLocked()
		}
	}
	return c, nil
}

// dropLocked forgets the socket, with whatever is queued to be sent on it or to be read from it.
func (f *Firewall) dropLocked() {
	if f.nft != nil {
		f.nft.CloseLasting()
		f.nft, f.nl = nil, nil
	}
}

// commitLocked sends what build queues as one batch, which the kernel takes whole or not at all. After a refusal that was
// read to its end the socket stays, since the table belongs to it.
func (f *Firewall) commitLocked(build func(*nftables.Conn) error) error {
	c, err := f.connLocked()
	if err != nil {
		return err
	}
	if err := build(c); err != nil {
		f.dropLocked() // with the messages that are queued
		return err
	}
	if err := c.Flush(); err != nil {
		for _, refusal := range []error{unix.EEXIST, unix.ENOENT, unix.EBUSY, unix.EINVAL, unix.EOPNOTSUPP, unix.ENFILE, unix.ENOSPC} {
			if errors.Is(err, refusal) {
				return err
			}
		}
		f.dropLocked()
		return err
	}
	return nil
}

// hasSetsLocked tells whether the table has the sets that readBackLocked reads.
func (f *Firewall) hasSetsLocked() (bool, error) {
	c, err := f.connLocked()
	if err != nil {
		return false, err
	}
	sets, err := c.GetSets(newTable())
	if err != nil {
		return false, fmt.Errorf("list the sets of table inet %s: %w", TableName, err)
	}
	for _, name := range []string{"open4", "open6", "seq4", "seq6", "spent"} {
		if !slices.ContainsFunc(sets, func(s *nftables.Set) bool { return s.Name == name }) {
			return false, nil
		}
	}
	return true, nil
}

// applyLocked writes the table, and remembers how it looks then. A table that another tool made under our name may differ
// in what cannot be changed, as the type of a set or the hook of a chain: then it is made anew, and restore is set.
func (f *Firewall) applyLocked(cfg Config) error {
	err := f.writeLocked(cfg)
	if errors.Is(err, unix.EEXIST) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
		f.log.Warn("nftables table has parts of another kind and is made anew", "table", TableName, "err", err)
		if err := f.commitLocked(func(c *nftables.Conn) error { c.DelTable(newTable()); return nil }); err != nil {
			return fmt.Errorf("delete table inet %s, which is not as it should be: %w", TableName, err)
		}
		f.restore = true
		if _, err := f.claimLocked(); err != nil {
			return err
		}
		err = f.writeLocked(cfg)
	}
	if err != nil {
		return fmt.Errorf("apply table inet %s: %w", TableName, err)
	}
	return nil
}

func (f *Firewall) writeLocked(cfg Config) error {
	f.print = [32]byte{}
	if err := f.tokenSetsLocked(); err != nil {
		return fmt.Errorf("sets of tokens: %w", err)
	}
	before, err := f.generationLocked()
	if err != nil {
		return err
	}
	c, err := f.connLocked()
	if err != nil {
		return err
	}
	chains, err := c.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return fmt.Errorf("list chains: %w", err)
	}
	sets, err := c.GetSets(newTable())
	if err != nil {
		return fmt.Errorf("list sets: %w", err)
	}
	if err := f.commitLocked(func(c *nftables.Conn) error {
		b := &builder{conn: c, table: newTable(), sets: map[string]*nftables.Set{}, names: map[string]*nftables.Chain{}}
		c.FlushTable(b.table) // claimLocked made it; AddTable would say flags 0, and an owned table refuses that
		b.declareSets()
		if f.next == nil {
			b.build(cfg)
		} else {
			b.buildTrial(cfg, *f.next, time.Now())
		}
		// Progress is made in one automaton. That of a trial may be another than the trial before it had.
		if f.next != nil || !slices.EqualFunc(f.cfg.Sequences, cfg.Sequences, knock.Sequence.Equal) {
			b.conn.FlushSet(b.sets["progress4"])
			b.conn.FlushSet(b.sets["progress6"])
		}
		b.clean(chains, sets)
		return b.err
	}); err != nil {
		return err
	}
	// Nothing may have come between this commit and what is remembered of it.
	print, handles, err := f.fingerprintLocked()
	if err != nil {
		return err
	}
	after, err := f.generationLocked()
	if err != nil {
		return err
	}
	if after == before+1 {
		f.print, f.handles, f.gen = print, handles, after
	}
	return nil
}

// clean takes out chains and sets that are not ours: of an earlier version, or another tool's.
func (b *builder) clean(chains []*nftables.Chain, sets []*nftables.Set) {
	for _, c := range chains {
		if c.Table.Name == TableName && b.names[c.Name] == nil {
			b.conn.DelChain(&nftables.Chain{Name: c.Name, Table: b.table})
		}
	}
	for _, s := range sets {
		if !s.Anonymous && b.sets[s.Name] == nil {
			b.conn.DelSet(&nftables.Set{Name: s.Name, Table: b.table})
		}
	}
}

// fill replaces what the configuration alone decides: the automaton and what the daemon may reach.
func (b *builder) fill(cfg Config) {
	steps, ports, _ := knock.Compile(cfg.Sequences)
	var stepElements, portElements, reach []nftables.SetElement
	for _, s := range steps {
		stepElements = append(stepElements, nftables.SetElement{
			Key: slices.Concat(native.PutUint32(b.state(s.State)), portKey(s.Port)), Val: native.PutUint32(b.state(s.Next))})
	}
	for _, p := range ports {
		portElements = append(portElements, nftables.SetElement{Key: portKey(p)})
	}
	private := disjoint(cfg.AllowPrivate)
	for _, p := range private {
		if p.Addr().Is4() {
			reach = append(reach, reachElement(p, 0, anyPort))
		}
	}
	for i, r := range cfg.Reach {
		covered := slices.ContainsFunc(private, func(p netip.Prefix) bool { return p.Contains(r.Addr()) })
		if r.Addr().Is4() && !covered && !slices.Contains(cfg.Reach[:i], r) {
			reach = append(reach, reachElement(netip.PrefixFrom(r.Addr(), 32), r.Port(), r.Port()))
		}
	}
	var trusted4, trusted6 []netip.Prefix
	for _, p := range disjoint(cfg.Trusted) {
		if p.Addr().Is4() {
			trusted4 = append(trusted4, p)
		} else {
			trusted6 = append(trusted6, p)
		}
	}
	for name, elements := range map[string][]nftables.SetElement{"step": stepElements, "knockports": portElements, "reach": reach,
		"trusted4": ranges(trusted4), "trusted6": ranges(trusted6)} {
		b.conn.FlushSet(b.named(name))
		for part := range slices.Chunk(elements, chunk) {
			if err := b.conn.SetAddElements(b.named(name), part); err != nil && b.err == nil {
				b.err = err
			}
		}
	}
}

// disjoint leaves out networks that lie within another: the kernel refuses elements that overlap.
func disjoint(list []netip.Prefix) (out []netip.Prefix) {
	for i, p := range list {
		p = p.Masked()
		if !slices.ContainsFunc(list, func(o netip.Prefix) bool { return o.Bits() < p.Bits() && o.Contains(p.Addr()) }) &&
			!slices.ContainsFunc(list[:i], func(o netip.Prefix) bool { return o.Masked() == p }) {
			out = append(out, p)
		}
	}
	return out
}

// portKey is protocol . port, each padded to 32 bits.
func portKey(p knock.Port) []byte {
	return []byte{p.Proto, 0, 0, 0, byte(p.Number >> 8), byte(p.Number), 0, 0}
}

// chunk is how many elements go into one message: the library's 16-bit length wraps silently above some 1,400.
const chunk = 1000

// tokenSetsLocked creates tokens and spent with what nft calls typeof. The library cannot say it, and without it a listing
// of the table would not load again.
func (f *Firewall) tokenSetsLocked() error {
	tokens := append(rawSet("tokens", 1, unix.NFT_SET_MAP|unix.NFT_SET_TIMEOUT, tokenTimeout, true),
		netlink.Attribute{Type: unix.NFTA_SET_DATA_TYPE, Data: network.PutUint32(nftables.TypeMark.GetNFTMagic())},
		netlink.Attribute{Type: unix.NFTA_SET_DATA_LEN, Data: network.PutUint32(4)})
	spent := rawSet("spent", 2, unix.NFT_SET_TIMEOUT|unix.NFT_SET_EVAL, spentTimeout, false)
	return f.batchLocked(rawMessage{unix.NFT_MSG_NEWSET, netlink.Create, tokens}, rawMessage{unix.NFT_MSG_NEWSET, netlink.Create, spent})
}

func rawSet(name string, id, flags uint32, timeout time.Duration, isMap bool) []netlink.Attribute {
	size, _ := netlink.MarshalAttributes([]netlink.Attribute{{Type: unix.NFTA_SET_DESC_SIZE, Data: network.PutUint32(tokenSize)}})
	return []netlink.Attribute{
		{Type: unix.NFTA_SET_TABLE, Data: []byte(TableName + "\x00")},
		{Type: unix.NFTA_SET_NAME, Data: []byte(name + "\x00")},
		{Type: unix.NFTA_SET_FLAGS, Data: network.PutUint32(flags)},
		{Type: unix.NFTA_SET_KEY_TYPE, Data: network.PutUint32(nftables.TypeInteger.GetNFTMagic())},
		{Type: unix.NFTA_SET_KEY_LEN, Data: network.PutUint32(knock.TokenSize)},
		{Type: unix.NFTA_SET_ID, Data: network.PutUint32(0xffff0000 + id)},
		{Type: unix.NFTA_SET_TIMEOUT, Data: network.PutUint64(uint64(timeout.Milliseconds()))},
		{Type: unix.NLA_F_NESTED | unix.NFTA_SET_DESC, Data: size},
		{Type: unix.NFTA_SET_USERDATA, Data: typeOf(isMap)},
	}
}

// typeOf is nft's note to itself that the key is the expression @th,64,128 and the data meta mark: a list of type,
// length, value, nested (nftables: include/expression.h, src/payload.c, src/meta.c, their build_udata).
func typeOf(isMap bool) (b []byte) {
	field := func(kind byte, v []byte) []byte { return append([]byte{kind, byte(len(v))}, v...) }
	number := func(kind byte, v uint32) []byte { return field(kind, native.PutUint32(v)) }
	const (
		keyByteOrder, dataByteOrder, keyTypeof, dataTypeof = 0, 1, 3, 4
		bigEndian, hostEndian                              = 2, 1
		expression, expressionData                         = 0, 1
		isPayload, isMeta, metaMark                        = 7, 9, 3
		transportHeader                                    = 3
	)
	key := slices.Concat(number(expression, isPayload), field(expressionData, slices.Concat(
		number(0, 0), number(1, 0), // no named protocol or field: a raw payload
		number(2, transportHeader), number(3, 64), number(4, 8*knock.TokenSize)))) // offset and length in bits
	b = number(keyByteOrder, bigEndian)
	if isMap {
		b = append(b, number(dataByteOrder, hostEndian)...)
	}
	b = append(b, field(keyTypeof, key)...)
	if isMap {
		mark := slices.Concat(number(expression, isMeta), field(expressionData, number(0, metaMark)))
		b = append(b, field(dataTypeof, mark)...)
	}
	return b
}
