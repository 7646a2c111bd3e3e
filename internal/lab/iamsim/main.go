// Command iamsim asks an independent evaluator of IAM policies, @cloud-copilot/iam-simulate for Node, what ours answered:
// every kind of policy that we print, and made-up statements, under made-up requests. It fails on the first difference.
//
//	iamsim [-cases 2000] [-seed 1]    wants npm's registry once, for `npm ci` in a directory of its own
package main

import (
	"bytes"
	"embed"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"perimeterd/internal/awsiam"
)

//go:embed package.json package-lock.json simulate.mjs
var program embed.FS

func main() {
	cases := flag.Int("cases", 2000, "how many requests")
	seed := flag.Uint64("seed", 1, "of the generator")
	flag.Parse()
	if err := run(*cases, *seed); err != nil {
		fmt.Fprintln(os.Stderr, "iamsim:", err)
		os.Exit(1)
	}
}

// question is one case, and our answer.
type question struct {
	set     awsiam.Set
	request awsiam.Request
	ours    awsiam.Decision
}

func run(cases int, seed uint64) error {
	g := generator{rand.New(rand.NewPCG(seed, 1)), time.Date(2026, 1, 31, 12, 0, 0, 0, time.UTC)}
	var all []question
	var asked []any
	allowed := 0
	for i := range cases {
		q, err := g.question()
		if err != nil {
			return fmt.Errorf("case %d: %w", i, err)
		}
		if q.ours.Allow {
			allowed++
		}
		all, asked = append(all, q), append(asked, simulation(q))
	}
	theirs, err := simulate(asked)
	if err != nil {
		return err
	}
	if len(theirs) != len(all) {
		return fmt.Errorf("%d answers to %d cases", len(theirs), len(all))
	}
	differ := 0
	for i, a := range theirs {
		want := "ImplicitlyDenied"
		if all[i].ours.Allow {
			want = "Allowed"
		} else if all[i].ours.By != "" {
			want = "ExplicitlyDenied"
		}
		if a.Answer == want && len(a.Ignored) == 0 {
			continue
		}
		if differ++; differ <= 3 {
			text, _ := json.MarshalIndent(asked[i], "", " ")
			fmt.Printf("case %d: theirs %s (ignored %v), ours %s: %s %s\n%s\n", i, a.Answer, a.Ignored, want, all[i].ours.By, all[i].ours.Text, text)
		}
	}
	fmt.Printf("%d cases, %d allowed by us, %d answered differently by iam-simulate\n", len(all), allowed, differ)
	if differ > 0 {
		return errors.New("the evaluators differ")
	}
	return nil
}

type answer struct {
	Answer  string
	Ignored []string
}

func simulate(asked []any) (answers []answer, err error) {
	dir, err := os.MkdirTemp("", "iamsim-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	if err := os.CopyFS(dir, program); err != nil {
		return nil, err
	}
	install := exec.Command("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error")
	install.Dir = dir
	if out, err := install.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("npm ci: %w: %s", err, out)
	}
	in, err := json.Marshal(asked)
	if err != nil {
		return nil, err
	}
	node := exec.Command("node", filepath.Join(dir, "simulate.mjs"))
	node.Stdin, node.Stderr = bytes.NewReader(in), os.Stderr
	out, err := node.Output()
	if err != nil {
		return nil, fmt.Errorf("node: %w", err)
	}
	return answers, json.Unmarshal(out, &answers)
}

// simulation is the question in iam-simulate's form.
func simulation(q question) map[string]any {
	type named struct {
		Name   string          `json:"name"`
		Policy awsiam.Document `json:"policy"`
	}
	list := func(files []awsiam.File) []named {
		all := []named{}
		for _, f := range files {
			all = append(all, named{f.Name, f.Document})
		}
		return all
	}
	context := map[string]any{}
	for key, values := range q.request.Context() {
		if context[key] = values; len(values) == 1 && key != "aws:calledvia" {
			context[key] = values[0]
		}
	}
	account := "111122223333"
	s := map[string]any{
		"request": map[string]any{"principal": q.request.Principal, "action": q.request.Action,
			"resource": map[string]any{"resource": q.request.Resource, "accountId": account}, "contextVariables": context},
		"identityPolicies": list(q.set.Identity), "resourceControlPolicies": []any{}, "serviceControlPolicies": []any{},
	}
	if len(q.set.SCP) > 0 {
		scp := append(list(q.set.SCP), named{"FullAWSAccess", everything})
		s["serviceControlPolicies"] = []any{map[string]any{"orgIdentifier": "o-1", "policies": scp}}
	}
	if len(q.set.Session) > 0 {
		s["sessionPolicy"] = q.set.Session[0].Document
	}
	if len(q.set.Resource) > 0 {
		s["resourcePolicy"] = q.set.Resource[0].Document
	}
	return s
}

