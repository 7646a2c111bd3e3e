package proxy

import (
	"encoding/binary"
	"net/netip"
	"slices"
)

// ranges are judged in order, the first that holds an address names it. Everything of IPv6 outside 2000::/3 is reserved.
var ranges = []struct {
	prefix netip.Prefix
	reason Reason
}{
	{netip.MustParsePrefix("127.0.0.0/8"), Loopback},
	{netip.MustParsePrefix("::1/128"), Loopback},
	{netip.MustParsePrefix("0.0.0.0/8"), Unspecified},
	{netip.MustParsePrefix("::/128"), Unspecified},
	{netip.MustParsePrefix("169.254.0.0/16"), Metadata},
	{netip.MustParsePrefix("fe80::/10"), Metadata},
	{netip.MustParsePrefix("fd00:ec2::/32"), Metadata},      // EC2: metadata, resolver, clock
	{netip.MustParsePrefix("fd20:ce::/32"), Metadata},       // Google Cloud
	{netip.MustParsePrefix("168.63.129.16/32"), Metadata},   // Azure
	{netip.MustParsePrefix("100.100.100.200/32"), Metadata}, // Alibaba Cloud
	{netip.MustParsePrefix("192.0.0.192/32"), Metadata},     // Oracle Cloud
	{netip.MustParsePrefix("224.0.0.0/4"), Multicast},
	{netip.MustParsePrefix("255.255.255.255/32"), Multicast},
	{netip.MustParsePrefix("ff00::/8"), Multicast},
	{netip.MustParsePrefix("10.0.0.0/8"), Private},
	{netip.MustParsePrefix("172.16.0.0/12"), Private},
	{netip.MustParsePrefix("192.168.0.0/16"), Private},
	{netip.MustParsePrefix("fc00::/7"), Private},
	{netip.MustParsePrefix("fec0::/10"), Private},
	{netip.MustParsePrefix("100.64.0.0/10"), Shared},
	{netip.MustParsePrefix("192.0.0.0/24"), Reserved},
	{netip.MustParsePrefix("192.0.2.0/24"), Reserved},
	{netip.MustParsePrefix("192.88.99.0/24"), Reserved},
	{netip.MustParsePrefix("198.18.0.0/15"), Reserved},
	{netip.MustParsePrefix("198.51.100.0/24"), Reserved},
	{netip.MustParsePrefix("203.0.113.0/24"), Reserved},
	{netip.MustParsePrefix("240.0.0.0/4"), Reserved},
	{netip.MustParsePrefix("2001::/23"), Reserved}, // Teredo and other protocols'
	{netip.MustParsePrefix("2001:db8::/32"), Reserved},
	{netip.MustParsePrefix("2002::/16"), Reserved}, // 6to4
	{netip.MustParsePrefix("3fff::/20"), Reserved},
}

var (
	globalUnicast = netip.MustParsePrefix("2000::/3")
	nat64         = netip.MustParsePrefix("64:ff9b::/96")
	nat64Local    = netip.MustParsePrefix("64:ff9b:1::/48")
	teredo        = netip.MustParsePrefix("2001::/32")
	sixToFour     = netip.MustParsePrefix("2002::/16")
	v4Compatible  = netip.MustParsePrefix("::/96")
	v4Translated  = netip.MustParsePrefix("::ffff:0:0:0/96")
)

// always reports whether no allow_private opens the class.
func (r Reason) always() bool {
	switch r {
	case OwnAddress, Loopback, Metadata, Unspecified, Multicast:
		return true
	}
	return false
}

// judge says why a is refused whatever a rule says, or "" if it is not. An address that hides IPv4 ones is at least as
// bad as each of them.
func judge(a netip.Addr, allowPrivate []netip.Prefix) Reason {
	if !a.IsValid() {
		return Unspecified
	}
	a = a.Unmap().WithZone("")
	worst := classify(a)
	for _, v4 := range hidden(a) {
		if c := classify(v4); c.always() || worst == "" {
			worst = c
		}
	}
	if worst == "" || worst.always() {
		return worst
	}
	if slices.ContainsFunc(allowPrivate, func(p netip.Prefix) bool { return p.Contains(a) }) {
		return ""
	}
	return worst
}

func classify(a netip.Addr) Reason {
	for _, r := range ranges {
		if r.prefix.Contains(a) {
			return r.reason
		}
	}
	// The well-known NAT64 prefix is the one way to IPv4 that a network of IPv6 alone has.
	if a.Is6() && !globalUnicast.Contains(a) && !nat64.Contains(a) {
		return Reserved
	}
	return ""
}

// hidden lists the IPv4 addresses that a tunnel or translator would send packets for a to.
func hidden(a netip.Addr) (v4 []netip.Addr) {
	if !a.Is6() {
		return nil
	}
	b := a.As16()
	at := func(i int) netip.Addr { return netip.AddrFrom4([4]byte(b[i : i+4])) }
	switch {
	case a.IsUnspecified() || a.IsLoopback():
		return nil
	case nat64.Contains(a), v4Compatible.Contains(a), v4Translated.Contains(a):
		v4 = append(v4, at(12))
	case nat64Local.Contains(a):
		// RFC 6052, 2.2: behind a prefix of 48, 56, 64 or 96 bits, around byte 8, which is zero. Which one is a local
		// matter; the wrong readings mostly begin with a zero.
		for _, c := range [][4]byte{{b[6], b[7], b[9], b[10]}, {b[7], b[9], b[10], b[11]}, {b[9], b[10], b[11], b[12]}, at(12).As4()} {
			if c[0] != 0 {
				v4 = append(v4, netip.AddrFrom4(c))
			}
		}
	case sixToFour.Contains(a):
		v4 = append(v4, at(2))
	case teredo.Contains(a):
		client := at(12).As4()
		for i := range client {
			client[i] ^= 0xff
		}
		v4 = append(v4, at(4), netip.AddrFrom4(client))
	}
	if id := binary.BigEndian.Uint32(b[8:]); id == 0x00005efe || id == 0x02005efe { // ISATAP, RFC 5214, 6.1
		v4 = append(v4, at(12))
	}
	return v4
}
