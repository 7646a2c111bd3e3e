package awsiam

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

var (
	now    = time.Date(2026, 1, 31, 12, 0, 0, 0, time.UTC)
	home   = []netip.Prefix{netip.MustParsePrefix("52.94.76.10/32"), netip.MustParsePrefix("2600:1f18::10/128")}
	role   = "arn:aws:iam::111122223333:role/PowerUser"
	alice  = "arn:aws:iam::999900001111:user/alice"
	bot    = "arn:aws:iam::999900001111:user/bot"
	rescue = "arn:aws:iam::999900001111:user/rescue"
)

// options are enough for each kind.
func options(kind string) Options {
	o := Options{Egress: home}
	switch kind {
	case "bastion-user":
		o.Roles = []string{role}
	case "role-trust":
		o.Users = []string{alice}
	case "service-account":
		o.Actions, o.Resources = []string{"s3:PutObject"}, []string{"arn:aws:s3:::backups/*"}
	case "revoke-sessions":
		o.Before = now
	}
	return o
}

func policy(t *testing.T, kind string, change func(*Options)) Policy {
	t.Helper()
	o := options(kind)
	if change != nil {
		change(&o)
	}
	p, err := Make(kind, o)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestEveryKindReadsBackAsItWasWritten(t *testing.T) {
	for _, kind := range Kinds().Names() {
		p := policy(t, kind, nil)
		d, err := Parse([]byte(p.Text()))
		if err != nil {
			t.Fatalf("%s: %v\n%s", kind, err, p.Text())
		}
		if d.Text() != p.Document.Text() || policy(t, kind, nil).Text() != p.Text() {
			t.Errorf("%s: read back it is another:\n%s%s", kind, p.Text(), d.Text())
		}
		if p.Attach == "" || p.Protects == "" || p.Leaves == "" {
			t.Errorf("%s is not explained", kind)
		}
		if guard := slices.Contains(kinds[slices.Index(Kinds().Names(), kind)].takes, "break-glass"); guard != strings.Contains(p.Warn(), "NO BREAK-GLASS") {
			t.Errorf("%s: a guard without a break-glass identity says so loudly, and others do not: %q", kind, p.Warn())
		}
	}
}

func TestBadOptionsAreNamedWithTheWayOut(t *testing.T) {
	egress := func(cidrs ...string) func(*Options) {
		return func(o *Options) {
			o.Egress = nil
			for _, s := range cidrs {
				o.Egress = append(o.Egress, netip.MustParsePrefix(s))
			}
		}
	}
	for _, c := range []struct {
		name, kind string
		change     func(*Options)
		want       string
	}{
		{"unknown kind", "guard", nil, `policy "guard" is unknown: there are bastion-user, role-trust,`},
		{"no egress", "role-guard", egress(), "no egress address: give the one that AWS sees with --egress CIDR, or set egress.public in the configuration"},
		{"invalid egress", "role-guard", func(o *Options) { o.Egress = make([]netip.Prefix, 1) }, "egress number 1 is no CIDR"},
		{"private egress", "role-guard", egress("10.1.2.3/32"), "egress 10.1.2.3/32: private or reserved"},
		{"egress behind a carrier's NAT", "role-guard", egress("100.64.0.1/32"), "egress 100.64.0.1/32: private or reserved"},
		{"unique local egress", "role-guard", egress("fd00::1/128"), "egress fd00::1/128: private or reserved"},
		{"wide egress", "role-guard", egress("52.0.0.0/8"), "egress 52.0.0.0/8: wider than /24"},
		{"everybody", "role-guard", egress("0.0.0.0/0"), "egress 0.0.0.0/0: wider than /24"},
		{"wide IPv6 egress", "role-guard", egress("2600::/32"), "egress 2600::/32: wider than /56"},
		{"mapped egress", "role-guard", egress("::ffff:52.1.2.3/128"), "write it as IPv4"},
		{"bits past the prefix", "role-guard", egress("52.1.2.3/24"), "write 52.1.2.0/24, or 52.1.2.3/32 for the one address"},
		{"one twice", "role-guard", egress("52.1.2.3/32", "52.1.2.3/32"), "egress 52.1.2.3/32: stands twice"},
		{"too many for a session", "session-pin", func(o *Options) {
			for i := range 200 {
				o.Egress = append(o.Egress, netip.PrefixFrom(netip.AddrFrom4([4]byte{52, 1, 2, byte(i)}), 32))
			}
		}, "characters, and AWS takes 2048: name fewer addresses"},
		{"no role", "bastion-user", func(o *Options) { o.Roles = nil }, "bastion-user names no role: give those that its users may become with --role ARN"},
		{"a user as role", "bastion-user", func(o *Options) { o.Roles = []string{alice} }, `--role "` + alice + `": "user/alice" is not a role: want one as arn:aws:iam::111122223333:role/PowerUser`},
		{"every role", "bastion-user", func(o *Options) { o.Roles = []string{"arn:aws:iam::111122223333:role/*"} }, "a wildcard"},
		{"short account", "bastion-user", func(o *Options) { o.Roles = []string{"arn:aws:iam::1111:role/x"} }, `account "1111" is not 12 digits`},
		{"no ARN", "bastion-user", func(o *Options) { o.Roles = []string{"PowerUser"} }, `--role "PowerUser": not an ARN`},
		{"a session to spare", "role-guard", func(o *Options) { o.BreakGlass = []string{"arn:aws:sts::111122223333:assumed-role/x/y"} }, "a session, and the next has another ARN"},
		{"all to spare", "role-guard", func(o *Options) { o.BreakGlass = []string{"arn:aws:iam::111122223333:user/*"} }, "a wildcard"},
		{"a user to spare on a role", "role-guard", func(o *Options) { o.BreakGlass = []string{alice} }, `--break-glass "` + alice + `": on a role the caller is the role`},
		{"a bucket to spare", "scp-guard", func(o *Options) { o.BreakGlass = []string{"arn:aws:s3:::x"} }, "not an identity in IAM"},
		{"every account's", "user-guard", func(o *Options) { o.BreakGlass = []string{"arn:aws:iam::*:role/x"} }, `account "*" is not 12 digits`},
		{"trusting nobody", "role-trust", func(o *Options) { o.Users = nil }, "role-trust names nobody"},
		{"trusting every token", "role-trust", func(o *Options) {
			o.OIDC, o.Audience, o.Subject = "arn:aws:iam::111122223333:oidc-provider/token.actions.githubusercontent.com", "sts.amazonaws.com", "*"
		}, "without it every customer of the provider gets in"},
		{"tokens for anybody", "role-trust", func(o *Options) {
			o.OIDC, o.Subject = "arn:aws:iam::111122223333:oidc-provider/token.actions.githubusercontent.com", "repo:x/y"
		}, `--audience ""`},
		{"a subject of nobody's", "role-trust", func(o *Options) { o.Subject = "x" }, "name it with --oidc ARN"},
		{"a VPC that is none", "role-guard", func(o *Options) { o.VPCs = []string{"vpc-x"} }, `VPC "vpc-x": want its id`},
		{"an option of another kind", "mfa", func(o *Options) { o.Roles = []string{role} }, "--role: mfa has no use for it: leave it off"},
		{"a service that may nothing", "service-account", func(o *Options) { o.Actions = nil }, "service-account allows nothing"},
		{"a service that may all", "service-account", func(o *Options) { o.Actions = []string{"*"} }, `--action "*": want SERVICE:ACTION`},
		{"no time", "revoke-sessions", func(o *Options) { o.Before = time.Time{} }, "revoke-sessions has no time"},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := options(c.kind)
			if c.change != nil {
				c.change(&o)
			}
			if _, err := Make(c.kind, o); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("%v, want %q", err, c.want)
			}
		})
	}
	for s, want := range map[string]string{"52.1.2.3": "has no prefix length: write 52.1.2.3/32", "bastion": "is no CIDR", "52.1.2.3/33": "is no CIDR"} {
		if _, err := ParseEgress(s); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", s, err, want)
		}
	}
}

func TestExamplesAddressesAreWarnedOf(t *testing.T) {
	p := policy(t, "session-pin", func(o *Options) { o.Egress = prefixes("203.0.113.10/32") })
	if !strings.Contains(p.Warn(), "203.0.113.10/32 stands in examples only") {
		t.Errorf("%q", p.Warn())
	}
}

func TestASessionPinFitsIntoTheSession(t *testing.T) {
	text, err := SessionPin(home)
	if err != nil || len(text) > maxSession || strings.ContainsAny(text, " \n") {
		t.Fatalf("%d characters, %v: %s", len(text), err, text)
	}
}
