package awsiam

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Policy is one policy's text, and what to know before it is attached.
type Policy struct {
	Document
	Kind     string
	Attach   string   // where it belongs
	Protects string   // what holds once it is attached
	Leaves   string   // what it leaves open, or breaks
	Warnings []string // about these options
}

// Options are what a policy names. A kind takes some of them.
type Options struct {
	Egress     []netip.Prefix // what AWS sees of the bastion
	BreakGlass []string       // ARNs of identities that a guard spares
	VPCs       []string       // whose endpoints are a way in as well: requests through one carry no address
	Roles      []string       // ARNs: whom users may become; in scp-guard: more roles of people
	Users      []string       // ARNs of users, or of their account's root, that a role trusts
	SAML       string         // ARN of a SAML provider that a role trusts
	OIDC       string         // ARN of an OpenID Connect provider that a role trusts
	Audience   string         // of OIDC's tokens
	Subject    string         // of OIDC's tokens; * is a wildcard, not the whole of it
	Actions    []string       // of a service's account
	Resources  []string       // ARNs, of a service's account
	Before     time.Time      // sessions issued earlier are revoked
}

// An option's name is its flag's.
func (o Options) given() map[string]bool {
	return map[string]bool{
		"break-glass": len(o.BreakGlass) > 0, "vpc": len(o.VPCs) > 0, "role": len(o.Roles) > 0, "user": len(o.Users) > 0, "saml": o.SAML != "",
		"oidc": o.OIDC != "", "audience": o.Audience != "", "subject": o.Subject != "", "action": len(o.Actions) > 0,
		"resource": len(o.Resources) > 0, "before": !o.Before.IsZero(),
	}
}

// List is kinds of policies.
type List []kind

type kind struct {
	name, attach, protects, leaves string
	takes                          []string // options' names; egress is the configuration's, and a kind may ignore it
	noEgress                       bool
	limit                          int // characters that AWS takes of it
	make                           func(Options) ([]Statement, error)
}

// Limits of docs.aws.amazon.com/IAM/latest/UserGuide/reference_iam-quotas.html, characters without white space.
const (
	maxUserInline = 2048 // all inline policies of a user together
	maxSession    = 2048
	maxTrust      = 2048
	maxSCP        = 5120
	maxManaged    = 6144
)

const guardBreaks = "CloudShell, and every program that calls from another address: an instance's role, a Lambda function, CI. " +
	"Calls that AWS makes on the caller's behalf (aws:ViaAWSService) go on. A request through a VPC endpoint has no aws:SourceIp: --vpc spares one's own."

var kinds = List{
	{"bastion-user", "the group of users in the Bastion account", "its users become the role from the egress only, if this is their only Allow",
		"the session afterwards: stolen, it works from anywhere, unless the role has role-guard or the session its session-pin. Another Allow undoes it.",
		[]string{"role"}, false, maxManaged, bastionUser},
	{"role-trust", "the role, as its trust policy", "whoever becomes the role comes from the egress, and a user has given an MFA code",
		"the session afterwards: stolen, it works from anywhere, unless the role has role-guard. MFA of SAML and OpenID Connect is the provider's to ask.",
		[]string{"user", "saml", "oidc", "audience", "subject"}, false, maxTrust, roleTrust},
	{"role-guard", "every role that people become, beside what it allows", "a session of the role is worth nothing elsewhere, whatever else is attached",
		guardBreaks + " Services inside a VPC that know no aws:SourceIp are left out (NotAction): their security groups guard them.",
		[]string{"vpc", "break-glass"}, false, maxManaged, roleGuard},
	{"scp-guard", "an organisational unit, as a service control policy", "keys of IAM users and sessions of Identity Center work from the egress only, in every account below",
		"roles that are neither, unless --role names them, and the management account, which no SCP binds. It breaks " + guardBreaks,
		[]string{"vpc", "role", "break-glass"}, false, maxSCP, scpGuard},
	{"scp-no-iam-users", "an organisational unit, as a service control policy", "nobody makes or revives an IAM user's credentials in the accounts below, so that people come as sessions, which end",
		"users and keys that are there already, and the management account, which no SCP binds. It names no address.",
		[]string{"break-glass"}, true, maxSCP, noUsers},
	{"session-pin", "a session, as --policy of `aws sts assume-role`", "this session works from the egress only, and makes no other session, which would be unpinned",
		"sessions that are assumed without it: only role-guard holds for all of a role's. It grants nothing that the role does not have.",
		[]string{"vpc"}, false, maxSession, sessionPin},
	{"mfa", "the group of users in the Bastion account", "without an MFA code users can only enrol a device and ask for a session with its code. Keys that never carry MFA are refused too",
		"a stolen key of a user without a device can enrol one: enrol on the first day. It does not belong on roles, whose sessions carry no MFA. It names no address.",
		nil, true, maxManaged, mfa},
	{"user-guard", "an IAM user, or a group", "the user's keys, and sessions made of them by GetSessionToken, are worth nothing elsewhere, whatever else is attached",
		"roles that the user becomes: they have policies of their own. It breaks " + guardBreaks,
		[]string{"vpc", "break-glass"}, false, maxUserInline, userGuard},
	{"service-account", "an IAM user that a program is", "its keys do these actions, from the egress only, and nothing else, whatever else is attached",
		"what the actions themselves give away. Keys without MFA are no stronger than where they lie: rotate them.",
		[]string{"action", "resource"}, false, maxUserInline, serviceAccount},
	{"revoke-sessions", "the role or user whose sessions are to end", "sessions issued before the time are refused from now on",
		"long-lived keys, which have no aws:TokenIssueTime: deactivate them. Sessions issued afterwards: close the hole first. It names no address.",
		[]string{"before"}, true, maxUserInline, revokeSessions},
}

