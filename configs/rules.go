package configs

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"

	"perimeterd/internal/identity"
	"perimeterd/knock"
	"perimeterd/proxy"
)

// knock checks [knock] and writes it into c, whose ports are known already.
func (p *parser) knock(c *Config) {
	r := p.raw.Knock
	c.Knock = Knock{
		Tokens:   r.Tokens,
		Step:     p.duration("knock.step", r.Step, knock.MinStep, 10*time.Minute),
		Window:   c.Firewall.Window,
		LogGroup: c.Firewall.LogGroup,
	}
	c.Firewall.Step = c.Knock.Step
	c.Firewall.StepTimeout = 10 * time.Second
	if !r.Tokens && len(r.Sequence) == 0 {
		p.bad("knock.tokens", "knock.tokens false: and there is no knock.sequence, so nobody could knock: allow one of the two")
	}
	taken := []knock.Port{{Proto: knock.UDP, Number: c.Firewall.TunnelPort}}
	for _, n := range c.Firewall.GatePorts {
		taken = append(taken, knock.Port{Proto: knock.TCP, Number: n})
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
		timeout := p.sequenceTimeout(at("timeout"), s)
		if i == 0 {
			c.Firewall.StepTimeout = timeout
		} else if timeout != c.Firewall.StepTimeout {
			p.bad(at("timeout"), "knock.sequence %q: timeout %s, %q has %s; the kernel keeps one for all: make them the same",
				s.Name, formatDuration(timeout), r.Sequence[0].Name, formatDuration(c.Firewall.StepTimeout))
		}
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
		return 10 * time.Second
	}
	if d < time.Second || d > time.Minute {
		p.bad(key, "knock.sequence %q: timeout %q: want 1s to 1m", s.Name, s.Timeout)
	}
	return d
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