var everything = awsiam.Document{Version: "2012-10-17", Statement: []awsiam.Statement{{Effect: "Allow", Action: awsiam.Values{"*"}, Resource: awsiam.Values{"*"}}}}

type generator struct {
	*rand.Rand
	now time.Time
}

func pick[T any](g generator, of ...T) T { return of[g.IntN(len(of))] }

// some of a list, in its order, at least one.
func some[T any](g generator, of ...T) []T {
	all := slices.DeleteFunc(slices.Clone(of), func(T) bool { return g.IntN(3) > 0 })
	if len(all) == 0 {
		return []T{pick(g, of...)}
	}
	return all
}

const (
	alice  = "arn:aws:iam::111122223333:user/alice"
	other  = "arn:aws:iam::999900001111:user/bob"
	worker = "arn:aws:sts::111122223333:assumed-role/PowerUser/alice"
	rescue = "arn:aws:iam::111122223333:user/rescue"
	target = "arn:aws:iam::111122223333:role/Target"
	vpc    = "vpc-0123456789abcdef0"
)

func (g generator) question() (q question, err error) {
	c := awsiam.Caller{Principal: pick(g, alice, worker, rescue), From: pick(g, netip.MustParseAddr("52.94.76.10"), netip.MustParseAddr("52.94.76.11"),
		netip.MustParseAddr("198.51.100.7"), netip.MustParseAddr("2600:1f18::10"), netip.MustParseAddr("2001:db8::7")), Now: g.now,
		ViaService: g.IntN(4) == 0, VPC: pick(g, "", "", "", vpc, "vpc-0badbadbadbadbad0"),
		Set:   map[string][]string{"aws:RequestedRegion": {pick(g, "eu-central-1", "us-east-1")}, "aws:UserAgent": {"aws-cli/2"}},
		Unset: []string{"aws:PrincipalTag/team"}}
	if c.Principal == worker || g.IntN(2) == 0 {
		c.Issued = g.now.Add(-time.Duration(g.IntN(7200)) * time.Second)
	}
	if c.Principal != worker && !c.Issued.IsZero() {
		c.MFA = g.IntN(2) == 0
	}
	if g.IntN(2) == 0 {
		c.Set["aws:PrincipalTag/team"], c.Unset = []string{pick(g, "red", "Red", "blue")}, nil
	}
	if c.ViaService {
		c.Set["aws:CalledVia"] = some(g, "athena.amazonaws.com", "cloudformation.amazonaws.com", "dynamodb.amazonaws.com")
	}
	what := pick(g, [2]string{"s3:GetObject", "arn:aws:s3:::backups/db"}, [2]string{"s3:PutObject", "arn:aws:s3:::home/alice/x"}, [2]string{"s3:ListAllMyBuckets", "*"},
		[2]string{"iam:EnableMFADevice", alice}, [2]string{"iam:CreateAccessKey", rescue}, [2]string{"dynamodb:GetItem", "arn:aws:dynamodb:eu-central-1:111122223333:table/t"},
		[2]string{"ec2:StopInstances", "arn:aws:ec2:eu-central-1:111122223333:instance/i-0123456789abcdef0"}, [2]string{"sts:AssumeRole", target})
	for range 1 + g.IntN(2) {
		f, err := g.file(false)
		if err != nil {
			return q, err
		}
		q.set.Identity = append(q.set.Identity, f)
	}
	if g.IntN(2) == 0 {
		q.set.Identity = append(q.set.Identity, awsiam.File{Name: "all", Document: everything})
	}
	if g.IntN(4) == 0 {
		f, err := g.kind("scp-guard", "scp-no-iam-users")
		if err != nil {
			return q, err
		}
		q.set.SCP = []awsiam.File{f}
	}
	switch {
	case what[0] == "sts:AssumeRole":
		c.Principal = other // in one account a trust that names the user suffices; across two both must allow
		q.set.SCP = nil
		f, err := g.kind("role-trust")
		if err != nil {
			return q, err
		}
		if g.IntN(2) == 0 {
			f = g.made(true)
		}
		q.set.Resource = []awsiam.File{f}
	case what[0] == "s3:GetObject" && c.Principal != worker && g.IntN(2) == 0:
		q.set.Resource = []awsiam.File{g.made(true)}
	case c.Principal == worker && g.IntN(2) == 0:
		f, err := g.file(true)
		if err != nil {
			return q, err
		}
		q.set.Session = []awsiam.File{f}
	}
	if q.request, err = c.Make(what[0], what[1]); err != nil {
		return q, err
	}
	q.ours, err = q.set.Evaluate(q.request)
	return q, err
}

