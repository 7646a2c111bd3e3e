package awsiam

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Finding is one mistake that people make, and whether these policies make it.
type Finding struct {
	Name  string `json:"name"` // of the mistake
	State State  `json:"state"`
	Text  string `json:"text"` // what was asked, and what decided
}

// State is how a finding ends. Open and Breaks are to act on.
type State string

const (
	Open   State = "open"   // a thief gets through
	Breaks State = "breaks" // those who should get through do not
	Closed State = "closed"
	Works  State = "works"
)

// Reviewer asks a set of policies what a thief would ask, and what their owners would. The policies are taken to be attached
// beside one that allows everything, since another Allow is what most policies are undone by.
type Reviewer struct {
	Egress    []netip.Prefix
	Now       time.Time
	VPC       string              // whose endpoint should work; empty: none
	Principal string              // who has the policies; empty: a user and a role, or people where only an SCP is given
	Set       map[string][]string // keys that the policies ask for, as in Caller
	Unset     []string
}

const (
	someAccount = "arn:aws:iam::111122223333:"
	someAction  = "ec2:RunInstances"
	// Its owner is a stranger.
	otherVPC = "vpc-0badbadbadbadbad0"
)

var everything = File{"another policy", Document{Version: version, Statement: []Statement{{Effect: "Allow", Action: Values{"*"}, Resource: Values{"*"}}}}}

// Review says of each mistake whether the set makes it. Trust policies are reviewed by themselves.
func (v Reviewer) Review(s Set) (all []Finding, err error) {
	if _, err := checkEgress(v.Egress); err != nil {
		return nil, err
	}
	for _, f := range s.Resource {
		findings, err := v.trust(f)
		if err != nil {
			return nil, err
		}
		all = append(all, findings...)
	}
	if len(s.Identity)+len(s.Session)+len(s.SCP) == 0 {
		return all, nil
	}
	s.Resource = nil
	own := v.probes(s)
	beside := s
	beside.Identity = append(slices.Clone(s.Identity), everything)
	for _, check := range []func(Set, []probe) (Finding, bool, error){v.elsewhere, v.endpoint, v.noMFA, v.onward, v.atHome, v.service, v.serviceRole, v.ownVPC, v.roleMFA, v.breakGlass} {
		f, asked, err := check(beside, own)
		if err != nil {
			return nil, err
		}
		if asked {
			all = append(all, f)
		}
	}
	return all, nil
}

// probe is what is asked for.
type probe struct{ principal, action, resource string }

// probes are what the policies themselves speak of, for each who may have them.
func (v Reviewer) probes(s Set) (all []probe) {
	who := []string{v.Principal}
	if v.Principal == "" {
		who = []string{someAccount + "user/alice", someAccount + "role/PowerUser"}
		if len(s.Identity)+len(s.Session) == 0 {
			who[1] = someAccount + identityCenter + "AWSReservedSSO_PowerUser_0123456789abcdef"
		}
	}
	for _, w := range who {
		before := len(all)
		for _, f := range s.Identity {
			for _, st := range f.Statement {
				if st.Effect == "Allow" && st.Action != nil && st.Resource != nil {
					all = append(all, probe{w, sampleAction(st.Action[0]), v.sampleResource(w, st.Resource[0])})
				}
			}
		}
		if len(all) == before {
			all = append(all, probe{w, someAction, "*"})
		}
	}
	return all
}

// sampleAction is one action that the pattern covers.
func sampleAction(s string) string {
	if s == "*" {
		return someAction
	}
	return strings.NewReplacer("*", "X", "?", "X").Replace(s)
}

func (v Reviewer) sampleResource(principal, s string) string {
	if s == "*" {
		return s
	}
	_, user, _ := strings.Cut(principal, ":user/")
	return strings.NewReplacer("${aws:username}", user, "*", "x", "?", "x").Replace(s)
}

func (v Reviewer) caller(principal string) Caller {
	return Caller{Principal: principal, From: v.Egress[0].Addr(), Now: v.Now, Issued: v.Now.Add(-time.Minute), MFA: strings.Contains(principal, ":user/"), Set: v.Set, Unset: v.Unset}
}

// away is addresses that are not the egress, at least one, by IPv4 if it can be.
func (v Reviewer) away() (all []netip.Addr) {
	for _, s := range []string{"192.0.2.66", "198.51.100.66", "203.0.113.66", "2001:db8::66", "2001:db8:ffff::66"} {
		a := netip.MustParseAddr(s)
		if last := len(all) == 0 && s == "2001:db8:ffff::66"; last || !slices.ContainsFunc(v.Egress, func(p netip.Prefix) bool { return p.Contains(a) }) {
			all = append(all, a)
		}
	}
	return all
}

// ask evaluates the probes until one has the unwanted answer.
func ask(s Set, probes []probe, unwanted bool, caller func(principal string) Caller) (p probe, d Decision, found bool, err error) {
	for _, p = range probes {
		r, err := caller(p.principal).Make(p.action, p.resource)
		if err != nil {
			return p, d, false, err
		}
		if d, err = s.Evaluate(r); err != nil {
			return p, d, false, err
		}
		if d.Allow == unwanted {
			return p, d, true, nil
		}
	}
	return p, d, false, nil
}

