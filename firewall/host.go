package firewall

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"perimeterd/knock"
)

// Host drops what Config.Allow does not name; Guard decides the ports of the daemon only.
const Host Mode = "host"

// ICMP stands for ICMP over IPv4 and ICMPv6 in an Allow.
const ICMP = 1

// Allow is something that host mode lets in besides the daemon's own ports.
type Allow struct {
	Proto       uint8        // knock.TCP, knock.UDP or ICMP
	First, Last uint16       // ports, inclusive; not with ICMP
	From        netip.Prefix // zero: anyone
	Interface   string       // empty: any
}

// ParseAllow reads "22/tcp", "8000-8010/udp from 198.51.100.0/24 on eth1" and "icmp from 2001:db8::/32".
func ParseAllow(s string) (a Allow, err error) {
	bad := func(what string) (Allow, error) {
		return Allow{}, fmt.Errorf("%q: %s: write it as in \"22/tcp\", \"8000-8010/udp from 198.51.100.0/24 on eth1\" or \"icmp\"", s, what)
	}
	words := strings.Fields(s)
	if len(words)%2 != 1 {
		return bad("want a service, then pairs of from NETWORK and on INTERFACE")
	}
	if words[0] == "icmp" {
		a.Proto = ICMP
	} else {
		ports, proto, _ := strings.Cut(words[0], "/")
		switch proto {
		case "tcp":
			a.Proto = knock.TCP
		case "udp":
			a.Proto = knock.UDP
		default:
			return bad(fmt.Sprintf("protocol %q is not tcp, udp or icmp", proto))
		}
		first, last, isRange := strings.Cut(ports, "-")
		if !isRange {
			last = first
		}
		f, err1 := strconv.ParseUint(first, 10, 16)
		l, err2 := strconv.ParseUint(last, 10, 16)
		if err1 != nil || err2 != nil || f == 0 || f > l {
			return bad(fmt.Sprintf("ports %q are not from 1 to 65535, the lower one first", ports))
		}
		a.First, a.Last = uint16(f), uint16(l)
	}
	for i := 1; i < len(words); i += 2 {
		switch value := words[i+1]; {
		case words[i] == "from" && !a.From.IsValid():
			if a.From, err = netip.ParsePrefix(value); err != nil {
				addr, err := netip.ParseAddr(value)
				if err != nil || addr.Zone() != "" {
					return bad(fmt.Sprintf("%q is no address and no network", value))
				}
				a.From = netip.PrefixFrom(addr, addr.BitLen())
			}
			a.From = a.From.Masked()
		case words[i] == "on" && a.Interface == "" && len(value) < unix.IFNAMSIZ:
			a.Interface = value
		default:
			return bad(fmt.Sprintf("%q is not understood", words[i]+" "+value))
		}
	}
	return a, nil
}

// hostRules are what follows our own ports in host mode; what they do not accept meets the policy, drop.
func (b *builder) hostRules(cfg Config) {
	b.rule("host", ctState(expr.CtStateBitINVALID), drop())
	icmp6 := func(types ...byte) match {
		var elements []nftables.SetElement
		for _, t := range types {
			elements = append(elements, nftables.SetElement{Key: []byte{t}})
		}
		m, err := b.anonymous(&nftables.Set{KeyType: nftables.TypeICMP6Type}, elements)
		if err != nil && b.err == nil {
			b.err = err
		}
		return join(proto(unix.IPPROTO_ICMPV6), transport(0, 1, regKey), m)
	}
	// Without neighbour discovery there is no IPv6; a router in between cannot forge the hop limit (RFC 4861, 6.1).
	b.rule("host", ipv6(), header(7, 1, regKey), equal([]byte{255}), icmp6(133, 134, 135, 136), accept())
	b.rule("host", ipv6(), icmp6(130, 131, 132, 143), accept()) // multicast listeners (RFC 3810)
	b.rule("host", proto(unix.IPPROTO_UDP), transport(0, 4, regKey), equal([]byte{0, 67, 0, 68}), accept())
	b.rule("host", in6(8, netip.MustParsePrefix("fe80::/10")), proto(unix.IPPROTO_UDP), transport(0, 4, regKey), equal([]byte{2, 35, 2, 34}), accept()) // 547, 546
	for _, a := range cfg.Allow {
		var m match
		if a.Interface != "" {
			m = join(load(expr.MetaKeyIIFNAME, regKey), equal(device(a.Interface)))
		}
		if a.From.IsValid() && a.From.Addr().Is4() {
			m = join(m, in4(12, a.From))
		} else if a.From.IsValid() {
			m = join(m, in6(8, a.From))
		}
		switch {
		case a.Proto == ICMP && (!a.From.IsValid() || a.From.Addr().Is4()):
			b.rule("host", m, proto(unix.IPPROTO_ICMP), accept())
			if a.From.IsValid() {
				continue
			}
			fallthrough
		case a.Proto == ICMP:
			b.rule("host", m, proto(unix.IPPROTO_ICMPV6), accept())
		case a.First == a.Last:
			b.rule("host", m, proto(a.Proto), dport(), equal(network.PutUint16(a.First)), accept())
		default:
			b.rule("host", m, proto(a.Proto), dport(),
				match{&expr.Cmp{Op: expr.CmpOpGte, Register: regKey, Data: network.PutUint16(a.First)},
					&expr.Cmp{Op: expr.CmpOpLte, Register: regKey, Data: network.PutUint16(a.Last)}}, accept())
		}
	}
}
