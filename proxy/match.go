package proxy

import (
	"fmt"
	"net/netip"
	"path"
	"slices"
	"strings"
)

// matcher is a compiled list of patterns.
type matcher struct {
	exact    map[string]bool
	suffix   map[string]bool // without the "*."
	globs    [][]string      // of sets: labels, some with a * inside; a first label "*" stands for one label or more
	prefixes []netip.Prefix
}

func (m *matcher) matches(d Destination) bool {
	if d.Addr.IsValid() {
		return m.contains(d.Addr)
	}
	if m.exact[d.Name] {
		return true
	}
	for rest := d.Name; ; {
		_, parent, ok := strings.Cut(rest, ".")
		if !ok {
			break
		}
		if m.suffix[parent] {
			return true
		}
		rest = parent
	}
	if len(m.globs) == 0 {
		return false
	}
	labels := strings.Split(d.Name, ".")
	return slices.ContainsFunc(m.globs, func(g []string) bool { return globMatches(g, labels) })
}

func (m *matcher) contains(a netip.Addr) bool {
	return slices.ContainsFunc(m.prefixes, func(p netip.Prefix) bool { return p.Contains(a) })
}

// globMatches compares label by label from the right, so that a * never crosses a dot but at the left end.
func globMatches(g, n []string) bool {
	if g[0] == "*" {
		if g = g[1:]; len(n) <= len(g) {
			return false
		}
		n = n[len(n)-len(g):]
	}
	return slices.EqualFunc(g, n, func(g, n string) bool { ok, _ := path.Match(g, n); return ok })
}

// add compiles one pattern of the configuration.
func (m *matcher) add(pattern string, regions []string) error {
	if set, ok := strings.CutPrefix(pattern, "@"); ok {
		return m.addSet(set, regions)
	}
	if scheme, rest, ok := strings.Cut(pattern, "://"); ok {
		host, _, _ := strings.Cut(rest, "/")
		return fmt.Errorf("%s: want a name, without %s, as in %s", quote(pattern), quote(scheme+"://"), quote(host))
	}
	if strings.Contains(pattern, "/") {
		p, err := netip.ParsePrefix(pattern)
		switch {
		case err != nil || p.Addr().Is4In6():
			return fmt.Errorf("%s is not a CIDR: write 192.0.2.0/24 or 2001:db8::/32", quote(pattern))
		case p != p.Masked():
			return fmt.Errorf("%s has bits below its length: write %v", quote(pattern), p.Masked())
		}
		m.prefixes = append(m.prefixes, p)
		return nil
	}
	if a, err := netip.ParseAddr(pattern); err == nil {
		if a.Zone() != "" || a.Is4In6() {
			return fmt.Errorf("%s: write a plain address", quote(pattern))
		}
		m.prefixes = append(m.prefixes, netip.PrefixFrom(a, a.BitLen()))
		return nil
	}
	name, wide := strings.CutPrefix(pattern, "*.")
	if strings.Contains(name, "*") {
		return fmt.Errorf(`%s: a * stands only for whole labels at the front, as in "*.example.com"`, quote(pattern))
	}
	name, err := canonicalName(name)
	if err != nil {
		return fmt.Errorf("%s is no name, suffix, address, CIDR or set: %w", quote(pattern), err)
	}
	if wide {
		m.suffix[name] = true
	} else {
		m.exact[name] = true
	}
	return nil
}

func (m *matcher) addSet(name string, regions []string) error {
	patterns, ok := sets()[name]
	if !ok {
		return fmt.Errorf(`set "@%s" does not exist: there are @aws, @customer-hosted, @github and @terraform`, name)
	}
	for _, p := range patterns {
		if !strings.Contains(p, "{r}") {
			m.addTrusted(p)
			continue
		}
		if len(regions) == 0 {
			return fmt.Errorf(`set "@%s" needs proxy.regions, which is empty: add the regions you work in, such as "us-east-1"`, name)
		}
		for _, r := range regions {
			m.addTrusted(strings.ReplaceAll(p, "{r}", r))
		}
	}
	return nil
}

// addTrusted compiles a pattern of a set, which is canonical already and may hold a * inside a label.
func (m *matcher) addTrusted(p string) {
	if rest, ok := strings.CutPrefix(p, "*."); ok && !strings.Contains(rest, "*") {
		m.suffix[rest] = true
	} else if strings.Contains(p, "*") {
		m.globs = append(m.globs, strings.Split(p, "."))
	} else {
		m.exact[p] = true
	}
}

func compileMatcher(patterns, regions []string) (*matcher, []error) {
	m := &matcher{exact: map[string]bool{}, suffix: map[string]bool{}}
	var errs []error
	for _, p := range patterns {
		if err := m.add(p, regions); err != nil {
			errs = append(errs, err)
		}
	}
	return m, errs
}