// must makes a finding of ask.
func must(name string, s Set, probes []probe, allow bool, caller func(string) Caller, asked, advice string) (Finding, bool, error) {
	p, d, found, err := ask(s, probes, !allow, caller)
	state := map[[2]bool]State{{true, true}: Breaks, {true, false}: Works, {false, true}: Open, {false, false}: Closed}[[2]bool{allow, found}]
	text := asked
	if found {
		text = fmt.Sprintf("%s (%s by %s): %s", asked, p.action, p.principal, advice)
	}
	if !d.Allow && d.By != "" {
		text += "; denied by " + d.By
	}
	return Finding{name, state, text}, true, err
}

func (v Reviewer) elsewhere(s Set, own []probe) (f Finding, asked bool, err error) {
	probes := slices.Clone(own)
	for _, p := range own {
		probes = append(probes, probe{p.principal, someAction, "*"})
	}
	for _, from := range v.away() {
		var g Finding
		g, asked, err = must("elsewhere", s, probes, false, func(p string) Caller {
			c := v.caller(p)
			c.From = from
			return c
		}, fmt.Sprintf("a stolen key or session used from %v", from),
			"nothing denies it. An Allow with IpAddress is undone by any other Allow, and one on sts:AssumeRole does not follow the session: add role-guard, user-guard or session-pin")
		if f.Name == "" || g.State == Open {
			f = g
		}
		if err != nil || f.State == Open {
			break
		}
	}
	return f, asked, err
}

func (v Reviewer) endpoint(s Set, own []probe) (Finding, bool, error) {
	return must("endpoint", s, own, false, func(p string) Caller {
		c := v.caller(p)
		c.VPC, c.From = otherVPC, netip.MustParseAddr("10.0.0.66")
		return c
	}, "a stolen key or session used through a VPC endpoint of a stranger's, where aws:SourceIp is absent",
		"nothing denies it: a Deny needs NotIpAddress, which holds without the key too, and IpAddress or Null undo it")
}

func (v Reviewer) noMFA(s Set, own []probe) (Finding, bool, error) {
	var probes []probe
	for _, p := range own {
		if strings.Contains(p.principal, ":user/") {
			probes = append(probes, probe{p.principal, someAction, "*"})
		}
	}
	if !s.mention("aws:multifactorauth") || len(probes) == 0 {
		return Finding{}, false, nil
	}
	return must("without MFA", s, probes, false, func(p string) Caller {
		c := v.caller(p)
		c.MFA, c.Issued = false, time.Time{}
		return c
	}, "long-lived keys without a code", "they pass. aws:MultiFactorAuthPresent is absent for them, so a Deny with Bool is none: write BoolIfExists, in a Deny")
}

func (v Reviewer) onward(s Set, own []probe) (Finding, bool, error) {
	if len(s.Session) == 0 {
		return Finding{}, false, nil
	}
	var probes []probe
	for _, p := range own {
		probes = append(probes, probe{p.principal, "sts:AssumeRole", someAccount + "role/Next"})
	}
	return must("onward", s, probes, false, v.caller, "a pinned session that becomes another role", "the next session has no pin: deny sts:AssumeRole* and sts:GetFederationToken in the session policy")
}

func (v Reviewer) atHome(s Set, own []probe) (Finding, bool, error) {
	return must("at the egress", s, own, true, v.caller, fmt.Sprintf("the owner's call from %v", v.Egress[0]),
		"it is denied: the policy names another address, or something else that the owner has not")
}

func (v Reviewer) service(s Set, own []probe) (Finding, bool, error) {
	return must("by a service", s, own, true, func(p string) Caller {
		c := v.caller(p)
		c.From, c.ViaService = v.away()[0], true
		return c
	}, "a call that AWS makes on the owner's behalf, from an address of its own", "it is denied: add BoolIfExists aws:ViaAWSService false to the Deny")
}

func (v Reviewer) serviceRole(s Set, _ []probe) (Finding, bool, error) {
	if len(s.SCP) == 0 {
		return Finding{}, false, nil
	}
	return must("service roles", s, []probe{{someAccount + "role/service-role/function", someAction, "*"}}, true, func(p string) Caller {
		c := v.caller(p)
		c.From = v.away()[0]
		return c
	}, "a service's own role, which calls from addresses of AWS", "it is denied: limit the Deny to people by ArnLike aws:PrincipalArn")
}

func (v Reviewer) ownVPC(s Set, own []probe) (Finding, bool, error) {
	if v.VPC == "" {
		return Finding{}, false, nil
	}
	return must("own VPC", s, own, true, func(p string) Caller {
		c := v.caller(p)
		c.VPC, c.From = v.VPC, netip.MustParseAddr("10.0.0.10")
		return c
	}, "a call through an endpoint of "+v.VPC+", where aws:SourceIp is absent", "it is denied: NotIpAddress holds without the key. Add StringNotEqualsIfExists aws:SourceVpc to the Deny")
}

