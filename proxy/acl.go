package proxy

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Request is who wants to go where.
type Request struct {
	User        string
	Groups      []string
	Destination Destination
	Plain       bool // plain HTTP, not a tunnel
}

// Decision is what becomes of a request. The zero value denies.
type Decision struct {
	Allow    bool
	Observed bool   // allowed only because rules are observed; Reason says why they would refuse
	Reason   Reason // Allowed, or why not
	Rule     int    // the deciding rule, counted from 1; 0 for none
	TLS      bool   // the tunnel must open with a ClientHello for the destination
}

// Policy is a compiled configuration. It never changes, so that it can be read from anywhere.
type Policy struct {
	deny, allow  []rule
	allowPrivate []netip.Prefix
	own          []netip.Prefix
	ipv6         bool
	observe      bool
}

type rule struct {
	number   int
	to       *matcher
	except   *matcher
	ports    portSet
	anyPort  bool
	groups   []string
	users    []string
	everyone bool
	tls      bool
}

// portSet has a bit for each port.
type portSet [1 << 16 / 64]uint64

func (s *portSet) has(p uint16) bool { return s[p/64]&(1<<(p%64)) != 0 }

// Compile checks the configuration and builds its policy. Every mistake is named, in one error.
func Compile(c Config) (*Policy, error) {
	p := &Policy{ipv6: c.IPv6, observe: c.Observe, own: slices.Clone(c.Own)}
	var errs []error
	fail := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	for _, r := range c.Regions {
		if label := strings.Trim(r, "abcdefghijklmnopqrstuvwxyz0123456789-"); r == "" || label != "" || !strings.Contains(r, "-") {
			fail(`proxy.regions %s is no region: write its code, such as "us-east-1"`, quote(r))
		}
	}
	for _, a := range c.AllowPrivate {
		switch {
		case !a.IsValid() || a.Addr().Is4In6():
			fail("proxy.allow_private %v is no CIDR: write one such as 10.20.0.0/16", a)
		case a != a.Masked():
			fail("proxy.allow_private %v has bits below its length: write %v", a, a.Masked())
		case a.Bits() < 7:
			fail("proxy.allow_private %v is nearly everything: name the networks that are meant", a)
		case judge(a.Addr(), nil).always():
			fail("proxy.allow_private %v: %s addresses are never reached: remove it", a, judge(a.Addr(), nil))
		default:
			p.allowPrivate = append(p.allowPrivate, a)
		}
	}
	for i, r := range c.Rules {
		compiled, es := compileRule(i+1, r, c.Regions)
		errs = append(errs, es...)
		if len(r.Deny) > 0 {
			p.deny = append(p.deny, compiled)
		} else {
			p.allow = append(p.allow, compiled)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return p, nil
}

func compileRule(n int, r Rule, regions []string) (c rule, errs []error) {
	fail := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("proxy.rule %d: "+format, append([]any{n}, args...)...))
	}
	denies := len(r.Deny) > 0
	switch {
	case denies && len(r.Allow) > 0:
		fail("both deny and allow: make two rules of it")
	case !denies && len(r.Allow) == 0:
		fail("neither deny nor allow: add the destinations, or remove the rule")
	}
	if !denies && len(r.Except) > 0 {
		fail("except %q belongs to a deny rule: move it there", r.Except)
	}
	if denies && r.TLS {
		fail("tls = true belongs to an allow rule: remove it")
	}
	if slices.Contains(r.Ports, 0) {
		fail("ports: 0 is no port: remove it")
	}
	if slices.Contains(r.Users, "*") {
		fail(`users "*" is no user: write groups = ["*"]`)
	}
	c = rule{
		number: n, tls: r.TLS,
		anyPort: denies && len(r.Ports) == 0,
		groups:  slices.Clone(r.Groups), users: slices.Clone(r.Users),
		everyone: slices.Contains(r.Groups, "*") || denies && len(r.Groups) == 0 && len(r.Users) == 0,
	}
	for _, p := range r.Ports {
		c.ports[p/64] |= 1 << (p % 64)
	}
	what, patterns := "allow", r.Allow
	if denies {
		what, patterns = "deny", r.Deny
	}
	var es []error
	c.to, es = compileMatcher(patterns, regions)
	for _, err := range es {
		fail("%s %w", what, err)
	}
	c.except, es = compileMatcher(r.Except, regions)
	for _, err := range es {
		fail("except %w", err)
	}
	return c, errs
}

// concerns reports whether the rule is about this user and port.
func (r *rule) concerns(q Request) bool {
	return (r.anyPort || r.ports.has(q.Destination.Port)) && r.isFor(q.User, q.Groups)
}

func (r *rule) isFor(user string, groups []string) bool {
	return r.everyone || slices.Contains(r.users, user) ||
		slices.ContainsFunc(groups, func(g string) bool { return slices.Contains(r.groups, g) })
}

// Decide says whether q may go on: first what is never allowed, then the denials, then the allowances in their order. A name
// that is allowed is judged once more, by DecideAddress, for each address it resolves to.
func (p *Policy) Decide(q Request) Decision {
	if q.User == "" {
		return Decision{Reason: NoSession}
	}
	if !q.Destination.Valid() {
		return Decision{Reason: BadDestination}
	}
	if a := q.Destination.Addr; a.IsValid() {
		if why := p.judge(a); why != "" {
			return Decision{Reason: why}
		}
	}
	return p.observed(p.rules(q))
}

// DecideAddress judges an address that q's name resolved to.
func (p *Policy) DecideAddress(q Request, a netip.Addr) Decision {
	if why := p.judge(a); why != "" {
		return Decision{Reason: why}
	}
	for i := range p.deny {
		r := &p.deny[i]
		if r.concerns(q) && r.to.contains(a) && !r.except.contains(a) && !r.except.matches(q.Destination) {
			return p.observed(Decision{Reason: DeniedByRule, Rule: r.number})
		}
	}
	return Decision{Allow: true, Reason: Allowed}
}

func (p *Policy) rules(q Request) Decision {
	for i := range p.deny {
		if r := &p.deny[i]; r.concerns(q) && r.to.matches(q.Destination) && !r.except.matches(q.Destination) {
			return Decision{Reason: DeniedByRule, Rule: r.number}
		}
	}
	refusal := Decision{Reason: NoRule}
	for i := range p.allow {
		r := &p.allow[i]
		if !r.concerns(q) || !r.to.matches(q.Destination) {
			continue
		}
		if r.tls && q.Plain {
			refusal = Decision{Reason: TLSRequired, Rule: r.number}
			continue
		}
		return Decision{Allow: true, Reason: Allowed, Rule: r.number, TLS: r.tls}
	}
	return refusal
}

func (p *Policy) observed(d Decision) Decision {
	if !d.Allow && p.observe {
		d.Allow, d.Observed = true, true
	}
	return d
}

// judge says why a is refused whatever a rule says, as far as the configuration knows; "" if it is not.
func (p *Policy) judge(a netip.Addr) Reason {
	if slices.ContainsFunc(p.own, func(o netip.Prefix) bool { return o.Contains(a.Unmap()) }) {
		return OwnAddress
	}
	if why := judge(a, p.allowPrivate); why != "" {
		return why
	}
	if a.Unmap().Is6() && !p.ipv6 {
		return IPv6Off
	}
	return ""
}