// file is a policy of ours, or a made-up one.
func (g generator) file(session bool) (awsiam.File, error) {
	if g.IntN(2) == 0 {
		return g.made(false), nil
	}
	if session {
		return g.kind("session-pin")
	}
	return g.kind("bastion-user", "role-guard", "mfa", "user-guard", "service-account", "revoke-sessions")
}

func (g generator) kind(kinds ...string) (awsiam.File, error) {
	kind := pick(g, kinds...)
	o := awsiam.Options{Egress: some(g, netip.MustParsePrefix("52.94.76.10/32"), netip.MustParsePrefix("52.94.76.0/24"), netip.MustParsePrefix("2600:1f18::10/128"))}
	if slices.Contains([]string{"role-guard", "user-guard", "scp-guard", "session-pin"}, kind) && g.IntN(2) == 0 {
		o.VPCs = []string{vpc}
	}
	if strings.HasSuffix(kind, "-guard") && g.IntN(2) == 0 {
		o.BreakGlass = []string{map[bool]string{true: target, false: rescue}[kind == "role-guard"]}
	}
	switch kind {
	case "bastion-user":
		o.Roles = []string{target}
	case "role-trust":
		o.Users = []string{pick(g, other, "arn:aws:iam::999900001111:root", rescue)}
	case "service-account":
		o.Actions, o.Resources = some(g, "s3:GetObject", "s3:Put*", "dynamodb:*"), some(g, "arn:aws:s3:::backups/*", "*")
	case "revoke-sessions":
		o.Before = g.now.Add(-time.Duration(g.IntN(7200)) * time.Second)
	}
	p, err := awsiam.Make(kind, o)
	return awsiam.File{Name: kind, Document: p.Document}, err
}

// made is statements that nobody would write, with each operator on keys that take it.
func (g generator) made(principal bool) awsiam.File {
	d := awsiam.Document{Version: "2012-10-17"}
	for range 1 + g.IntN(3) {
		s := awsiam.Statement{Effect: pick(g, "Allow", "Allow", "Deny")}
		actions := some(g, "*", "s3:*", "s3:Get*", "s3:getobject", "iam:Create*", "sts:AssumeRole", "ec2:St?pInstances", "dynamodb:GetItem")
		if g.IntN(4) == 0 {
			s.NotAction = slices.DeleteFunc(slices.Clone(actions), func(a string) bool { return a == "*" })
		}
		if len(s.NotAction) == 0 {
			s.Action, s.NotAction = actions, nil
		}
		if principal {
			s.Principal = awsiam.Principal{"AWS": some(g, "*", alice, other, "999900001111", "arn:aws:iam::111122223333:root")}
			if slices.Contains(s.Principal["AWS"], "*") {
				s.Principal["AWS"] = awsiam.Values{"*"}
			}
		}
		resources := some(g, "*", "arn:aws:s3:::backups/*", "arn:aws:s3:::home/${aws:username}/*", "arn:aws:iam::*:user/alice", "arn:aws:iam::111122223333:role/T*",
			"arn:aws:ec2:*:*:instance/*", "arn:aws:dynamodb:eu-*:111122223333:table/?")
		switch {
		case principal && g.IntN(2) == 0:
			s.Resource = awsiam.Values{"*"}
		case g.IntN(5) == 0:
			// What IAM makes of an unresolved variable in a negation is not documented.
			s.NotResource = slices.DeleteFunc(slices.Clone(resources), func(r string) bool { return r == "*" || strings.Contains(r, "${") })
		}
		if len(s.NotResource) == 0 && s.Resource == nil {
			s.Resource, s.NotResource = resources, nil
		}
		if g.IntN(3) > 0 {
			s.Condition = awsiam.Condition{}
			for range 1 + g.IntN(3) {
				operator, key, values := g.condition()
				s.Condition[operator] = map[string]awsiam.Values{key: values}
			}
		}
		d.Statement = append(d.Statement, s)
	}
	return awsiam.File{Name: "made", Document: d}
}

