package firewall

import (
	"math"
	"net/netip"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Registers. A 128-bit register is four 32-bit ones; the parts of a concatenated key lie one after the other from key on.
// Data must lie in a 128-bit register: left in a 32-bit one, `nft list ruleset` aborts on an assertion.
const (
	regKey  = unix.NFT_REG_1
	regKey2 = unix.NFT_REG32_01 // second word of the key
	regKey3 = unix.NFT_REG32_02 // third word
	regData = unix.NFT_REG_2
	regPort = unix.NFT_REG_2 // behind a 16-byte address
)

// Operations of dynset; x/sys/unix has no name for the third (linux/netfilter/nf_tables.h: enum nft_dynset_ops).
const (
	dynsetAdd    = unix.NFT_DYNSET_OP_ADD
	dynsetUpdate = unix.NFT_DYNSET_OP_UPDATE
	dynsetDelete = 2
)

// Marks are in native byte order, what comes from a packet is in network byte order.
var (
	network = binaryutil.BigEndian
	native  = binaryutil.NativeEndian
)

// match is a piece of a rule: expressions that run one after the other.
type match = []expr.Any

func verdict(kind expr.VerdictKind, chain string) match {
	return match{&expr.Verdict{Kind: kind, Chain: chain}}
}

func accept() match  { return verdict(expr.VerdictAccept, "") }
func drop() match    { return verdict(expr.VerdictDrop, "") }
func returns() match { return verdict(expr.VerdictReturn, "") }
func rejectX() match {
	return reject(unix.NFT_REJECT_ICMPX_UNREACH, unix.NFT_REJECT_ICMPX_PORT_UNREACH)
}
func reject4() match           { return reject(unix.NFT_REJECT_ICMP_UNREACH, 3) } // RFC 792: port unreachable
func reject6() match           { return reject(unix.NFT_REJECT_ICMP_UNREACH, 4) } // RFC 4443: port unreachable
func reject(t, code int) match { return match{&expr.Reject{Type: uint32(t), Code: uint8(code)}} }

func equal(data []byte) match {
	return match{&expr.Cmp{Op: expr.CmpOpEq, Register: regKey, Data: data}}
}
func differs(data []byte) match {
	return match{&expr.Cmp{Op: expr.CmpOpNeq, Register: regKey, Data: data}}
}
func masked(mask []byte) match {
	return match{&expr.Bitwise{SourceRegister: regKey, DestRegister: regKey, Len: uint32(len(mask)), Mask: mask, Xor: make([]byte, len(mask))}}
}

func load(key expr.MetaKey, reg uint32) match { return match{&expr.Meta{Key: key, Register: reg}} }
func payload(base expr.PayloadBase, offset, length, reg uint32) match {
	return match{&expr.Payload{DestRegister: reg, Base: base, Offset: offset, Len: length}}
}
func transport(offset, length, reg uint32) match {
	return payload(expr.PayloadBaseTransportHeader, offset, length, reg)
}
func header(offset, length, reg uint32) match {
	return payload(expr.PayloadBaseNetworkHeader, offset, length, reg)
}

func join(parts ...match) (m match) {
	for _, p := range parts {
		m = append(m, p...)
	}
	return m
}

func ipv4() match               { return join(load(expr.MetaKeyNFPROTO, regKey), equal([]byte{unix.NFPROTO_IPV4})) }
func ipv6() match               { return join(load(expr.MetaKeyNFPROTO, regKey), equal([]byte{unix.NFPROTO_IPV6})) }
func proto(p byte) match        { return join(load(expr.MetaKeyL4PROTO, regKey), equal([]byte{p})) }
func saddr4() match             { return header(12, 4, regKey) }
func daddr4() match             { return header(16, 4, regKey) }
func saddr6() match             { return header(8, 16, regKey) }
func daddr6() match             { return header(24, 16, regKey) }
func dport() match              { return transport(2, 2, regKey) }
func token() match              { return transport(8, 16, regKey) } // behind the UDP header
func source4() match            { return join(ipv4(), saddr4()) }
func source6() match            { return join(ipv6(), saddr6()) }
func device(name string) []byte { b := make([]byte, unix.IFNAMSIZ); copy(b, name); return b }

// in4 and in6 match an address field (in bytes from the network header) against a network. nft loads only the bytes that
// count where these are whole, and masks the address where not; so does this, for equal bytecode.
func in4(field uint32, p netip.Prefix) match { return join(ipv4(), within(field, p)) }
func in6(field uint32, p netip.Prefix) match { return join(ipv6(), within(field, p)) }

func within(field uint32, p netip.Prefix) match {
	a := p.Masked().Addr().AsSlice()
	switch n := p.Bits() / 8; {
	case p.Bits() == 0:
		return nil // everything
	case p.Bits()%8 == 0:
		return join(header(field, uint32(n), regKey), equal(a[:n]))
	}
	mask := make([]byte, len(a))
	for i := range p.Bits() {
		mask[i/8] |= 0x80 >> (i % 8)
	}
	return join(header(field, uint32(len(a)), regKey), masked(mask), equal(a))
}

const tcpFlags = 0x17 // fin, syn, rst, ack (RFC 9293, 3.1)

func tcpSYN(op expr.CmpOp) match {
	return join(proto(unix.IPPROTO_TCP), transport(13, 1, regKey), masked([]byte{tcpFlags}),
		match{&expr.Cmp{Op: op, Register: regKey, Data: []byte{0x02}}})
}

func ctState(bits uint32) match {
	return join(match{&expr.Ct{Key: expr.CtKeySTATE, Register: regKey}}, masked(native.PutUint32(bits)), differs(native.PutUint32(0)))
}

func setMark(mark uint32) match {
	return match{&expr.Immediate{Register: regKey, Data: native.PutUint32(mark)},
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: regKey}}
}

