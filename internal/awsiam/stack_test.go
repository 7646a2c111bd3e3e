package awsiam

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclparse"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/zclconf/go-cty/cty"
)

func stacks(t *testing.T) map[string]Stack {
	t.Helper()
	all := map[string]Stack{}
	for name, account := range map[string]string{"bastion": "111122223333", "production": "999900001111"} {
		s, err := MakeStack(name, StackOptions{Egress: home, Account: account, Users: []string{"alice", "bob.x+Q@example"}, BreakGlass: []string{rescue}, VPCs: []string{"vpc-0123456789abcdef0"}})
		if err != nil {
			t.Fatal(err)
		}
		all[name] = s
	}
	return all
}

// What docs.aws.amazon.com/AWSCloudFormation/latest/TemplateReference says of the types: property → required.
var cfTypes = map[string]map[string]bool{
	"AWS::IAM::Group":         {"GroupName": false, "ManagedPolicyArns": false, "Path": false, "Policies": false},
	"AWS::IAM::User":          {"UserName": false, "Groups": false, "LoginProfile": false, "ManagedPolicyArns": false, "Path": false, "PermissionsBoundary": false, "Policies": false, "Tags": false},
	"AWS::IAM::ManagedPolicy": {"PolicyDocument": true, "Description": false, "Groups": false, "ManagedPolicyName": false, "Path": false, "Roles": false, "Users": false},
	"AWS::IAM::Role": {"AssumeRolePolicyDocument": true, "Description": false, "ManagedPolicyArns": false, "MaxSessionDuration": false, "Path": false,
		"PermissionsBoundary": false, "Policies": false, "RoleName": false, "Tags": false},
}

func TestCloudFormationTemplates(t *testing.T) {
	for name, s := range stacks(t) {
		var template struct {
			AWSTemplateFormatVersion, Description string
			Resources                             map[string]struct {
				Type       string
				Properties map[string]any
			}
			Outputs map[string]struct {
				Description string
				Value       any
			}
		}
		d := json.NewDecoder(strings.NewReader(s.CloudFormation()))
		d.DisallowUnknownFields()
		if err := d.Decode(&template); err != nil {
			t.Fatal(err)
		}
		if template.AWSTemplateFormatVersion != "2010-09-09" {
			t.Errorf("%s: format %q", name, template.AWSTemplateFormatVersion)
		}
		documents := 0
		var walk func(where string, v any)
		walk = func(where string, v any) {
			switch v := v.(type) {
			case []any:
				for i, v := range v {
					walk(fmt.Sprintf("%s[%d]", where, i), v)
				}
			case map[string]any:
				for key, v := range v {
					switch {
					case key == "PolicyDocument" || key == "AssumeRolePolicyDocument":
						text, err := json.Marshal(v)
						if err != nil {
							t.Fatal(err)
						}
						if _, err := Parse(text); err != nil {
							t.Errorf("%s.%s: %v", where, key, err)
						}
						documents++
						continue // ${aws:username} in it is IAM's
					case key == "Ref":
						if _, ok := template.Resources[v.(string)]; !ok {
							t.Errorf("%s: Ref of %v", where, v)
						}
					case key == "Fn::GetAtt":
						pair := v.([]any)
						if r := template.Resources[pair[0].(string)]; r.Type != "AWS::IAM::Role" || pair[1] != "Arn" {
							t.Errorf("%s: GetAtt of %v", where, pair)
						}
					case strings.HasPrefix(key, "Fn::"):
						t.Errorf("%s: unforeseen %s", where, key)
					}
					walk(where+"."+key, v)
				}
			case string:
				if strings.Contains(v, "${") {
					t.Errorf("%s: %q wants Fn::Sub", where, v)
				}
			}
		}
		for id, r := range template.Resources {
			properties, known := cfTypes[r.Type]
			if !known || notLogicalID(id) {
				t.Errorf("%s: resource %q of type %q", name, id, r.Type)
			}
			for p := range r.Properties {
				if _, ok := properties[p]; !ok {
					t.Errorf("%s: %s has no %s", id, r.Type, p)
				}
			}
			for p, required := range properties {
				if _, ok := r.Properties[p]; required && !ok {
					t.Errorf("%s: %s wants %s", id, r.Type, p)
				}
			}
			walk(id, r.Properties)
		}
		for id, o := range template.Outputs {
			walk("Outputs."+id, o.Value)
		}
		if documents != 4-map[string]int{"production": 1}[name] {
			t.Errorf("%s: %d policies", name, documents)
		}
	}
}

