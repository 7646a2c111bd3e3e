package proxy

import (
	"net/netip"
	"strings"
	"testing"
)

func reference() Config {
	return Config{
		Regions: []string{"us-east-1", "eu-west-1"},
		Rules: []Rule{
			{Allow: []string{"@aws"}, Ports: []uint16{443}, Groups: []string{"*"}, TLS: true},
			{Deny: []string{"@customer-hosted"}, Except: []string{"mine.us-east-1.elb.amazonaws.com", "*.abc.execute-api.eu-west-1.amazonaws.com"}},
			{Allow: []string{"@terraform", "@github", "example.com", "*.example.org", "93.184.0.0/16", "8.8.8.8"}, Ports: []uint16{443, 8443}, Groups: []string{"operators"}, Users: []string{"carol"}},
			{Deny: []string{"secret.example.org"}, Ports: []uint16{443}, Users: []string{"dave"}},
			{Deny: []string{"93.184.7.0/24"}},
			{Allow: []string{"plain.example.com"}, Ports: []uint16{80}, Groups: []string{"*"}},
			{Allow: []string{"nobody.example.com"}, Ports: []uint16{443}},
			{Allow: []string{"noport.example.com"}, Groups: []string{"*"}},
		},
	}
}

func TestDecide(t *testing.T) {
	p, err := Compile(reference())
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		who, to string
		want    Reason
		rule    int
	}{
		{"bob", "sts.amazonaws.com:443", Allowed, 1},
		{"bob", "STS.us-east-1.AmazonAWS.com.:443", Allowed, 1},
		{"bob", "bucket.with.dots.s3.amazonaws.com:443", Allowed, 1},
		{"bob", "sts.amazonaws.com:80", NoRule, 0},
		{"bob", "amazonaws.com:443", NoRule, 0},
		{"bob", "evilamazonaws.com:443", NoRule, 0},
		{"bob", "amazonaws.com.evil:443", NoRule, 0},
		{"bob", "x.amazonaws.com.cn:443", NoRule, 0},
		{"bob", "us-east-1.signin.aws.amazon.com:443", Allowed, 1},
		{"bob", "ap-south-1.signin.aws.amazon.com:443", NoRule, 0},
		{"bob", "signin.eu-west-1.api.aws:443", Allowed, 1},
		{"bob", "acme.awsapps.com:443", Allowed, 1},
		{"bob", "a.portal.us-east-1.app.aws:443", Allowed, 1},
		{"bob", "us-east-1.sso.signin.aws:443", Allowed, 1},
		{"bob", "docs.aws.amazon.com:443", Allowed, 1},
		{"bob", "aws.amazon.com:443", NoRule, 0},
		{"bob", "www.amazon.com:443", NoRule, 0},
		{"bob", "evil.us-east-1.elb.amazonaws.com:443", DeniedByRule, 2},
		{"bob", "evil.elb.us-east-1.amazonaws.com:443", DeniedByRule, 2},
		{"bob", "ec2-1-2-3-4.compute-1.amazonaws.com:443", DeniedByRule, 2},
		{"bob", "ec2-1-2-3-4.us-west-2.compute.amazonaws.com:443", DeniedByRule, 2},
		{"bob", "abc.execute-api.us-east-1.amazonaws.com:443", DeniedByRule, 2},
		{"bob", "b.s3-website-us-east-1.amazonaws.com:443", DeniedByRule, 2},
		{"bob", "b.c.s3-website.eu-central-1.amazonaws.com:443", DeniedByRule, 2},
		{"bob", "db.x1.us-east-1.rds.amazonaws.com:443", DeniedByRule, 2},
		{"bob", "rds.us-east-1.amazonaws.com:443", Allowed, 1},
		{"bob", "elasticloadbalancing.us-east-1.amazonaws.com:443", Allowed, 1},
		{"bob", "ec2.us-east-1.amazonaws.com:443", Allowed, 1},
		{"bob", "mine.us-east-1.elb.amazonaws.com:443", Allowed, 1},
		{"bob", "x.mine.us-east-1.elb.amazonaws.com:443", DeniedByRule, 2},
		{"bob", "v1.abc.execute-api.eu-west-1.amazonaws.com:443", Allowed, 1},
		{"bob", "example.com:443", NoRule, 0},
		{"alice", "example.com:443", Allowed, 3},
		{"carol", "example.com:8443", Allowed, 3},
		{"alice", "www.example.com:443", NoRule, 0},
		{"alice", "example.org:443", NoRule, 0},
		{"alice", "a.b.example.org:443", Allowed, 3},
		{"alice", "registry.terraform.io:443", Allowed, 3},
		{"alice", "release-assets.githubusercontent.com:443", Allowed, 3},
		{"alice", "93.184.216.34:443", Allowed, 3},
		{"alice", "[::ffff:93.184.216.34]:443", Allowed, 3},
		{"alice", "8.8.8.8:443", Allowed, 3},
		{"alice", "8.8.4.4:443", NoRule, 0},
		{"alice", "93.184.7.1:443", DeniedByRule, 5},
		{"alice", "secret.example.org:443", Allowed, 3},
		{"dave", "secret.example.org:443", DeniedByRule, 4},
		{"bob", "plain.example.com:80", Allowed, 6},
		{"alice", "nobody.example.com:443", NoRule, 0},
		{"alice", "noport.example.com:443", NoRule, 0},
		{"alice", "[2606:4700::1]:443", IPv6Off, 0},
		{"alice", "10.0.0.1:443", Private, 0},
		{"", "sts.amazonaws.com:443", NoSession, 0},
	} {
		to, err := ParseAuthority(tt.to)
		if err != nil {
			t.Fatal(err)
		}
		groups := map[string][]string{"alice": {"operators"}, "dave": {"staff", "operators"}}[tt.who]
		got := p.Decide(Request{User: tt.who, Groups: groups, Destination: to})
		want := Decision{Allow: tt.want == Allowed, Reason: tt.want, Rule: tt.rule, TLS: tt.rule == 1}
		if got != want {
			t.Errorf("%s to %s: %+v, want %+v", tt.who, tt.to, got, want)
		}
	}
	to, _ := ParseAuthority("sts.amazonaws.com:443")
	if d := p.Decide(Request{User: "bob", Destination: to, Plain: true}); d.Allow || d.Reason != TLSRequired || d.Rule != 1 {
		t.Errorf("plain: %+v", d)
	}
	if d := p.DecideAddress(Request{User: "bob", Destination: to}, netip.MustParseAddr("93.184.7.9")); d.Allow || d.Rule != 5 {
		t.Errorf("a name that resolves into a denied network: %+v", d)
	}
}

