package awsiam

import (
	"net/netip"
	"testing"
)

func parse(t *testing.T, text string) File {
	t.Helper()
	d, err := Parse([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return File{"test.json", d}
}

func of(p Policy) File { return File{p.Kind, p.Document} }

func decide(t *testing.T, s Set, c Caller, action, resource string) bool {
	t.Helper()
	if c.Now.IsZero() {
		c.Now = now
	}
	r, err := c.Make(action, resource)
	if err != nil {
		t.Fatal(err)
	}
	d, err := s.Evaluate(r)
	if err != nil {
		t.Fatal(err)
	}
	return d.Allow
}

var (
	atHome  = netip.MustParseAddr("52.94.76.10")
	stolen  = netip.MustParseAddr("198.51.100.7")
	session = now.Add(-1)
)

const allowAll = `{"Version":"2012-10-17","Statement":{"Effect":"Allow","Action":"*","Resource":"*"}}`

// What people get wrong, each with the policy that is right beside it.
func TestMistakes(t *testing.T) {
	bareDeny := `{"Version":"2012-10-17","Statement":{"Effect":"Deny","Action":"*","Resource":"*","Condition":{
		"NotIpAddress":{"aws:SourceIp":"52.94.76.10/32"},"Bool":{"aws:ViaAWSService":"false"}}}}`
	orgDeny := `{"Version":"2012-10-17","Statement":{"Effect":"Deny","Action":"*","Resource":"*","Condition":{
		"NotIpAddressIfExists":{"aws:SourceIp":"52.94.76.10/32"},"BoolIfExists":{"aws:ViaAWSService":"false"}}}}`
	mfaBool := `{"Version":"2012-10-17","Statement":{"Effect":"Deny","Action":"*","Resource":"*","Condition":{"Bool":{"aws:MultiFactorAuthPresent":"false"}}}}`
	allowMFA := `{"Version":"2012-10-17","Statement":{"Effect":"Allow","Action":"*","Resource":"*","Condition":{"BoolIfExists":{"aws:MultiFactorAuthPresent":"true"}}}}`
	allowIP := `{"Version":"2012-10-17","Statement":{"Effect":"Allow","Action":"*","Resource":"*","Condition":{"IpAddress":{"aws:SourceIp":"52.94.76.10/32"}}}}`
	all := parse(t, allowAll)
	guard := func(kind string, vpcs ...string) File {
		return of(policy(t, kind, func(o *Options) { o.VPCs = vpcs }))
	}
	const vpc, foreign = "vpc-0123456789abcdef0", "vpc-0badbadbadbadbad0"
	inside := netip.MustParseAddr("10.0.0.9")
	for _, c := range []struct {
		name   string
		set    Set
		caller Caller
		action string
		want   bool
	}{
		{"an IP condition on AssumeRole does not follow the session", Set{Resource: nil, Identity: []File{of(policy(t, "bastion-user", nil)), all}},
			Caller{Principal: role, From: stolen, Issued: session}, "s3:ListAllMyBuckets", true},
		{"the role's guard does", Set{Identity: []File{guard("role-guard"), all}}, Caller{Principal: role, From: stolen, Issued: session}, "s3:ListAllMyBuckets", false},
		{"and so does the session's pin", Set{Identity: []File{all}, Session: []File{guard("session-pin")}}, Caller{Principal: role, From: stolen, Issued: session}, "s3:ListAllMyBuckets", false},
		{"the pin lets the owner work", Set{Identity: []File{all}, Session: []File{guard("session-pin")}}, Caller{Principal: role, From: atHome, Issued: session}, "s3:ListAllMyBuckets", true},
		{"a pinned session makes no unpinned one", Set{Identity: []File{all}, Session: []File{guard("session-pin")}}, Caller{Principal: role, From: atHome, Issued: session}, "sts:AssumeRole", false},
		{"nor by federation", Set{Identity: []File{all}, Session: []File{guard("session-pin")}}, Caller{Principal: role, From: atHome, Issued: session}, "sts:GetFederationToken", false},
		{"a pin grants nothing", Set{Identity: []File{guard("role-guard")}, Session: []File{guard("session-pin")}}, Caller{Principal: role, From: atHome, Issued: session}, "s3:ListAllMyBuckets", false},

		{"Allow with IpAddress alone refuses", Set{Identity: []File{parse(t, allowIP)}}, Caller{Principal: alice, From: stolen}, "s3:ListAllMyBuckets", false},
		{"until another Allow is beside it", Set{Identity: []File{parse(t, allowIP), all}}, Caller{Principal: alice, From: stolen}, "s3:ListAllMyBuckets", true},
		{"a Deny holds beside it", Set{Identity: []File{parse(t, allowIP), all, guard("user-guard")}}, Caller{Principal: alice, From: stolen}, "s3:ListAllMyBuckets", false},

		{"a bare NotIpAddress denies one's own VPC's endpoint", Set{Identity: []File{all, parse(t, bareDeny)}}, Caller{Principal: role, From: inside, VPC: vpc, Issued: session}, "s3:ListAllMyBuckets", false},
		{"the VPC clause spares it", Set{Identity: []File{all, guard("role-guard", vpc)}}, Caller{Principal: role, From: inside, VPC: vpc, Issued: session}, "s3:ListAllMyBuckets", true},
		{"and no stranger's", Set{Identity: []File{all, guard("role-guard", vpc)}}, Caller{Principal: role, From: inside, VPC: foreign, Issued: session}, "s3:ListAllMyBuckets", false},
		{"and no stranger's address", Set{Identity: []File{all, guard("role-guard", vpc)}}, Caller{Principal: role, From: stolen, Issued: session}, "s3:ListAllMyBuckets", false},
		{"without a VPC no endpoint is spared", Set{Identity: []File{all, guard("role-guard")}}, Caller{Principal: role, From: inside, VPC: vpc, Issued: session}, "s3:ListAllMyBuckets", false},
		{"an endpoint cannot lend the egress' address", Set{Identity: []File{all, guard("role-guard")}}, Caller{Principal: role, From: atHome, VPC: foreign, Issued: session}, "s3:ListAllMyBuckets", false},
		{"a call that AWS makes goes on", Set{Identity: []File{all, guard("role-guard")}}, Caller{Principal: role, From: stolen, Issued: session, ViaService: true}, "s3:ListAllMyBuckets", true},

		{"a Deny with Bool lets long-lived keys through", Set{Identity: []File{all, parse(t, mfaBool)}}, Caller{Principal: alice, From: atHome}, "s3:ListAllMyBuckets", true},
		{"though it refuses a session without a code", Set{Identity: []File{all, parse(t, mfaBool)}}, Caller{Principal: alice, From: atHome, Issued: session}, "s3:ListAllMyBuckets", false},
		{"so does an Allow with BoolIfExists", Set{Identity: []File{parse(t, allowMFA)}}, Caller{Principal: alice, From: atHome}, "s3:ListAllMyBuckets", true},
		{"mfa does not", Set{Identity: []File{all, of(policy(t, "mfa", nil))}}, Caller{Principal: alice, From: atHome}, "s3:ListAllMyBuckets", false},
		{"mfa refuses a session without a code", Set{Identity: []File{all, of(policy(t, "mfa", nil))}}, Caller{Principal: alice, From: atHome, Issued: session}, "s3:ListAllMyBuckets", false},
		{"mfa lets a session with a code work", Set{Identity: []File{all, of(policy(t, "mfa", nil))}}, Caller{Principal: alice, From: atHome, Issued: session, MFA: true}, "s3:ListAllMyBuckets", true},
		{"mfa lets keys ask for a session", Set{Identity: []File{of(policy(t, "mfa", nil))}}, Caller{Principal: alice, From: atHome}, "sts:GetSessionToken", true},
		{"mfa lets keys become no role", Set{Identity: []File{all, of(policy(t, "mfa", nil))}}, Caller{Principal: alice, From: atHome}, "sts:AssumeRole", false},
		{"mfa locks a role out, whose sessions carry none", Set{Identity: []File{all, of(policy(t, "mfa", nil))}}, Caller{Principal: role, From: atHome, Issued: session}, "s3:ListAllMyBuckets", false},

		{"an organisation-wide Deny breaks services' roles", Set{SCP: []File{parse(t, orgDeny)}}, Caller{Principal: "arn:aws:iam::111122223333:role/service-role/fn", From: stolen, Issued: session}, "s3:ListAllMyBuckets", false},
		{"scp-guard does not", Set{SCP: []File{guard("scp-guard")}}, Caller{Principal: "arn:aws:iam::111122223333:role/service-role/fn", From: stolen, Issued: session}, "s3:ListAllMyBuckets", true},
		{"scp-guard binds users", Set{SCP: []File{guard("scp-guard")}}, Caller{Principal: alice, From: stolen}, "s3:ListAllMyBuckets", false},
		{"scp-guard binds Identity Center", Set{SCP: []File{guard("scp-guard")}}, Caller{Principal: "arn:aws:iam::111122223333:role/aws-reserved/sso.amazonaws.com/eu-west-1/AWSReservedSSO_Power_0123456789abcdef", From: stolen, Issued: session}, "s3:ListAllMyBuckets", false},
		{"from the egress they work", Set{SCP: []File{guard("scp-guard")}}, Caller{Principal: alice, From: atHome}, "s3:ListAllMyBuckets", true},
		{"CloudShell, which has an address of AWS's, breaks", Set{SCP: []File{guard("scp-guard")}}, Caller{Principal: alice, From: netip.MustParseAddr("3.120.0.9")}, "s3:ListAllMyBuckets", false},

		{"GetCallerIdentity tests nothing", Set{Identity: []File{guard("user-guard")}}, Caller{Principal: alice, From: stolen}, "sts:GetCallerIdentity", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := decide(t, c.set, c.caller, c.action, "*"); got != c.want {
				t.Errorf("allowed: %v", got)
			}
		})
	}
}

// The kinds' own promises, beyond the mistakes.
func TestKindsKeepTheirPromises(t *testing.T) {
	all := parse(t, allowAll)
	saml, oidc := "arn:aws:iam::111122223333:saml-provider/corp", "arn:aws:iam::111122223333:oidc-provider/token.actions.githubusercontent.com"
	trust := []File{of(policy(t, "role-trust", func(o *Options) {
		o.SAML, o.OIDC, o.Audience, o.Subject = saml, oidc, "sts.amazonaws.com", "repo:example/infra:*"
	}))}
	github := func(sub string) map[string][]string {
		return map[string][]string{"token.actions.githubusercontent.com:aud": {"sts.amazonaws.com"}, "token.actions.githubusercontent.com:sub": {sub}, "SAML:aud": nil}
	}
	corp := map[string][]string{"SAML:aud": {"https://signin.aws.amazon.com/saml"}, "token.actions.githubusercontent.com:aud": nil, "token.actions.githubusercontent.com:sub": nil}
	stranger := map[string][]string{"SAML:aud": nil, "token.actions.githubusercontent.com:aud": nil, "token.actions.githubusercontent.com:sub": nil}
	spare := func(kind string, who ...string) File {
		return of(policy(t, kind, func(o *Options) { o.BreakGlass = append(who, rescue)[:1] }))
	}
	service := []File{of(policy(t, "service-account", nil)), all}
	revoked := []File{all, of(policy(t, "revoke-sessions", nil))}
	for _, c := range []struct {
		name             string
		set              Set
		caller           Caller
		action, resource string
		want             bool
	}{
		{"a user becomes the role with MFA at the egress", Set{Resource: trust}, Caller{Principal: alice, From: atHome, MFA: true, Issued: session, Set: stranger}, "sts:AssumeRole", role, true},
		{"also by IPv6", Set{Resource: trust}, Caller{Principal: alice, From: netip.MustParseAddr("2600:1f18::10"), MFA: true, Issued: session, Set: stranger}, "sts:AssumeRole", role, true},
		{"under the certificate's name", Set{Resource: trust}, Caller{Principal: alice, From: atHome, MFA: true, Issued: session, Set: stranger}, "sts:SetSourceIdentity", role, true},
		{"not without MFA", Set{Resource: trust}, Caller{Principal: alice, From: atHome, Set: stranger}, "sts:AssumeRole", role, false},
		{"not from elsewhere", Set{Resource: trust}, Caller{Principal: alice, From: stolen, MFA: true, Issued: session, Set: stranger}, "sts:AssumeRole", role, false},
		{"not another user", Set{Resource: trust}, Caller{Principal: bot, From: atHome, MFA: true, Issued: session, Set: stranger}, "sts:AssumeRole", role, false},
		{"SAML from the egress", Set{Resource: trust}, Caller{Principal: saml, From: atHome, Set: corp}, "sts:AssumeRoleWithSAML", role, true},
		{"SAML from elsewhere", Set{Resource: trust}, Caller{Principal: saml, From: stolen, Set: corp}, "sts:AssumeRoleWithSAML", role, false},
		{"a token of the repository", Set{Resource: trust}, Caller{Principal: oidc, From: atHome, Set: github("repo:example/infra:ref:refs/heads/main")}, "sts:AssumeRoleWithWebIdentity", role, true},
		{"a token of another's", Set{Resource: trust}, Caller{Principal: oidc, From: atHome, Set: github("repo:stranger/x:ref:refs/heads/main")}, "sts:AssumeRoleWithWebIdentity", role, false},
		{"the user's own policy and the trust must agree", Set{Identity: []File{of(policy(t, "bastion-user", nil))}, Resource: trust}, Caller{Principal: alice, From: atHome, MFA: true, Issued: session, Set: stranger}, "sts:AssumeRole", role, true},
		{"on another role they do not", Set{Identity: []File{of(policy(t, "bastion-user", nil))}, Resource: trust}, Caller{Principal: alice, From: atHome, MFA: true, Issued: session, Set: stranger}, "sts:AssumeRole", role + "2", false},

		{"the break-glass user is spared by user-guard", Set{Identity: []File{all, spare("user-guard")}}, Caller{Principal: rescue, From: stolen}, "iam:PutRolePolicy", role, true},
		{"the role by role-guard", Set{Identity: []File{all, spare("role-guard", role)}}, Caller{Principal: role, From: stolen, Issued: session}, "iam:PutRolePolicy", role, true},
		{"by scp-guard", Set{SCP: []File{spare("scp-guard")}}, Caller{Principal: rescue, From: stolen}, "iam:PutRolePolicy", role, true},
		{"by scp-no-iam-users", Set{SCP: []File{spare("scp-no-iam-users")}}, Caller{Principal: rescue, From: stolen}, "iam:CreateAccessKey", rescue, true},
		{"nobody else is", Set{Identity: []File{all, spare("user-guard")}}, Caller{Principal: rescue + "2", From: stolen}, "iam:PutRolePolicy", role, false},
		{"nobody else makes users", Set{SCP: []File{spare("scp-no-iam-users")}}, Caller{Principal: alice, From: atHome}, "iam:CreateUser", bot, false},
		{"other work goes on", Set{SCP: []File{spare("scp-no-iam-users")}}, Caller{Principal: alice, From: atHome}, "iam:CreateRole", role, true},

		{"a program does its work", Set{Identity: service}, Caller{Principal: bot, From: atHome}, "s3:PutObject", "arn:aws:s3:::backups/db", true},
		{"and no other, whatever else is attached", Set{Identity: service}, Caller{Principal: bot, From: atHome}, "s3:GetObject", "arn:aws:s3:::backups/db", false},
		{"and not elsewhere", Set{Identity: service}, Caller{Principal: bot, From: stolen}, "s3:PutObject", "arn:aws:s3:::backups/db", false},

		{"an earlier session is revoked", Set{Identity: revoked}, Caller{Principal: role, From: atHome, Issued: now.Add(-1e9)}, "s3:ListAllMyBuckets", "*", false},
		{"a later one is not", Set{Identity: revoked}, Caller{Principal: role, From: atHome, Issued: now.Add(1e9)}, "s3:ListAllMyBuckets", "*", true},
		{"a long-lived key is not", Set{Identity: revoked}, Caller{Principal: bot, From: atHome}, "s3:ListAllMyBuckets", "*", true},

		{"mfa lets users enrol their own device", Set{Identity: []File{of(policy(t, "mfa", nil))}}, Caller{Principal: alice, From: atHome}, "iam:EnableMFADevice", alice, true},
		{"and nobody else's", Set{Identity: []File{of(policy(t, "mfa", nil))}}, Caller{Principal: alice, From: atHome}, "iam:EnableMFADevice", bot, false},
		{"a user who is named * enrols for *", Set{Identity: []File{of(policy(t, "mfa", nil))}}, Caller{Principal: alice, From: atHome, Set: map[string][]string{"aws:username": {"*"}}}, "iam:EnableMFADevice", bot, false},
		{"what is reached inside a VPC is not the guard's", Set{Identity: []File{all, of(policy(t, "role-guard", nil))}}, Caller{Principal: role, From: stolen, Issued: session}, "rds-db:connect", "arn:aws:rds-db:us-east-1:111122223333:dbuser:x/y", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := decide(t, c.set, c.caller, c.action, c.resource); got != c.want {
				t.Errorf("allowed: %v", got)
			}
		})
	}
}

