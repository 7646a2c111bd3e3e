package awsiam

import (
	"bytes"
	"encoding/json"
	"fmt"
	"regexp"
)

type cfTemplate struct {
	AWSTemplateFormatVersion string
	Description              string
	Resources                map[string]cfResource
	Outputs                  map[string]cfOutput `json:",omitempty"`
}

type cfResource struct {
	Type       string
	Properties map[string]any
}

type cfOutput struct {
	Description string
	Value       any
}

type cfPolicy struct {
	PolicyName     string
	PolicyDocument Document
}

// CloudFormation is the stack as a template, in JSON. It wants CAPABILITY_NAMED_IAM.
func (s Stack) CloudFormation() string {
	ref := func(id string) map[string]string { return map[string]string{"Ref": id} }
	t := cfTemplate{"2010-09-09", "perimeterd: the " + s.Name + " account's part of a bastion's egress", map[string]cfResource{}, map[string]cfOutput{}}
	if len(s.group) > 0 {
		var policies []cfPolicy
		for _, p := range s.group {
			policies = append(policies, cfPolicy{p.name, p.Document})
		}
		t.Resources["Group"] = cfResource{"AWS::IAM::Group", map[string]any{"Policies": policies}}
		for _, u := range s.users {
			t.Resources["User"+identifier(u)] = cfResource{"AWS::IAM::User", map[string]any{"UserName": u, "Groups": []any{ref("Group")}}}
		}
		t.Outputs["Group"] = cfOutput{"The group of users", ref("Group")}
	}
	if len(s.keepers) > 0 {
		t.Resources["BreakGlass"] = cfResource{"AWS::IAM::ManagedPolicy", map[string]any{"PolicyDocument": s.keeper.Document, "Users": s.keepers}}
	}
	for _, r := range s.roles {
		properties := map[string]any{"RoleName": r.name, "Description": r.about, "AssumeRolePolicyDocument": r.trust, "ManagedPolicyArns": []string{r.policy}}
		if r.guard != nil {
			properties["Policies"] = []cfPolicy{{r.guard.name, r.guard.Document}}
		}
		t.Resources[r.id] = cfResource{"AWS::IAM::Role", properties}
		t.Outputs[r.id+"Arn"] = cfOutput{r.about, map[string]any{"Fn::GetAtt": []string{r.id, "Arn"}}}
	}
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(t); err != nil {
		panic(err) // texts, lists and maps
	}
	return b.String()
}

var notIdentifier = regexp.MustCompile(`[^A-PR-Za-z0-9]`)

// identifier makes a name of IAM's one of letters and digits, and different names different: what is neither becomes Q and its
// hexadecimal code, and so does Q.
func identifier(name string) string {
	return notIdentifier.ReplaceAllStringFunc(name, func(s string) string { return fmt.Sprintf("Q%02x", s[0]) })
}