func TestZeroValuesDeny(t *testing.T) {
	p, err := Compile(Config{})
	if err != nil {
		t.Fatal(err)
	}
	to, _ := ParseAuthority("sts.amazonaws.com:443")
	for _, p := range []*Policy{p, new(Policy)} {
		for _, q := range []Request{{}, {User: "bob"}, {Destination: to}, {User: "bob", Destination: to}} {
			if d := p.Decide(q); d.Allow {
				t.Errorf("%+v: %+v", q, d)
			}
		}
		if d := p.DecideAddress(Request{}, netip.Addr{}); d.Allow {
			t.Errorf("no address: %+v", d)
		}
	}
	if new(Decision).Allow || new(Destination).Valid() {
		t.Error("a zero value allows")
	}
}

func TestConfigurationErrorsNameTheRuleTheValueAndTheWayOut(t *testing.T) {
	for _, tt := range []struct {
		c    Config
		want string
	}{
		{Config{Rules: []Rule{{}}}, "proxy.rule 1: neither deny nor allow: add the destinations"},
		{Config{Rules: []Rule{{Allow: []string{"a.b"}}, {Allow: []string{"a.b"}, Deny: []string{"c.d"}}}}, "proxy.rule 2: both deny and allow: make two rules"},
		{Config{Rules: []Rule{{Allow: []string{"@amazon"}}}}, `proxy.rule 1: allow set "@amazon" does not exist: there are @aws`},
		{Config{Rules: []Rule{{Allow: []string{"@aws"}}}}, `proxy.rule 1: allow set "@aws" needs proxy.regions, which is empty: add`},
		{Config{Rules: []Rule{{Allow: []string{"a*.example.com"}}}}, `proxy.rule 1: allow "a*.example.com": a * stands only for whole labels`},
		{Config{Rules: []Rule{{Deny: []string{"10.1.2.3/16"}}}}, `proxy.rule 1: deny "10.1.2.3/16" has bits below its length: write 10.1.0.0/16`},
		{Config{Rules: []Rule{{Deny: []string{"10.1/16"}}}}, `proxy.rule 1: deny "10.1/16" is not a CIDR: write 192.0.2.0/24`},
		{Config{Rules: []Rule{{Allow: []string{"127.1"}}}}, `proxy.rule 1: allow "127.1" is no name`},
		{Config{Rules: []Rule{{Allow: []string{"a.b:443"}}}}, `proxy.rule 1: allow "a.b:443" is no name`},
		{Config{Rules: []Rule{{Allow: []string{"a.b"}, Except: []string{"c"}}}}, `proxy.rule 1: except ["c"] belongs to a deny rule`},
		{Config{Rules: []Rule{{Deny: []string{"a.b"}, Except: []string{"*"}}}}, `proxy.rule 1: except "*"`},
		{Config{Rules: []Rule{{Deny: []string{"a.b"}, TLS: true}}}, `proxy.rule 1: tls = true belongs to an allow rule`},
		{Config{Rules: []Rule{{Allow: []string{"a.b"}, Users: []string{"*"}}}}, `proxy.rule 1: users "*" is no user: write groups`},
		{Config{Rules: []Rule{{Allow: []string{"a.b"}, Ports: []uint16{0}}}}, `proxy.rule 1: ports: 0 is no port`},
		{Config{Regions: []string{"us-east-1.evil"}}, `proxy.regions "us-east-1.evil" is no region`},
		{Config{AllowPrivate: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}}, `proxy.allow_private 0.0.0.0/0 is nearly everything`},
		{Config{AllowPrivate: []netip.Prefix{netip.MustParsePrefix("169.254.0.0/16")}}, `proxy.allow_private 169.254.0.0/16: metadata addresses are never reached`},
		{Config{AllowPrivate: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/8")}}, `proxy.allow_private 10.1.0.0/8 has bits below its length: write 10.0.0.0/8`},
		{Config{AllowPrivate: []netip.Prefix{{}}}, `is no CIDR`},
	} {
		_, err := Compile(tt.c)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%+v: %v, want %q", tt.c, err, tt.want)
		}
	}
	_, err := Compile(Config{Rules: []Rule{{}, {Allow: []string{"@x", "a..b"}}}})
	if n := strings.Count(err.Error(), "\n"); n != 2 {
		t.Errorf("want three errors at once: %v", err)
	}
	if _, err := New(Config{}, nil, nil); err == nil || !strings.Contains(err.Error(), "proxy.idle 0s") || !strings.Contains(err.Error(), "proxy.per_user_connections 0") {
		t.Errorf("no limits: %v", err)
	}
}

func TestACompiledPolicyDoesNotFollowItsConfiguration(t *testing.T) {
	c := reference()
	p, _ := Compile(c)
	c.Rules[2].Groups[0], c.Rules[2].Ports[0] = "*", 1
	to, _ := ParseAuthority("example.com:443")
	if d := p.Decide(Request{User: "bob", Destination: to}); d.Allow {
		t.Error("it follows")
	}
	if d := p.Decide(Request{User: "carol", Destination: to}); !d.Allow {
		t.Error("it follows")
	}
}

func BenchmarkDecide(b *testing.B) {
	p, _ := Compile(reference())
	to, _ := ParseAuthority("bucket.s3.eu-west-1.amazonaws.com:443")
	q := Request{User: "bob", Groups: []string{"readers"}, Destination: to}
	b.ReportAllocs()
	for b.Loop() {
		if !p.Decide(q).Allow {
			b.Fatal("denied")
		}
	}
}