func (g generator) condition() (operator, key string, values awsiam.Values) {
	texts := pick(g, "aws:PrincipalTag/team", "aws:RequestedRegion", "aws:SourceVpc", "aws:PrincipalAccount", "aws:username", "aws:UserAgent")
	// Not asked, since iam-simulate 0.1.173 answers otherwise than IAM's documentation: a network of /0, and a lone IPv4 address
	// in NotIpAddress under a request by IPv6 (its ipaddress/ipv4.js and ip.js).
	type choice struct {
		operators []string
		key       string
		values    []string
	}
	c := pick(g,
		choice{[]string{"StringEquals", "StringNotEquals", "StringEqualsIgnoreCase", "StringNotEqualsIgnoreCase"}, texts, some(g, "red", "eu-central-1", vpc, "111122223333", "alice", "aws-cli/2", "*")},
		choice{[]string{"StringLike", "StringNotLike"}, texts, some(g, "r*", "?ed", "eu-*-1", "vpc-0bad*", "11112222????", "*")},
		choice{[]string{"IpAddress", "NotIpAddress"}, pick(g, "aws:SourceIp", "aws:SourceIp", "aws:VpcSourceIp"), some(g, "52.94.76.10/32", "52.94.76.0/24", "198.51.100.7/32", "2600:1f18::/32", "198.0.0.0/7")},
		choice{[]string{"Bool"}, pick(g, "aws:ViaAWSService", "aws:MultiFactorAuthPresent", "aws:SecureTransport"), some(g, "true", "false")},
		choice{[]string{"Null"}, pick(g, "aws:SourceIp", "aws:SourceVpc", "aws:MultiFactorAuthPresent", "aws:TokenIssueTime", "aws:PrincipalTag/team"), []string{pick(g, "true", "false")}},
		choice{[]string{"ArnLike", "ArnNotLike", "ArnEquals", "ArnNotEquals"}, "aws:PrincipalArn", some(g, "arn:aws:iam::*:user/*", "arn:aws:iam::111122223333:role/PowerUser", "arn:*:iam::*:user/r*", "arn:aws:iam::*:role/aws-reserved/*")},
		choice{[]string{"NumericLessThan", "NumericLessThanEquals", "NumericGreaterThan", "NumericGreaterThanEquals", "NumericEquals", "NumericNotEquals"}, "aws:MultiFactorAuthAge", []string{pick(g, "0", "3600")}},
		choice{[]string{"DateLessThan", "DateLessThanEquals", "DateGreaterThan", "DateGreaterThanEquals"}, pick(g, "aws:TokenIssueTime", "aws:CurrentTime"), []string{pick(g, "2026-01-31T11:00:00Z", "2026-01-31T12:00:00Z", "2027-01-01T00:00:00Z")}},
		choice{[]string{"ForAnyValue:StringEquals", "ForAllValues:StringEquals", "ForAnyValue:StringLike", "ForAllValues:StringLike", "ForAnyValue:StringNotEquals", "ForAllValues:StringNotEquals"},
			"aws:CalledVia", some(g, "athena.amazonaws.com", "cloudformation.amazonaws.com", "dynamodb.amazonaws.com")},
	)
	operator = pick(g, c.operators...)
	if operator != "Null" && g.IntN(3) == 0 {
		operator += "IfExists"
	}
	return operator, c.key, c.values
}
