package configs

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"

	"perimeterd/firewall"
	"perimeterd/internal/identity"
	"perimeterd/knock"
	"perimeterd/proxy"
	"perimeterd/vpn/gate"
)

// knock checks [knock] and writes it into c, whose ports are known already.
func (p *parser) knock(c *Config) {
	r := p.raw.Knock
	c.Knock = Knock{
		Tokens:   r.Tokens,
		Step:     p.duration("knock.step", r.Step, knock.MinStep, firewall.MaxStep),
		Window:   c.Firewall.Window,
		LogGroup: c.Firewall.LogGroup,
	}
	c.Firewall.Step = c.Knock.Step
	if !r.Tokens && len(r.Sequence) == 0 {
		p.bad("knock.tokens", "knock.tokens false: and there is no knock.sequence, so nobody could knock: allow one of the two")
	}
	taken := []knock.Port{{Proto: knock.UDP, Number: c.Firewall.TunnelPort}}
	for _, n := range c.Firewall.GatePorts {
		taken = append(taken, knock.Port{Proto: knock.TCP, Number: n})
	}
	for _, a := range c.Firewall.Allow {
		for n := uint32(a.First); a.Proto != firewall.ICMP && n <= uint32(a.Last); n++ {
			taken = append(taken, knock.Port{Proto: a.Proto, Number: uint16(n)})
		}
	}
	for i, s := range r.Sequence {
		at := func(name string) string { return key("knock.sequence", i, name) }
		before := len(p.problems)
		seq := knock.Sequence{Name: s.Name}
		for _, text := range s.Ports {
			port, err := knock.ParsePort(text)
			if err != nil {
				p.bad(at("ports"), "knock.sequence %q: %v", s.Name, err)
				continue
			}
			seq.Ports = append(seq.Ports, port)
		}
		if s.User != "" {
			if err := identity.CheckName("user", s.User); err != nil {
				p.bad(at("user"), "knock.sequence %q: %v", s.Name, err)
			}
		}
		seq.Timeout = p.sequenceTimeout(at("timeout"), s)
		if len(p.problems) > before {
			continue
		}
		// Judged one by one, beside those that passed, so that each error has its own line.
		if err := knock.Validate(append(c.Firewall.Sequences[:len(c.Firewall.Sequences):len(c.Firewall.Sequences)], seq), taken); err != nil {
			where := "ports"
			if s.Name == "" || strings.Contains(err.Error(), "name is used twice") {
				where = "name"
			}
			p.bad(at(where), "%v", err)
			continue
		}
		c.Firewall.Sequences = append(c.Firewall.Sequences, seq)
		c.Knock.Users = append(c.Knock.Users, s.User)
	}
}

func (p *parser) sequenceTimeout(key string, s rawSequence) time.Duration {
	d, err := ParseDuration(s.Timeout)
	if err != nil {
		p.bad(key, "knock.sequence %q: timeout %v", s.Name, err)
		return knock.DefaultTimeout
	}
	if d < time.Second || d > time.Minute {
		p.bad(key, "knock.sequence %q: timeout %q: want 1s to 1m", s.Name, s.Timeout)
	}
	return d
}

// firewall checks [firewall] and what else says who may pass, and writes it into c.
func (p *parser) firewall(c *Config) {
	p.oneOf("firewall.mode", p.raw.Firewall.Mode, string(firewall.Guard), string(firewall.Host))
	c.Firewall.Mode = firewall.Mode(p.raw.Firewall.Mode)
	for _, s := range p.raw.Firewall.Allow {
		a, err := firewall.ParseAllow(s)
		if err != nil {
			p.bad("firewall.allow", "firewall.allow %v", err)
			continue
		}
		c.Firewall.Allow = append(c.Firewall.Allow, a)
	}
	c.Firewall.Trusted = p.prefixes("knock.trusted", p.raw.Knock.Trusted)
	for i, s := range p.raw.Tunnel.Service {
		if s.Port < 1 || s.Port > 65535 {
			p.bad(key("tunnel.service", i, "port"), "tunnel.service %d: port %d: want 1 to 65535", i+1, s.Port)
			continue
		}
		if len(s.Groups) == 0 {
			p.bad(key("tunnel.service", i, "groups"), "tunnel.service %d: port %d is for no group: name some, or \"*\" for everybody", i+1, s.Port)
		}
		c.Gate.Services = append(c.Gate.Services, gate.Service{Port: uint16(s.Port), Groups: s.Groups})
	}
}

// rules checks of [[proxy.rule]] what the proxy's own types cannot say.
func (p *parser) rules() (rules []proxy.Rule) {
	for i, r := range p.raw.Proxy.Rule {
		bad := func(name, format string, a ...any) {
			p.bad(key("proxy.rule", i, name), "proxy.rule %d: %s", i+1, fmt.Sprintf(format, a...))
		}
		rule := proxy.Rule{Deny: r.Deny, Except: r.Except, Allow: r.Allow, Groups: r.Groups, Users: r.Users, TLS: r.TLS}
		if len(r.Allow) > 0 && len(r.Ports) == 0 {
			bad("", "it allows no port: add ports = [443]")
		}
		for _, n := range r.Ports {
			if n < 1 || n > 65535 {
				bad("ports", "port %d: want 1 to 65535", n)
				continue
			}
			rule.Ports = append(rule.Ports, uint16(n))
		}
		for _, u := range r.Users {
			if err := identity.CheckName("user", u); err != nil {
				bad("users", "%v", err)
			}
		}
		for _, g := range r.Groups {
			if g == "*" {
				continue
			}
			if err := identity.CheckName("group", g); err != nil {
				bad("groups", "%v", err)
			}
		}
		rules = append(rules, rule)
	}
	return rules
}

var ruleNumber = regexp.MustCompile(`^proxy\.rule (\d+)`)

// policy notes what the proxy itself finds wrong, at the line of the rule or key that its error begins with.
func (p *parser) policy(c proxy.Config) {
	_, err := proxy.Compile(c)
	if err == nil {
		return
	}
	errs := []error{err}
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		errs = joined.Unwrap()
	}
	for _, err := range errs {
		at, _, _ := strings.Cut(err.Error(), " ")
		if m := ruleNumber.FindStringSubmatch(err.Error()); m != nil {
			n, _ := strconv.Atoi(m[1])
			at = key("proxy.rule", n-1, "")
		}
		p.bad(strings.TrimSuffix(at, ":"), "%v", err)
	}
}