// Kinds is what Make knows.
func Kinds() List { return kinds }

// Names are the kinds' names.
func (l List) Names() (names []string) {
	for _, k := range l {
		names = append(names, k.name)
	}
	return names
}

// NeedEgress says whether the kind names the egress address.
func (l List) NeedEgress(name string) bool {
	return slices.ContainsFunc(l, func(k kind) bool { return k.name == name && !k.noEgress })
}

// String is a line a kind: its name, where it is attached, and the options that it takes.
func (l List) String() string {
	var b strings.Builder
	for _, k := range l {
		fmt.Fprintf(&b, "  %-17s for %s", k.name, k.attach)
		for i, o := range k.takes {
			fmt.Fprintf(&b, "%s--%s", []string{" (", ", "}[min(i, 1)], o)
		}
		b.WriteString([]string{"\n", ")\n"}[min(len(k.takes), 1)])
	}
	return b.String()
}

// Make writes the policy of a kind.
func Make(name string, o Options) (Policy, error) {
	i := slices.IndexFunc(kinds, func(k kind) bool { return k.name == name })
	if i < 0 {
		return Policy{}, fmt.Errorf("policy %q is unknown: there are %s", name, strings.Join(kinds.Names(), ", "))
	}
	k := kinds[i]
	p := Policy{Kind: name, Attach: k.attach, Protects: k.protects, Leaves: k.leaves}
	var err error
	for option, given := range o.given() {
		if given && !slices.Contains(k.takes, option) {
			return Policy{}, fmt.Errorf("--%s: %s has no use for it: leave it off", option, name)
		}
	}
	if !k.noEgress {
		if p.Warnings, err = checkEgress(o.Egress); err != nil {
			return Policy{}, err
		}
	}
	if err := checkVPCs(o.VPCs); err != nil {
		return Policy{}, err
	}
	for _, s := range o.BreakGlass {
		if err := checkPrincipal("--break-glass", s, strings.HasPrefix(name, "scp-"), "role", "user", "root"); err != nil {
			return Policy{}, err
		}
		if a, ok := parseARN(s); ok && name == "role-guard" && !strings.HasPrefix(a.resource, "role/") {
			return Policy{}, fmt.Errorf("--break-glass %q: on a role the caller is the role, whoever became it, so this spares nobody: "+
				"name a role, as in arn:aws:iam::111122223333:role/%s, or leave it off", s, breakGlassRole)
		}
	}
	if slices.Contains(k.takes, "break-glass") && len(o.BreakGlass) == 0 {
		p.Warnings = append(p.Warnings, noBreakGlass)
	}
	statements, err := k.make(o)
	if err != nil {
		return Policy{}, err
	}
	p.Document = Document{Version: version, Statement: statements}
	if n := len(p.Line()); n > k.limit {
		return Policy{}, fmt.Errorf("%s: %d characters, and AWS takes %d: name fewer addresses and identities", name, n, k.limit)
	}
	return p, nil
}

const noBreakGlass = "NO BREAK-GLASS: with this guard everywhere and the bastion dead, nobody may move its address: " +
	"name an identity that it spares with --break-glass ARN, and keep its keys in a safe"

// SessionPin is the session policy that AssumeRole is given, in one line.
func SessionPin(egress []netip.Prefix) (string, error) {
	p, err := Make("session-pin", Options{Egress: egress})
	if err != nil {
		return "", err
	}
	return p.Line(), nil
}

// Text is the policy as it is printed: a session's, which goes into a command, in one line.
func (p Policy) Text() string {
	if p.Kind == "session-pin" {
		return p.Line() + "\n"
	}
	return p.Document.Text()
}

// Explain is what to know of the policy, for a person.
func (p Policy) Explain() string {
	return fmt.Sprintf("%s: attach it to %s\nprotects: %s.\ndoes not: %s\n", p.Kind, p.Attach, p.Protects, p.Leaves)
}

// Warn is a line for each warning.
func (p Policy) Warn() string {
	var b strings.Builder
	for _, w := range p.Warnings {
		fmt.Fprintf(&b, "warning: %s\n", w)
	}
	return b.String()
}
