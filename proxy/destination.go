package proxy

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"unicode/utf8"

	"golang.org/x/net/idna"
)

// Destination is where a request wants to go, in the one canonical form that policy, DNS, dial and log share: either a
// name (lower case, ASCII, no trailing dot) or an address (never IPv4 in IPv6), and a port. Two Destinations are the same
// place exactly when they are ==. The zero value is no destination.
type Destination struct {
	Name string
	Addr netip.Addr
	Port uint16
}

// String is the destination as a CONNECT request would name it.
func (d Destination) String() string {
	if d.Addr.IsValid() {
		return netip.AddrPortFrom(d.Addr, d.Port).String()
	}
	return d.Name + ":" + strconv.Itoa(int(d.Port))
}

// Valid reports whether d names a place at all.
func (d Destination) Valid() bool { return (d.Name != "") != d.Addr.IsValid() && d.Port != 0 }

// errScheme is returned for URLs that are not http's, errDestination for all else that names no place.
var (
	errScheme      = errors.New("only http URLs are asked for directly: use CONNECT for https")
	errDestination = errors.New("destination")
)

// ParseAuthority reads host:port, the target of CONNECT. There is one spelling for an IPv4 address, four decimal numbers;
// what a resolver or a browser would read as an address in another spelling is an error, not a name.
func ParseAuthority(s string) (Destination, error) {
	bad := func(why string) (Destination, error) {
		return Destination{}, fmt.Errorf("%w %s: %s", errDestination, quote(s), why)
	}
	if len(s) > 1024 { // a name of 253 ASCII characters, spelled as expensively as IDNA allows
		return bad("too long")
	}
	var d Destination
	var port string
	if inner, ok := strings.CutPrefix(s, "["); ok {
		host, rest, ok := strings.Cut(inner, "]:")
		if !ok {
			return bad("want [address]:port")
		}
		a, err := netip.ParseAddr(host)
		if err != nil || !a.Is6() || a.Zone() != "" {
			return bad("not an IPv6 address without a zone")
		}
		d.Addr, port = a.Unmap(), rest
	} else {
		host, rest, ok := strings.Cut(s, ":")
		if !ok {
			return bad("no port: write host:port")
		}
		if port = rest; host == "" {
			return bad("no host")
		}
		if a, err := netip.ParseAddr(host); err == nil {
			d.Addr = a
		} else if d.Name, err = canonicalName(host); err != nil {
			return bad(err.Error())
		}
	}
	for _, c := range []byte(port) {
		if c < '0' || c > '9' {
			return bad("the port is not a number")
		}
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || port[0] == '0' {
		return bad("the port is not a number from 1 to 65535 without leading zeros")
	}
	d.Name, d.Port = strings.Clone(d.Name), uint16(n) // a piece of s would keep all of it, and what s is a piece of
	return d, nil
}

// ParseURL reads the destination of an absolute-form http URL. Without a port it is 80.
func ParseURL(s string) (Destination, error) {
	scheme, rest, ok := strings.Cut(s, "://")
	if !ok {
		return Destination{}, fmt.Errorf("%w %s: not an absolute URL: this is a proxy", errDestination, quote(s))
	}
	if !strings.EqualFold(scheme, "http") {
		return Destination{}, fmt.Errorf("%s: %w", quote(s), errScheme)
	}
	if strings.Contains(rest, "#") {
		return Destination{}, fmt.Errorf("%w %s: a fragment is never sent", errDestination, quote(s))
	}
	authority := rest
	if i := strings.IndexAny(rest, "/?"); i >= 0 {
		authority = rest[:i]
	}
	if strings.LastIndexByte(authority, ':') <= strings.LastIndexByte(authority, ']') {
		authority += ":80"
	}
	return ParseAuthority(authority)
}

// names maps as browsers do; what may stand in the result is checked by canonicalName, since underscores are fine here.
var names = idna.New(idna.MapForLookup(), idna.BidiRule(), idna.StrictDomainName(false), idna.Transitional(false))

// canonicalName brings a name into its one form: A-labels, lower case, no trailing dot.
func canonicalName(s string) (string, error) {
	ascii := true
	for i := range len(s) {
		ascii = ascii && s[i] < 0x80
	}
	name := strings.ToLower(s)
	// Plain names stay out of IDNA, which refuses some that exist (r3---sn-x.example).
	if !ascii || strings.Contains(name, "xn--") {
		var err error
		if name, err = names.ToASCII(s); err != nil || strings.ContainsRune(s, utf8.RuneError) {
			return "", errors.New("not a domain name in IDNA's terms")
		}
	}
	name = strings.TrimSuffix(name, ".")
	if name == "" {
		return "", errors.New("no host")
	}
	if len(name) > 253 {
		return "", errors.New("a name has at most 253 characters")
	}
	last := ""
	for label := range strings.SplitSeq(name, ".") {
		if len(label) == 0 || len(label) > 63 {
			return "", errors.New("labels of a name have 1 to 63 characters")
		}
		if label[0] == '-' || label[len(label)-1] == '-' {
			return "", errors.New("labels of a name do not begin or end with a hyphen")
		}
		for _, c := range []byte(label) {
			if !('a' <= c && c <= 'z' || '0' <= c && c <= '9' || c == '-' || c == '_') {
				return "", errors.New("names consist of letters, digits, hyphens, underscores and dots")
			}
		}
		last = label
	}
	if isNumber(last) {
		return "", errors.New("write an address as four decimal numbers")
	}
	return name, nil
}

// isNumber reports whether some resolver would take a name that ends in this label for an IPv4 address (WHATWG URL, "ends
// in a number").
func isNumber(label string) bool {
	digits, set := label, "0123456789"
	if hex, ok := strings.CutPrefix(label, "0x"); ok {
		digits, set = hex, "0123456789abcdef"
	}
	return strings.Trim(digits, set) == ""
}

// quote makes what a client sent fit for logs and replies: ASCII, one line, bounded, without a password or a query.
func quote(s string) string {
	const most = 200
	s, _, _ = strings.Cut(s, "?")
	if i := strings.LastIndexByte(s, '@'); i >= 0 {
		scheme, _, ok := strings.Cut(s[:i], "://")
		if s = "…" + s[i:]; ok {
			s = scheme + "://" + s
		}
	}
	if len(s) > most {
		s = s[:most] + "…"
	}
	return strconv.QuoteToASCII(s)
}
