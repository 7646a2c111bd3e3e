package awsiam

import (
	"fmt"
	"regexp"
	"strings"
	"testing"
)

// Operators by the truth tables of docs.aws.amazon.com/IAM/latest/UserGuide/reference_policies_elements_condition_operators.html
// and …_condition-single-vs-multi-valued-context-keys.html. nil values: the request does not have the key.
func TestOperators(t *testing.T) {
	absent := []string(nil)
	one := func(v ...string) []string { return v }
	for _, c := range []struct {
		operator string
		want     string // JSON
		got      []string
		holds    bool
	}{
		{"StringEquals", `"a"`, one("a"), true}, {"StringEquals", `"a"`, one("A"), false}, {"StringEquals", `["b","a"]`, one("a"), true},
		{"StringEquals", `"*"`, one("a"), false}, {"StringEquals", `"a"`, absent, false}, {"StringEqualsIfExists", `"a"`, absent, true},
		{"StringNotEquals", `"a"`, one("a"), false}, {"StringNotEquals", `["b","c"]`, one("a"), true}, {"StringNotEquals", `["b","a"]`, one("a"), false},
		{"StringNotEquals", `"a"`, absent, true}, {"StringNotEqualsIfExists", `"a"`, absent, true}, {"StringNotEqualsIfExists", `"a"`, one("a"), false},
		{"StringEqualsIgnoreCase", `"Ab"`, one("aB"), true}, {"StringNotEqualsIgnoreCase", `"Ab"`, one("aB"), false},
		{"StringLike", `"a*c?"`, one("abbcd"), true}, {"StringLike", `"a*c?"`, one("abbc"), false}, {"StringLike", `"*"`, one(""), true}, {"StringLike", `"*"`, absent, false},
		{"StringNotLike", `"a*"`, one("b"), true}, {"StringLike", `"${*}"`, one("*"), true}, {"StringLike", `"${*}"`, one("x"), false}, {"StringLike", `"${$}{x}"`, one("${x}"), true},
		{"StringEquals", `"${aws:username}"`, one("al*"), true}, {"StringLike", `"${aws:username}"`, one("alice"), false},
		{"StringEquals", `"${aws:PrincipalTag/team, 'none'}"`, one("none"), true}, {"StringEquals", `"${aws:PrincipalTag/team}"`, one(""), false},
		{"Bool", `"true"`, one("true"), true}, {"Bool", `true`, one("True"), true}, {"Bool", `"false"`, one("true"), false}, {"Bool", `"false"`, absent, false}, {"BoolIfExists", `"false"`, absent, true},
		{"Null", `"true"`, absent, true}, {"Null", `"true"`, one("x"), false}, {"Null", `"false"`, one("x"), true}, {"Null", `false`, absent, false},
		{"IpAddress", `"192.0.2.0/24"`, one("192.0.2.9"), true}, {"IpAddress", `"192.0.2.7/24"`, one("192.0.2.9"), true}, {"IpAddress", `"192.0.2.9"`, one("192.0.2.9"), true},
		{"IpAddress", `["198.51.100.0/24","192.0.2.0/24"]`, one("203.0.113.1"), false}, {"IpAddress", `"0.0.0.0/0"`, one("2001:db8::1"), false}, {"IpAddress", `"2001:db8::/32"`, one("2001:0db8:0::1"), true},
		{"IpAddress", `"192.0.2.0/24"`, one("::ffff:192.0.2.9"), true}, {"IpAddress", `"0.0.0.0/0"`, absent, false}, {"IpAddressIfExists", `"192.0.2.0/24"`, absent, true},
		{"NotIpAddress", `["198.51.100.0/24","192.0.2.0/24"]`, one("192.0.2.9"), false}, {"NotIpAddress", `"192.0.2.0/24"`, one("203.0.113.1"), true},
		{"NotIpAddress", `"192.0.2.0/24"`, one("2001:db8::1"), true}, {"NotIpAddress", `"192.0.2.0/24"`, absent, true}, {"NotIpAddressIfExists", `"192.0.2.0/24"`, absent, true},
		{"ArnLike", `"arn:aws:iam::*:user/*"`, one("arn:aws:iam::111122223333:user/a/b"), true}, {"ArnEquals", `"arn:aws:iam::*:user/*"`, one("arn:aws:iam::111122223333:user/a"), true},
		{"ArnLike", `"arn:*:iam::*:user/*"`, one("arn:aws-cn:iam::111122223333:user/a"), true}, {"ArnLike", `"arn:aws:*:user:x:y"`, one("arn:aws:iam::1:user:x:y"), false},
		{"ArnLike", `"arn:aws:s3:::b*"`, one("arn:aws:s3:::b:c"), true}, {"ArnLike", `"arn:aws:iam::*:user/*"`, one("alice"), false}, {"ArnNotLike", `"arn:aws:iam::*:user/*"`, one("arn:aws:iam::1:role/x"), true},
		{"ArnNotEquals", `"arn:aws:iam::*:user/*"`, one("arn:aws:iam::1:user/x"), false}, {"ArnNotLike", `"arn:aws:iam::*:user/*"`, absent, true},
		{"NumericEquals", `3600`, one("3600.0"), true}, {"NumericLessThan", `"3600"`, one("3599"), true}, {"NumericLessThan", `"3600"`, one("3600"), false}, {"NumericLessThanEquals", `"10"`, one("9.5"), true},
		{"NumericGreaterThan", `"10"`, one("9"), false}, {"NumericGreaterThanEquals", `"-1"`, one("-1"), true}, {"NumericNotEquals", `"1"`, one("2"), true}, {"NumericLessThan", `"1"`, absent, false},
		{"DateLessThan", `"2026-01-31T12:00:00Z"`, one("2026-01-31T13:00:00+02:00"), true}, {"DateLessThan", `"2026-01-31T12:00:00Z"`, one("2026-01-31T12:00:00Z"), false},
		{"DateGreaterThan", `"2026-01-31"`, one("2026-01-31T00:00Z"), false}, {"DateGreaterThanEquals", `"1769817600"`, one("2026-01-31T00:00:00Z"), true}, {"DateEquals", `"2026-01-31"`, one("1769817600"), true},
		{"DateNotEquals", `"2026-01-31"`, one("2026-01-31"), false}, {"DateLessThanEquals", `"2026-01-31"`, one("2026-01-30"), true},
		{"ForAnyValue:StringEquals", `["a","b"]`, one("b", "c"), true}, {"ForAnyValue:StringEquals", `["a","b"]`, one("c"), false}, {"ForAnyValue:StringEquals", `"a"`, absent, false},
		{"ForAllValues:StringEquals", `["a","b"]`, one("b", "a"), true}, {"ForAllValues:StringEquals", `["a","b"]`, one("b", "c"), false}, {"ForAllValues:StringEquals", `"a"`, absent, true},
		{"ForAnyValue:StringNotEquals", `["a","b"]`, one("a", "c"), true}, {"ForAnyValue:StringNotEquals", `["a","b"]`, one("a"), false}, {"ForAnyValue:StringNotEquals", `"a"`, absent, false},
		{"ForAllValues:StringNotLike", `"a*"`, one("b", "c"), true}, {"ForAllValues:StringNotLike", `"a*"`, one("b", "ab"), false}, {"ForAnyValue:StringLikeIfExists", `"a"`, absent, false}, {"ForAllValues:StringLikeIfExists", `"a"`, absent, true},
	} {
		name := fmt.Sprintf("%s %s of %q", c.operator, c.want, c.got)
		f := parse(t, `{"Version":"2012-10-17","Statement":{"Effect":"Allow","Action":"*","Resource":"*","Condition":{"`+c.operator+`":{"my:Key":`+c.want+`}}}}`)
		caller := Caller{Principal: alice, From: atHome, Set: map[string][]string{"aws:username": {"al*"}}, Unset: []string{"aws:PrincipalTag/team"}}
		if c.got == nil {
			caller.Unset = append(caller.Unset, "MY:key")
		} else {
			caller.Set["MY:key"] = c.got
		}
		if got := decide(t, Set{Identity: []File{f}}, caller, "s3:ListAllMyBuckets", "*"); got != c.holds {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func TestElements(t *testing.T) {
	for _, c := range []struct {
		statement, action, resource string
		applies                     bool
	}{
		{`"Action":"s3:get*","Resource":"*"`, "S3:GetObject", "arn:aws:s3:::b/k", true},
		{`"Action":["ec2:*","s3:Get?bject"],"Resource":"*"`, "s3:GetObject", "arn:aws:s3:::b/k", true},
		{`"Action":"s3:Get","Resource":"*"`, "s3:GetObject", "arn:aws:s3:::b/k", false},
		{`"NotAction":["iam:*","sts:*"],"Resource":"*"`, "s3:GetObject", "arn:aws:s3:::b/k", true},
		{`"NotAction":["iam:*","sts:*"],"Resource":"*"`, "iam:GetUser", "*", false},
		{`"Action":"*","Resource":"arn:aws:s3:::b/*"`, "s3:GetObject", "arn:aws:s3:::b/k/l:m", true},
		{`"Action":"*","Resource":"arn:aws:s3:::b/*"`, "s3:GetObject", "arn:aws:s3:::B/k", false},
		{`"Action":"*","Resource":"arn:aws:s3:::b/*"`, "s3:ListAllMyBuckets", "*", false},
		{`"Action":"*","Resource":"arn:aws:ec2"`, "ec2:RunInstances", "arn:aws:ec2:eu-west-1:111122223333:instance/i", true},
		{`"Action":"*","Resource":"arn:aws:ec2:*:instance/i"`, "ec2:RunInstances", "arn:aws:ec2:eu-west-1:111122223333:instance/i", false},
		{`"Action":"*","NotResource":["arn:aws:s3:::a","arn:aws:s3:::b/*"]`, "s3:GetObject", "arn:aws:s3:::b/k", false},
		{`"Action":"*","NotResource":["arn:aws:s3:::a","arn:aws:s3:::b/*"]`, "s3:GetObject", "arn:aws:s3:::c/k", true},
		{`"Action":"*","Resource":"arn:aws:s3:::home/${aws:username}/*"`, "s3:GetObject", "arn:aws:s3:::home/alice/k", true},
		{`"Action":"*","Resource":"arn:aws:s3:::home/${aws:PrincipalTag/none}/*"`, "s3:GetObject", "arn:aws:s3:::home/alice/k", false},
	} {
		f := parse(t, `{"Version":"2012-10-17","Statement":[{"Effect":"Allow",`+c.statement+`}]}`)
		if got := decide(t, Set{Identity: []File{f}}, Caller{Principal: alice, From: atHome, Unset: []string{"aws:PrincipalTag/none"}}, c.action, c.resource); got != c.applies {
			t.Errorf("%s, %s on %s: %v", c.statement, c.action, c.resource, got)
		}
	}
	old := parse(t, `{"Version":"2008-10-17","Statement":[{"Effect":"Allow","Action":"*","Resource":"arn:aws:s3:::${aws:username}"}]}`)
	if decide(t, Set{Identity: []File{old}}, Caller{Principal: alice, From: atHome}, "s3:ListBucket", "arn:aws:s3:::alice") {
		t.Error("the language of 2008 has no variables")
	}
}

func TestPrincipals(t *testing.T) {
	for _, c := range []struct {
		effect, element, principal string
		applies                    bool
	}{
		{"Allow", `"Principal":"*"`, alice, true},
		{"Allow", `"Principal":{"AWS":"*"}`, alice, true},
		{"Allow", `"Principal":{"AWS":"` + alice + `"}`, alice, true},
		{"Allow", `"Principal":{"AWS":["` + bot + `","999900001111"]}`, alice, true},
		{"Allow", `"Principal":{"AWS":"arn:aws:iam::999900001111:root"}`, alice, true},
		{"Allow", `"Principal":{"AWS":"arn:aws:iam::111122223333:root"}`, alice, false},
		{"Allow", `"Principal":{"AWS":"` + role + `"}`, "arn:aws:sts::111122223333:assumed-role/PowerUser/alice", true},
		{"Allow", `"Principal":{"Federated":"` + alice + `"}`, alice, false},
		{"Allow", `"Principal":{"Service":"ec2.amazonaws.com"}`, "ec2.amazonaws.com", true},
		{"Allow", `"Principal":{"Service":"ec2.amazonaws.com"}`, alice, false},
		{"Deny", `"NotPrincipal":{"AWS":"` + alice + `"}`, bot, true},
		{"Deny", `"NotPrincipal":{"AWS":"` + alice + `"}`, alice, false},
	} {
		text := `{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Principal":"*","Action":"*"},{"Effect":"` + c.effect + `",` + c.element + `,"Action":"sts:AssumeRole"}]}`
		want := !c.applies
		if c.effect == "Allow" {
			text, want = strings.Replace(text, `{"Effect":"Allow","Principal":"*","Action":"*"},`, "", 1), c.applies
		}
		if got := decide(t, Set{Resource: []File{parse(t, text)}}, Caller{Principal: c.principal, From: atHome}, "sts:AssumeRole", role); got != want {
			t.Errorf("%s %s, %s: %v", c.effect, c.element, c.principal, got)
		}
	}
}

// What is not understood is an error, also where it would not have decided.
func TestTheUnknownIsAnError(t *testing.T) {
	statement := func(s string) string {
		return `{"Version":"2012-10-17","Statement":[{"Effect":"Deny","Action":"*","Resource":"*",` + s + `}]}`
	}
	for text, want := range map[string]string{
		statement(`"Condition":{"IpAdress":{"aws:SourceIp":"192.0.2.1"}}`):                        `statement 1: Condition: operator "IpAdress" is not understood: there are ArnEquals,`,
		statement(`"Condition":{"stringequals":{"a:b":"c"}}`):                                     `operator "stringequals" is not understood`,
		statement(`"Condition":{"NullIfExists":{"a:b":"true"}}`):                                  `operator "NullIfExists" is not understood`,
		statement(`"Condition":{"ForAllValues:Null":{"a:b":"true"}}`):                             `is not understood`,
		statement(`"Condition":{"ForSomeValues:StringLike":{"a:b":"c"}}`):                         `before the colon stands ForAllValues or ForAnyValue`,
		statement(`"Condition":{"BinaryEquals":{"a:b":"QQ=="}}`):                                  `operator "BinaryEquals" is not understood`,
		statement(`"Condition":{"NotBool":{"a:b":"true"}}`):                                       `is not understood`,
		statement(`"Condition":{"IpAddress":{"aws:SourceIp":"192.0.2.300"}}`):                     `IpAddress aws:SourceIp: "192.0.2.300" is no address or CIDR`,
		statement(`"Condition":{"Bool":{"a:b":"yes"}}`):                                           `"yes" is neither true nor false`,
		statement(`"Condition":{"DateLessThan":{"a:b":"yesterday"}}`):                             `"yesterday" is no time`,
		statement(`"Condition":{"NumericLessThan":{"a:b":"1e9"}}`):                                `"1e9" is no number`,
		statement(`"Condition":{"ArnLike":{"a:b":"*"}}`):                                          `"*" is no ARN`,
		statement(`"Condition":{"Bool":{"a:b":"true","A:B":"false"}}`):                            `stands twice`,
		statement(`"Condition":{"Bool":{"a:b":[]}}`):                                              `an empty list`,
		statement(`"Condition":[]`):                                                               `no JSON object`,
		statement(`"Contidion":{}`):                                                               `statement 1: Contidion: not understood`,
		statement(`"action":"*"`):                                                                 `action: not understood`,
		statement(`"Effect":"Allow"`):                                                             `"Effect" stands twice in one object`,
		statement(`"NotAction":"s3:*"`):                                                           `want one of Action and NotAction`,
		statement(`"NotResource":"*"`):                                                            `want one of Resource and NotResource`,
		statement(`"Principal":{"AWS":"arn:aws:iam::1:user/*"}`):                                  `a principal has no wildcard`,
		statement(`"Principal":{"User":"x"}`):                                                     `"User" is not understood`,
		`{"Version":"2012-10-17","Statement":{"Effect":"deny","Action":"*","Resource":"*"}}`:      `Effect "deny": want Allow or Deny`,
		`{"Version":"2012-10-17","Statement":{"Effect":"Deny","Action":"*"}}`:                     `no Resource`,
		`{"Version":"2012-10-17","Statement":{"Effect":"Deny","Action":"s3","Resource":"*"}}`:     `action "s3": want SERVICE:ACTION or *`,
		`{"Version":"2012-10-17","Statement":{"Effect":"Deny","Action":"*","Resource":"bucket"}}`: `resource "bucket": want an ARN or *`,
		`{"Version":"2012-10-17","Statement":{"Effect":"Allow","Action":"*","NotPrincipal":"*"}}`: `NotPrincipal with Allow`,
		`{"Version":"2013-10-17","Statement":{"Effect":"Deny","Action":"*","Resource":"*"}}`:      `Version 2013-10-17: want "2012-10-17"`,
		`{"Version":"2012-10-17"}`:                                                                `no Statement in it`,
		`{"Version":"2012-10-17","Statement":[]} {}`:                                              `more text after the policy's end`,
		`{"Version":"2012-10-17","Statements":[]}`:                                                `element "Statements" is not understood`,
		`[]`:                                   `no policy: want a JSON object`,
		`{"Version":`:                          `not JSON: it ends too early`,
		strings.Repeat("[", 1000):              `too deep`,
		`"` + strings.Repeat("x", maxDocument): `no policy has more than 65536`,
		`{"Version":"2012-10-17","Statement":{"Effect":{},"Action":"*","Resource":"*"}}`:    `Effect ""`,
		`{"Version":"2012-10-17","Statement":{"Effect":"Deny","Action":{},"Resource":"*"}}`: `want a text or a list of texts`,
	} {
		if _, err := Parse([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.200s\n%v, want %q", text, err, want)
		}
	}
	for condition, want := range map[string]string{
		`"StringEquals":{"aws:PrincipalOrgID":"o-x"}`:                 `statement 1: what aws:PrincipalOrgID is in the request is not known: give --set aws:PrincipalOrgID=VALUE, or --unset aws:PrincipalOrgID`,
		`"StringEquals":{"aws:SourceIpp":"x"}`:                        `what aws:SourceIpp is`,
		`"StringEquals":{"aws:PrincipalArn":"arn:aws:iam::1:user/x"}`: `give --principal ARN`,
		`"StringEquals":{"many:values":"a"}`:                          `the request has 2 values, and it takes one: write ForAllValues:`,
		`"StringEquals":{"one:value":"${many:values}"}`:               `a variable takes one`,
		`"StringEquals":{"one:value":"${other:key}"}`:                 `what other:key is`,
		`"StringNotEquals":{"one:value":"${aws:username}"}`:           `has no value in the request`,
		`"StringEquals":{"one:value":"${aws:username"}`:               `a variable without its }`,
		`"IpAddress":{"one:value":"192.0.2.1"}`:                       `"a" is no address`,
		`"NumericEquals":{"one:value":"1"}`:                           `"a" is no number`,
	} {
		// Its action does not match, and a Deny before it decides: it is an error all the same.
		f := parse(t, `{"Version":"2012-10-17","Statement":[{"Effect":"Deny","Action":"other:Thing","Resource":"*","Condition":{`+condition+`}},{"Effect":"Deny","Action":"*","Resource":"*"}]}`)
		r, err := Caller{From: atHome, Now: now, Set: map[string][]string{"many:values": {"a", "b"}, "one:value": {"a"}}}.Make("s3:GetObject", "*")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := (Set{Identity: []File{f}}).Evaluate(r); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", condition, err, want)
		}
	}
	for _, c := range []struct {
		caller           Caller
		action, resource string
		want             string
	}{
		{Caller{From: atHome}, "s3", "*", `action "s3"`}, {Caller{From: atHome}, "s3:*", "*", `action "s3:*"`}, {Caller{From: atHome}, "s3:GetObject", "b/k", `resource "b/k"`},
		{Caller{}, "s3:GetObject", "*", "comes from nowhere"}, {Caller{From: atHome, Principal: "alice"}, "s3:GetObject", "*", `principal "alice"`},
		{Caller{From: atHome, Principal: "arn:aws:iam::1:user/x"}, "s3:GetObject", "*", `account "1"`}, {Caller{From: atHome, Principal: "arn:aws:iam::111122223333:group/x"}, "s3:GetObject", "*", "want a user, a role"},
	} {
		if _, err := c.caller.Make(c.action, c.resource); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v, want %q", err, c.want)
		}
	}
}

// Whatever stands in a file, Parse gives an error or a policy that it reads again as the same.
func FuzzParse(f *testing.F) {
	for _, k := range Kinds().Names() {
		p, err := Make(k, options(k))
		if err != nil {
			f.Fatal(err)
		}
		f.Add([]byte(p.Text()))
	}
	f.Add([]byte(`{"Statement":{"Effect":"Deny","NotPrincipal":"*","NotAction":["a:b"],"NotResource":"arn:","Condition":{"Null":{"a":true}}}}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		d, err := Parse(text)
		if err != nil {
			return
		}
		again, err := Parse([]byte(d.Text()))
		if err != nil || again.Text() != d.Text() {
			t.Fatalf("%v\n%s\n%s", err, d.Text(), again.Text())
		}
		r, err := Caller{Principal: alice, From: atHome, Now: now}.Make("s3:GetObject", "arn:aws:s3:::b/k")
		if err != nil {
			t.Fatal(err)
		}
		dec, err := Set{Identity: []File{{"f", d}}}.Evaluate(r)
		if err != nil && dec.Allow {
			t.Fatal("an error that allows")
		}
	})
}

// The wildcards' matcher against a regular expression.
func FuzzPattern(f *testing.F) {
	f.Add("a*b?c", "axxbyc")
	f.Add("**a*", "ba")
	f.Add("?*?", "x")
	f.Fuzz(func(t *testing.T, want, got string) {
		if len(want) > 100 || len(got) > 100 || strings.ToValidUTF8(want, "") != want || strings.ToValidUTF8(got, "") != got {
			return
		}
		p, err := compile(want, true, nil)
		if err != nil {
			t.Fatal(err)
		}
		slow := regexp.MustCompile(`(?s)^` + strings.NewReplacer(`\*`, `.*`, `\?`, `.`).Replace(regexp.QuoteMeta(want)) + `$`)
		if p.matches(got) != slow.MatchString(got) || p.String() != want {
			t.Fatalf("%q of %q: %v", want, got, p.matches(got))
		}
	})
}

// A bucket's policy beside the caller's own.
func TestResourcePolicies(t *testing.T) {
	const bucket = `{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Principal":{"AWS":"%s"},"Action":"s3:*","Resource":"*"}]}`
	none := `{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":"ec2:*","Resource":"*"}]}`
	for _, c := range []struct {
		named, own, resource string
		want                 bool
	}{
		{alice, none, "arn:aws:s3:::b/k", true},
		{"*", none, "arn:aws:s3:::b/k", true},
		{"arn:aws:iam::999900001111:root", none, "arn:aws:s3:::b/k", false}, // the account is left to allow it
		{"arn:aws:iam::999900001111:root", allowAll, "arn:aws:s3:::b/k", true},
		{bot, allowAll, "arn:aws:s3:::b/k", true},
		{bot, none, "arn:aws:s3:::b/k", false},
		{alice, none, "arn:aws:s3:eu-west-1:111122223333:accesspoint/x", false}, // another account's
		{bot, allowAll, "arn:aws:s3:eu-west-1:111122223333:accesspoint/x", false},
		{alice, allowAll, "arn:aws:s3:eu-west-1:111122223333:accesspoint/x", true},
	} {
		s := Set{Identity: []File{parse(t, c.own)}, Resource: []File{parse(t, fmt.Sprintf(bucket, c.named))}}
		if got := decide(t, s, Caller{Principal: alice, From: atHome}, "s3:GetObject", c.resource); got != c.want {
			t.Errorf("%s, %s, %s: %v", c.named, c.own, c.resource, got)
		}
	}
}
