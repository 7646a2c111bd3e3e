package awsiam

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Becoming a role under a source identity, as `vpn aws credentials` does with the certificate's name, takes both actions, of
// the user and of the role's trust.
var assume = Values{"sts:AssumeRole", "sts:SetSourceIdentity"}

func bastionUser(o Options) ([]Statement, error) {
	if len(o.Roles) == 0 {
		return nil, errors.New("bastion-user names no role: give those that its users may become with --role ARN")
	}
	for _, s := range o.Roles {
		if err := checkPrincipal("--role", s, false, "role"); err != nil {
			return nil, err
		}
	}
	return []Statement{{Sid: "AllowSTS", Effect: "Allow", Action: assume, Resource: o.Roles, Condition: o.from()}}, nil
}

func roleTrust(o Options) (all []Statement, err error) {
	if len(o.Users) > 0 {
		for _, s := range o.Users {
			if err := checkPrincipal("--user", s, false, "user", "root"); err != nil {
				return nil, err
			}
		}
		c := o.from()
		c["Bool"] = map[string]Values{"aws:MultiFactorAuthPresent": {"true"}}
		all = append(all, Statement{Sid: "UsersWithMFA", Effect: "Allow", Principal: Principal{"AWS": o.Users}, Action: assume, Condition: c})
	}
	if o.SAML != "" {
		if err := checkPrincipal("--saml", o.SAML, false, "saml-provider"); err != nil {
			return nil, err
		}
		c := o.from()
		c["StringEquals"] = map[string]Values{"SAML:aud": {samlAudience(o.SAML)}}
		all = append(all, Statement{Sid: "SAML", Effect: "Allow", Principal: Principal{"Federated": {o.SAML}},
			Action: Values{"sts:AssumeRoleWithSAML", "sts:SetSourceIdentity"}, Condition: c})
	}
	if o.OIDC == "" && (o.Audience != "" || o.Subject != "") {
		return nil, errors.New("--audience and --subject are of an OpenID Connect provider: name it with --oidc ARN")
	}
	if o.OIDC != "" {
		s, err := trustTokens(o)
		if err != nil {
			return nil, err
		}
		all = append(all, s)
	}
	if len(all) == 0 {
		return nil, errors.New("role-trust names nobody: give whom the role trusts with --user ARN, --saml ARN or --oidc ARN")
	}
	return all, nil
}

// samlAudience is where a SAML answer is posted to: docs.aws.amazon.com/IAM/latest/UserGuide/id_roles_create_for-idp_saml.html.
func samlAudience(provider string) string {
	a, _ := parseARN(provider)
	switch a.partition {
	case "aws-us-gov":
		return "https://signin.amazonaws-us-gov.com/saml"
	case "aws-cn":
		return "https://signin.amazonaws.cn/saml"
	}
	return "https://signin.aws.amazon.com/saml"
}

// trustTokens wants audience and subject: providers that many share, such as GitHub's, sign tokens for strangers too.
func trustTokens(o Options) (Statement, error) {
	if err := checkPrincipal("--oidc", o.OIDC, false, "oidc-provider"); err != nil {
		return Statement{}, err
	}
	if o.Audience == "" || strings.ContainsAny(o.Audience, "*?") {
		return Statement{}, fmt.Errorf("--audience %q: want whom the provider's tokens are for, whole, as in sts.amazonaws.com", o.Audience)
	}
	if strings.Trim(o.Subject, "*?:/") == "" {
		return Statement{}, fmt.Errorf("--subject %q: want whom the provider's tokens are of, as in repo:example/infra:ref:refs/heads/main: without it every customer of the provider gets in", o.Subject)
	}
	a, _ := parseARN(o.OIDC)
	host := strings.TrimPrefix(a.resource, "oidc-provider/")
	c := o.from()
	c["StringEquals"] = map[string]Values{host + ":aud": {o.Audience}}
	if strings.ContainsAny(o.Subject, "*?") {
		c["StringLike"] = map[string]Values{host + ":sub": {o.Subject}}
	} else {
		c["StringEquals"][host+":sub"] = Values{o.Subject}
	}
	return Statement{Sid: "OpenIDConnect", Effect: "Allow", Principal: Principal{"Federated": {o.OIDC}}, Action: Values{"sts:AssumeRoleWithWebIdentity"}, Condition: c}, nil
}

// mfa follows docs.aws.amazon.com/IAM/latest/UserGuide/reference_policies_examples_aws_my-sec-creds-self-manage-mfa-only.html.
func mfa(Options) ([]Statement, error) {
	own := Values{"iam:EnableMFADevice", "iam:GetMFADevice", "iam:GetUser", "iam:ListMFADevices", "iam:ResyncMFADevice"}
	enrol := Values{"iam:CreateVirtualMFADevice", "iam:ListVirtualMFADevices"}
	return []Statement{
		{Sid: "AllowOwnMFA", Effect: "Allow", Action: own, Resource: Values{"arn:aws:iam::*:user/${aws:username}"}},
		{Sid: "AllowNewDevice", Effect: "Allow", Action: enrol, Resource: Values{"*"}},
		{Sid: "DenyWithoutMFA", Effect: "Deny", NotAction: slices.Concat(own, enrol, Values{"sts:GetSessionToken"}), Resource: Values{"*"},
			Condition: Condition{"BoolIfExists": {"aws:MultiFactorAuthPresent": {"false"}}}},
	}, nil
}

// serviceAccount denies what it does not allow as well, so that another Allow gives the keys nothing more.
func serviceAccount(o Options) ([]Statement, error) {
	if len(o.Actions) == 0 || len(o.Resources) == 0 {
		return nil, errors.New("service-account allows nothing: give what the program does with --action SERVICE:ACTION, and on what with --resource ARN")
	}
	for _, a := range o.Actions {
		if !actionName.MatchString(a) {
			return nil, fmt.Errorf("--action %q: want SERVICE:ACTION, as in s3:PutObject", a)
		}
	}
	for _, r := range o.Resources {
		if _, ok := parseARN(r); !ok && r != "*" {
			return nil, fmt.Errorf("--resource %q: want an ARN, as in arn:aws:s3:::backups/*", r)
		}
	}
	return []Statement{
		{Sid: "AllowService", Effect: "Allow", Action: o.Actions, Resource: o.Resources, Condition: o.from()},
		{Sid: "DenyOtherActions", Effect: "Deny", NotAction: o.Actions, Resource: Values{"*"}},
		{Sid: "DenyElsewhere", Effect: "Deny", Action: Values{"*"}, Resource: Values{"*"}, Condition: o.elsewhere()},
	}, nil
}

// revokeSessions is the text that the console's own button attaches: docs.aws.amazon.com/IAM/latest/UserGuide/id_roles_use_revoke-sessions.html.
func revokeSessions(o Options) ([]Statement, error) {
	if o.Before.IsZero() {
		return nil, errors.New("revoke-sessions has no time: give it with --before, as in 2026-01-31T12:00:00Z")
	}
	return []Statement{{Sid: "RevokeSessions", Effect: "Deny", Action: Values{"*"}, Resource: Values{"*"},
		Condition: Condition{"DateLessThan": {"aws:TokenIssueTime": {o.Before.UTC().Format(time.RFC3339)}}}}}, nil
}
