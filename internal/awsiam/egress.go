package awsiam

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

// The widest egress that a policy may name. A wider one lets strangers in; nobody has so many addresses of one bastion.
const (
	widest4 = 24
	widest6 = 56 // a VPC's block
)

// Networks that no request to AWS comes from. The second list is of those that stand in examples and tests.
var (
	unseen = prefixes("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16", "224.0.0.0/3",
		"::/8", "fc00::/7", "fe80::/10", "ff00::/8")
	examples = prefixes("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "198.18.0.0/15", "2001:db8::/32")
)

func prefixes(texts ...string) (all []netip.Prefix) {
	for _, s := range texts {
		all = append(all, netip.MustParsePrefix(s))
	}
	return all
}

// ParseEgress reads CIDRs, as AWS sees the bastion.
func ParseEgress(texts ...string) (egress []netip.Prefix, err error) {
	for _, s := range texts {
		p, err := netip.ParsePrefix(s)
		if addr, bare := netip.ParseAddr(s); bare == nil {
			return nil, fmt.Errorf("egress %q has no prefix length: write %v", s, netip.PrefixFrom(addr, addr.BitLen()))
		} else if err != nil {
			return nil, fmt.Errorf("egress %q is no CIDR: write the address that AWS sees, as in 203.0.113.10/32", s)
		}
		egress = append(egress, p)
	}
	return egress, nil
}

// checkEgress says which of the CIDRs a policy must not name, and warns of those that can only be placeholders.
func checkEgress(egress []netip.Prefix) (warnings []string, err error) {
	if len(egress) == 0 {
		return nil, errors.New("no egress address: give the one that AWS sees with --egress CIDR, or set egress.public in the configuration")
	}
	for i, p := range egress {
		widest := widest4
		if p.Addr().Is6() {
			widest = widest6
		}
		overlaps := func(q netip.Prefix) bool { return p.Overlaps(q) }
		switch {
		case !p.IsValid():
			return nil, fmt.Errorf("egress number %d is no CIDR: write the address that AWS sees, as in 203.0.113.10/32", i+1)
		case p.Addr().Is4In6():
			return nil, fmt.Errorf("egress %v: an IPv4 address in IPv6's form, which AWS never sees: write it as IPv4", p)
		case p != p.Masked():
			return nil, fmt.Errorf("egress %v: bits are set past the prefix: write %v, or %v for the one address", p, p.Masked(), netip.PrefixFrom(p.Addr(), p.Addr().BitLen()))
		case p.Bits() < widest:
			return nil, fmt.Errorf("egress %v: wider than /%d, so a stolen key would work for strangers: name the bastion's own addresses", p, widest)
		case slices.ContainsFunc(unseen, overlaps):
			return nil, fmt.Errorf("egress %v: private or reserved, and AWS never sees it: name the public address, which checkip.amazonaws.com shows through the tunnel", p)
		case slices.Contains(egress[:i], p):
			return nil, fmt.Errorf("egress %v: stands twice: remove one", p)
		case slices.ContainsFunc(examples, overlaps):
			warnings = append(warnings, fmt.Sprintf("egress %v stands in examples only, and nobody comes from there: with it a guard locks everybody out", p))
		}
	}
	return warnings, nil
}