func notLogicalID(s string) bool {
	return s == "" || strings.Trim(s, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789") != ""
}

func TestIdentifiersDiffer(t *testing.T) {
	seen := map[string]string{}
	for _, n := range []string{"a.b", "a-b", "aQ2eb", "aQb", "ab", "a@b", "a+b", "a_b", "a,b", "a=b"} {
		id := identifier(n)
		if seen[id] != "" || notLogicalID(id) {
			t.Errorf("%q and %q: %q", n, seen[id], id)
		}
		seen[id] = n
	}
}

// The parser is Terraform's own. What its provider wants is from registry.terraform.io/providers/hashicorp/aws/latest/docs.
func TestTerraformFiles(t *testing.T) {
	wants := map[string][]string{
		"aws_iam_group": {"name"}, "aws_iam_user": {"for_each", "name"}, "aws_iam_user_group_membership": {"for_each", "groups", "user"},
		"aws_iam_group_policy": {"group", "name", "policy"}, "aws_iam_user_policy": {"for_each", "name", "policy", "user"},
		"aws_iam_role": {"assume_role_policy", "description", "name"}, "aws_iam_role_policy": {"name", "policy", "role"},
		"aws_iam_role_policy_attachment": {"policy_arn", "role"},
	}
	for name, s := range stacks(t) {
		file, diags := hclparse.NewParser().ParseHCL([]byte(s.Terraform()), name+".tf")
		if diags.HasErrors() {
			t.Fatal(diags)
		}
		body := file.Body.(*hclsyntax.Body)
		known, used := map[string]bool{}, map[string]bool{}
		var documents []string
		for _, block := range body.Blocks {
			if block.Type == "resource" {
				id := strings.Join(block.Labels, ".")
				if known[id] {
					t.Errorf("%s: %s stands twice", name, id)
				}
				known[id] = true
				var has []string
				for a := range block.Body.Attributes {
					if a != "depends_on" {
						has = append(has, a)
					}
				}
				slices.Sort(has)
				if want := wants[block.Labels[0]]; !slices.Equal(has, want) {
					t.Errorf("%s: %s has %v, want %v", name, id, has, want)
				}
			}
			for a, attribute := range block.Body.Attributes {
				for _, v := range attribute.Expr.Variables() {
					if root := v.RootName(); root != "each" {
						used[root+"."+v[1].(hcl.TraverseAttr).Name] = true
					}
				}
				if a == "policy" || a == "assume_role_policy" {
					v, diags := attribute.Expr.Value(nil)
					if diags.HasErrors() || v.Type() != cty.String {
						t.Fatal(diags)
					}
					documents = append(documents, v.AsString())
				}
			}
		}
		for id := range used {
			if !known[id] {
				t.Errorf("%s: %s is used and not there", name, id)
			}
		}
		// What Terraform makes of the text is the policy that was meant.
		var meant []string
		for _, p := range s.group {
			meant = append(meant, p.Text())
		}
		if len(s.keepers) > 0 {
			meant = append(meant, s.keeper.Text())
		}
		for _, r := range s.roles {
			meant = append(meant, r.trust.Text())
			if r.guard != nil {
				meant = append(meant, r.guard.Text())
			}
		}
		slices.Sort(meant)
		slices.Sort(documents)
		if !slices.Equal(meant, documents) {
			t.Errorf("%s: %q\nwant %q", name, documents, meant)
		}
	}
}

// Both accounts' parts together, as AWS would judge them.
func TestTheTwoAccountsWorkTogether(t *testing.T) {
	all := stacks(t)
	var group, onRole, keeper []File
	for _, p := range all["bastion"].group {
		group = append(group, File{p.name, p.Document})
	}
	keeper = []File{{"break-glass", all["bastion"].keeper.Document}}
	work, rescued := all["production"].roles[0], all["production"].roles[1]
	onRole = []File{parse(t, allowAll), {"guard", work.guard.Document}}
	trust, rescueTrust := []File{{"trust", work.trust}}, []File{{"trust", rescued.trust}}
	rescueRole := "arn:aws:iam::111122223333:role/" + rescued.name
	for _, c := range []struct {
		name             string
		set              Set
		caller           Caller
		action, resource string
		want             bool
	}{
		{"alice enrols", Set{Identity: group}, Caller{Principal: alice, From: atHome}, "iam:EnableMFADevice", alice, true},
		{"not from elsewhere", Set{Identity: group}, Caller{Principal: alice, From: stolen}, "iam:EnableMFADevice", alice, false},
		{"alice asks for a session", Set{Identity: group}, Caller{Principal: alice, From: atHome}, "sts:GetSessionToken", "*", true},
		{"a stolen key does not", Set{Identity: group}, Caller{Principal: alice, From: stolen}, "sts:GetSessionToken", "*", false},
		{"alice becomes the role", Set{Identity: group, Resource: trust}, Caller{Principal: alice, From: atHome, MFA: true, Issued: session}, "sts:AssumeRole", role, true},
		{"not without MFA", Set{Identity: group, Resource: trust}, Caller{Principal: alice, From: atHome}, "sts:AssumeRole", role, false},
		{"not from elsewhere", Set{Identity: group, Resource: trust}, Caller{Principal: alice, From: stolen, MFA: true, Issued: session}, "sts:AssumeRole", role, false},
		{"not another role", Set{Identity: group}, Caller{Principal: alice, From: atHome, MFA: true, Issued: session}, "sts:AssumeRole", rescueRole, false},
		{"the role works", Set{Identity: onRole}, Caller{Principal: role, From: atHome, Issued: session}, "ec2:RunInstances", "*", true},
		{"its stolen session does not", Set{Identity: onRole}, Caller{Principal: role, From: stolen, Issued: session}, "ec2:RunInstances", "*", false},
		{"the bastion is dead", Set{Identity: keeper, Resource: rescueTrust}, Caller{Principal: rescue, From: stolen, MFA: true, Issued: session}, "sts:AssumeRole", rescueRole, true},
		{"and the safe was broken open, but not the MFA device", Set{Identity: keeper, Resource: rescueTrust}, Caller{Principal: rescue, From: stolen}, "sts:AssumeRole", rescueRole, false},
		{"nobody else becomes the break-glass role", Set{Resource: rescueTrust}, Caller{Principal: alice, From: atHome, MFA: true, Issued: session}, "sts:AssumeRole", rescueRole, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := decide(t, c.set, c.caller, c.action, c.resource); got != c.want {
				t.Errorf("allowed: %v", got)
			}
		})
	}
}