func fibDestination() match {
	return match{&expr.Fib{Register: regKey, ResultADDRTYPE: true, FlagDADDR: true}}
}

// logTo reports the packet to user space at once; without a prefix it is an opening.
func logTo(group uint16, prefix string) match {
	l := &expr.Log{Key: 1<<unix.NFTA_LOG_GROUP | 1<<unix.NFTA_LOG_QTHRESHOLD, Group: group, QThreshold: 1}
	if prefix != "" {
		l.Key |= 1 << unix.NFTA_LOG_PREFIX
		l.Data = []byte(prefix)
	}
	return match{l}
}

// rate allows n packets per unit, matching while below it.
func rate(n uint64, unit expr.LimitTime, burst uint32) *expr.Limit {
	return &expr.Limit{Type: expr.LimitTypePkts, Rate: n, Unit: unit, Burst: burst}
}

func (b *builder) lookup(set string) match {
	s := b.named(set)
	return match{&expr.Lookup{SourceRegister: regKey, SetName: s.Name, SetID: s.ID}}
}

func (b *builder) notIn(set string) match {
	s := b.named(set)
	return match{&expr.Lookup{SourceRegister: regKey, SetName: s.Name, SetID: s.ID, Invert: true}}
}

func (b *builder) markFrom(m string) match {
	s := b.named(m)
	return match{&expr.Lookup{SourceRegister: regKey, DestRegister: regKey, IsDestRegSet: true, SetName: s.Name, SetID: s.ID},
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: regKey}}
}

// markInto changes a map's element whose data is the packet's mark. A zero timeout is the map's own. The kernel wants
// the data register for every operation on a map, also for delete.
func (b *builder) markInto(op int, m string, timeout time.Duration) match {
	s := b.named(m)
	return join(load(expr.MetaKeyMARK, regData), match{&expr.Dynset{SrcRegKey: regKey, SrcRegData: regData, SetName: s.Name, SetID: s.ID,
		Operation: uint32(op), Timeout: timeout}})
}

// limited changes a set's element that carries a limit of its own, and goes on only below it.
func (b *builder) limited(op int, set string, l *expr.Limit) match {
	s := b.named(set)
	return match{&expr.Dynset{SrcRegKey: regKey, SetName: s.Name, SetID: s.ID, Operation: uint32(op), Exprs: []expr.Any{l}}}
}

// anonymous matches the key against constant elements.
func (b *builder) anonymous(s *nftables.Set, elements []nftables.SetElement) (match, error) {
	s.Table, s.Anonymous, s.Constant = b.table, true, true
	if err := b.conn.AddSet(s, elements); err != nil {
		return nil, err
	}
	return match{&expr.Lookup{SourceRegister: regKey, SetName: s.Name, SetID: s.ID}}, nil
}

// ranges are the elements of a set with flag interval: a start, and an end that is no longer in it unless the range
// reaches the last address.
func ranges(nets []netip.Prefix) (elements []nftables.SetElement) {
	for _, p := range nets {
		first := p.Masked().Addr()
		elements = append(elements, nftables.SetElement{Key: first.AsSlice()})
		if end := last(p).Next(); end.IsValid() {
			elements = append(elements, nftables.SetElement{Key: end.AsSlice(), IntervalEnd: true})
		}
	}
	return elements
}

// last is the highest address of a network.
func last(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// service is the key of address . port: every part of a concatenation is padded to 32 bits.
func service(a netip.Addr, port uint16) []byte {
	return append(a.AsSlice(), byte(port>>8), byte(port), 0, 0)
}

// reachElement lets the daemon connect to every port of a network, or to one port where first and last are the same.
func reachElement(p netip.Prefix, first, final uint16) nftables.SetElement {
	return nftables.SetElement{Key: service(p.Masked().Addr(), first), KeyEnd: service(last(p), final)}
}

const anyPort = math.MaxUint16
