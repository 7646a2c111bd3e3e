package proxy

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
)

// PAC is a browser's automatic configuration for a user: every host that an allow rule names for him, on whatever port and
// denied by another rule or not, goes to the proxy or nowhere; all others go their own way.
//
// It follows no name to its address (isInNet would ask DNS): networks in rules are for hosts that are written as addresses.
// ECMAScript 3, which is what the oldest of its readers speak.
func (p *Policy) PAC(user string, groups []string, at netip.AddrPort) []byte {
	names, suffixes := map[string]bool{}, map[string]bool{}
	patterns, nets := map[string]bool{}, map[string]bool{}
	for i := range p.allow {
		r := &p.allow[i]
		if !r.isFor(user, groups) {
			continue
		}
		maps.Copy(names, r.to.exact)
		maps.Copy(suffixes, r.to.suffix)
		for _, g := range r.to.globs {
			patterns[globExpression(g)] = true
		}
		for _, n := range r.to.prefixes {
			if test := netTest(n); n.Addr().Is4() || p.ipv6 {
				nets[test] = true
			}
		}
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, `// What perimeterd allows %s goes to the proxy, and nowhere else. All other traffic is none of its business.
function FindProxyForURL(url, host) {
	var proxy = "PROXY %v";
	var names = %s;
	var suffixes = %s;
	var has = Object.prototype.hasOwnProperty;
	host = host.toLowerCase().replace(/^\[|\]$/g, "").replace(/\.$/, "");
	if (has.call(names, host)) return proxy;
	for (var i = host.indexOf("."); i >= 0; i = host.indexOf(".", i + 1)) {
		if (has.call(suffixes, host.substring(i + 1))) return proxy;
	}
`, quote(user), at, jsSet(names), jsSet(suffixes))
	for _, e := range slices.Sorted(maps.Keys(patterns)) {
		fmt.Fprintf(&b, "\tif (/%s/.test(host)) return proxy;\n", e)
	}
	if len(nets) > 0 {
		b.WriteString("\tvar four = /^\\d+\\.\\d+\\.\\d+\\.\\d+$/.test(host), six = host.indexOf(\":\") >= 0;\n")
	}
	for _, test := range slices.Sorted(maps.Keys(nets)) {
		fmt.Fprintf(&b, "\tif (%s) return proxy;\n", test)
	}
	b.WriteString("\treturn \"DIRECT\";\n}\n")
	return b.Bytes()
}

// jsSet is an object whose keys are the names. They are canonical, so of letters that JSON and JavaScript read the same.
func jsSet(names map[string]bool) string {
	lines := []string{}
	for _, n := range slices.Sorted(maps.Keys(names)) {
		quoted, _ := json.Marshal(n)
		lines = append(lines, "\n\t\t"+string(quoted)+": 1")
	}
	if len(lines) == 0 {
		return "{}"
	}
	return "{" + strings.Join(lines, ",") + "\n\t}"
}

// globExpression says what globMatches does.
func globExpression(labels []string) string {
	out := make([]string, len(labels))
	for i, l := range labels {
		if out[i] = strings.ReplaceAll(l, "*", "[^.]*"); i == 0 && l == "*" {
			out[i] = ".+"
		}
	}
	return "^" + strings.Join(out, `\.`) + "$"
}

func netTest(n netip.Prefix) string {
	if n.Addr().Is4() {
		return fmt.Sprintf("four && isInNet(host, %q, %q)", n.Addr(), net.IP(net.CIDRMask(n.Bits(), 32)))
	}
	// Not in every browser; elsewhere such hosts go their own way.
	return fmt.Sprintf(`six && typeof isInNetEx == "function" && isInNetEx(host, %q)`, n)
}