func (v Reviewer) roleMFA(s Set, own []probe) (Finding, bool, error) {
	if !s.mention("aws:multifactorauth") {
		return Finding{}, false, nil
	}
	role := someAccount + "role/PowerUser"
	return must("MFA on roles", s, []probe{{role, someAction, "*"}}, true, v.caller, "a role's session, which carries no MFA however it was made",
		"it is denied: attach this to users only, and ask for MFA in the role's trust policy")
}

// breakGlass looks for a Deny by address that spares nobody. A session's pin ends with the session, and a policy that allows as
// well is one identity's own.
func (v Reviewer) breakGlass(s Set, _ []probe) (Finding, bool, error) {
	for _, f := range slices.Concat(s.Identity, s.SCP) {
		for i, st := range f.Statement {
			if st.Effect == "Deny" && !f.allows() && st.Condition.names("aws:sourceip") {
				for operator, keys := range st.Condition {
					op, err := parseOperator(operator)
					if err != nil {
						return Finding{}, false, err
					}
					if _, there := folded(keys)["aws:principalarn"]; there && op.negated {
						return Finding{"break-glass", Works, "an identity is spared by " + f.Name}, true, nil
					}
				}
				return Finding{"break-glass", Breaks, fmt.Sprintf("%s, statement %s spares nobody: with the bastion dead, who moves its address? Write it with --break-glass ARN", f.Name, label(i, st.Sid))}, true, nil
			}
		}
	}
	return Finding{}, false, nil
}

// trust reviews whom a role trusts, each by itself.
func (v Reviewer) trust(f File) (all []Finding, err error) {
	var callers []probe
	set := map[string][]string{}
	for _, st := range f.Statement {
		if st.Effect != "Allow" {
			continue
		}
		for _, kind := range sorted(st.Principal) {
			for _, name := range st.Principal[kind] {
				action := "sts:AssumeRole"
				switch {
				case kind == "Federated" && strings.Contains(name, ":saml-provider/"):
					action = "sts:AssumeRoleWithSAML"
				case kind == "Federated":
					action = "sts:AssumeRoleWithWebIdentity"
				case kind == "AWS" && accountID.MatchString(name):
					name = "arn:aws:iam::" + name + ":user/alice"
				case kind == "AWS" && strings.HasSuffix(name, ":root"):
					name = strings.TrimSuffix(name, "root") + "user/alice"
				case name == "*":
					name = someAccount + "user/stranger"
				}
				callers = append(callers, probe{name, action, someAccount + "role/PowerUser"})
			}
		}
		// What the provider says is taken as the policy wants it.
		for _, keys := range st.Condition {
			for key, values := range keys {
				if !strings.HasPrefix(strings.ToLower(key), "aws:") {
					set[key] = []string{sampleAction(values[0])}
				}
			}
		}
	}
	for k, values := range v.Set {
		set[k] = values
	}
	caller := func(p string) Caller {
		c := v.caller(p)
		c.Set = set
		return c
	}
	s := Set{Resource: []File{f}}
	add := func(fd Finding, _ bool, e error) {
		if err == nil {
			err = e
		}
		fd.Name = "trust: " + fd.Name
		all = append(all, fd)
	}
	add(must("elsewhere", s, callers, false, func(p string) Caller {
		c := caller(p)
		c.From = v.away()[0]
		return c
	}, fmt.Sprintf("becoming the role from %v", v.away()[0]), "it is allowed: add IpAddress aws:SourceIp"))
	users := slices.DeleteFunc(slices.Clone(callers), func(p probe) bool { return !strings.Contains(p.principal, ":user/") })
	if len(users) > 0 {
		add(must("without MFA", s, users, false, func(p string) Caller {
			c := caller(p)
			c.MFA, c.Issued = false, time.Time{}
			return c
		}, "a user who becomes the role without a code", "it is allowed: add Bool aws:MultiFactorAuthPresent true to the Allow"))
	}
	add(must("at the egress", s, callers, true, caller, fmt.Sprintf("becoming the role from %v, users with MFA", v.Egress[0]), "it is refused"))
	return all, err
}

// mention says whether a condition of the set is about a key with this prefix, in lower case.
func (s Set) mention(prefix string) bool {
	return slices.ContainsFunc(slices.Concat(s.Identity, s.Session, s.SCP), func(f File) bool {
		return slices.ContainsFunc(f.Statement, func(st Statement) bool { return st.Condition.names(prefix) })
	})
}

func (c Condition) names(prefix string) bool {
	for _, keys := range c {
		for key := range keys {
			if strings.HasPrefix(strings.ToLower(key), prefix) {
				return true
			}
		}
	}
	return false
}

func folded[V any](m map[string]V) map[string]V {
	lower := map[string]V{}
	for k, v := range m {
		lower[strings.ToLower(k)] = v
	}
	return lower
}