// A review finds each mistake in a policy that makes it, and none in the kinds.
func TestReviewFindsTheMistakes(t *testing.T) {
	v := Reviewer{Egress: home, Now: now}
	states := func(s Set, vpc string) map[string]State {
		t.Helper()
		v := v
		v.VPC = vpc
		found, err := v.Review(s)
		if err != nil {
			t.Fatal(err)
		}
		m := map[string]State{}
		for _, f := range found {
			if f.Text == "" || m[f.Name] != "" {
				t.Errorf("%q: no text, or twice", f.Name)
			}
			m[f.Name] = f.State
		}
		return m
	}
	deny := func(condition string) []File {
		return []File{parse(t, `{"Version":"2012-10-17","Statement":{"Effect":"Deny","Action":"*","Resource":"*","Condition":{`+condition+`}}}`)}
	}
	const byIP = `"NotIpAddress":{"aws:SourceIp":"52.94.76.10/32"}`
	for _, c := range []struct {
		name, finding string
		set           Set
		want          State
	}{
		{"only AssumeRole is pinned", "elsewhere", Set{Identity: []File{of(policy(t, "bastion-user", nil))}}, Open},
		{"a Deny of IPv4 alone", "elsewhere", Set{Identity: deny(`"IpAddress":{"aws:SourceIp":"0.0.0.0/0"},` + byIP)}, Open},
		{"a Deny with IpAddress of the bad", "endpoint", Set{Identity: deny(`"Null":{"aws:SourceIp":"false"},` + byIP)}, Open},
		{"AWS's own calls are denied", "by a service", Set{Identity: deny(byIP)}, Breaks},
		{"another address", "at the egress", Set{Identity: deny(`"NotIpAddress":{"aws:SourceIp":"52.94.76.11/32"}`)}, Breaks},
		{"Bool of MFA", "without MFA", Set{Identity: deny(`"Bool":{"aws:MultiFactorAuthPresent":"false"}`)}, Open},
		{"MFA on a role", "MFA on roles", Set{Identity: []File{of(policy(t, "mfa", nil))}}, Breaks},
		{"one's VPC", "own VPC", Set{Identity: deny(byIP + `,"Bool":{"aws:ViaAWSService":"false"}`)}, Breaks},
		{"a Deny for everybody", "service roles", Set{SCP: deny(byIP + `,"Bool":{"aws:ViaAWSService":"false"}`)}, Breaks},
		{"no break-glass", "break-glass", Set{Identity: deny(byIP)}, Breaks},
		{"a pin that can be shaken off", "onward", Set{Session: []File{parse(t, allowAll)}}, Open},
		{"a trust without an address", "trust: elsewhere", Set{Resource: []File{parse(t, `{"Version":"2012-10-17","Statement":{"Effect":"Allow","Principal":{"AWS":"`+alice+`"},"Action":"sts:AssumeRole","Condition":{"Bool":{"aws:MultiFactorAuthPresent":"true"}}}}`)}}, Open},
		{"a trust without MFA", "trust: without MFA", Set{Resource: []File{parse(t, `{"Version":"2012-10-17","Statement":{"Effect":"Allow","Principal":{"AWS":"999900001111"},"Action":"sts:AssumeRole"}}`)}}, Open},
		{"a trust of an address that is not ours", "trust: at the egress", Set{Resource: []File{parse(t, `{"Version":"2012-10-17","Statement":{"Effect":"Allow","Principal":{"AWS":"999900001111"},"Action":"sts:AssumeRole","Condition":{"IpAddress":{"aws:SourceIp":"52.94.76.11"}}}}`)}}, Breaks},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := states(c.set, "vpc-0123456789abcdef0")[c.finding]; got != c.want {
				t.Errorf("%s: %q, want %q", c.finding, got, c.want)
			}
		})
	}
	saved := func(kind string) File {
		return of(policy(t, kind, func(o *Options) {
			o.VPCs, o.BreakGlass = []string{"vpc-0123456789abcdef0"}, []string{rescue}
			if kind == "role-guard" {
				o.BreakGlass = []string{role + "-rescue"}
			}
		}))
	}
	for name, s := range map[string]Set{
		"role-guard": {Identity: []File{saved("role-guard")}}, "user-guard": {Identity: []File{saved("user-guard")}}, "scp-guard": {SCP: []File{saved("scp-guard")}},
		"session-pin":     {Session: []File{of(policy(t, "session-pin", func(o *Options) { o.VPCs = []string{"vpc-0123456789abcdef0"} }))}},
		"service-account": {Identity: []File{of(policy(t, "service-account", nil))}}, "role-trust": {Resource: []File{of(policy(t, "role-trust", nil))}},
	} {
		vpc := "vpc-0123456789abcdef0"
		if name == "service-account" {
			vpc = ""
		}
		for finding, state := range states(s, vpc) {
			if state == Open || state == Breaks {
				t.Errorf("%s: %s is %s", name, finding, state)
			}
		}
	}
}