func TestBadStacksAreNamedWithTheWayOut(t *testing.T) {
	good := func() StackOptions {
		return StackOptions{Egress: home, Account: "999900001111", Users: []string{"alice"}, BreakGlass: []string{rescue}}
	}
	for want, change := range map[string]func(*StackOptions){
		"no account: give the other side's with --account": func(o *StackOptions) { o.Account = "" },
		`account "9999": want its 12 digits`:               func(o *StackOptions) { o.Account = "9999" },
		`no user: name those`:                              func(o *StackOptions) { o.Users = nil },
		`user "a/b": want a user's name`:                   func(o *StackOptions) { o.Users = []string{"a/b"} },
		`user "alice": named twice`:                        func(o *StackOptions) { o.Users = []string{"alice", "alice"} },
		`role "` + role + `": want a role's name`:          func(o *StackOptions) { o.Role = role },
		`policy "a b": want an AWS managed policy's name`:  func(o *StackOptions) { o.Policy = "a b" },
		`no egress address`:                                func(o *StackOptions) { o.Egress = nil },
		`whose keys lie about`:                             func(o *StackOptions) { o.BreakGlass = []string{alice} },
		`not a user of the Bastion account`:                func(o *StackOptions) { o.BreakGlass = []string{"arn:aws:iam::111122223333:user/x"} },
		`is not a user`:                                    func(o *StackOptions) { o.BreakGlass = []string{role} },
		`VPC "x"`:                                          func(o *StackOptions) { o.VPCs = []string{"x"} },
	} {
		o := good()
		change(&o)
		if _, err := MakeStack("production", o); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	if _, err := MakeStack("stage", good()); err == nil || !strings.Contains(err.Error(), `stack "stage" is unknown: there are bastion, production`) {
		t.Error(err)
	}
	if s, err := MakeStack("production", func() StackOptions { o := good(); o.BreakGlass = nil; return o }()); err != nil || len(s.Warnings) != 1 || len(s.roles) != 1 {
		t.Errorf("no break-glass is said, once, and makes no role: %v %v", s.Warnings, err)
	}
}
