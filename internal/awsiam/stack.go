package awsiam

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// StackOptions are of one side of the two-account pattern: users live in the Bastion account, work is done by roles of others.
type StackOptions struct {
	Egress     []netip.Prefix
	Account    string   // the other side's: of the role for "bastion", of the users for "production"
	Role       string   // its name; empty: PowerUser
	Policy     string   // what the role may: the name of an AWS managed policy, or an ARN; empty: PowerUserAccess
	Users      []string // their names
	VPCs       []string
	BreakGlass []string // ARNs of users of the Bastion account, made beforehand
}

// The role of the day when the bastion is dead. It has no guard.
const breakGlassRole = "perimeter-break-glass"

const maxGroupInline = 5120 // characters of a group's inline policies together

// Stack is one account's part, without a syntax.
type Stack struct {
	Name     string
	Warnings []string
	group    []inline // policies of the users' group; none: no group
	users    []string
	keepers  []string // names of break-glass users
	keeper   inline   // their policy
	roles    []stackRole
}

type inline struct {
	name string
	Document
}

type stackRole struct {
	id, name, about, policy string // policy is an ARN
	trust                   Document
	guard                   *inline
}

// MakeStack writes "bastion" or "production".
func MakeStack(name string, o StackOptions) (s Stack, err error) {
	if name != "bastion" && name != "production" {
		return s, fmt.Errorf("stack %q is unknown: there are bastion, production", name)
	}
	if err := o.check(name); err != nil {
		return s, err
	}
	s = Stack{Name: name, users: o.Users}
	policy := func(kind string, p Options) Document {
		if err != nil {
			return Document{}
		}
		made, e := Make(kind, p)
		err = e
		s.Warnings = append(s.Warnings, made.Warnings...)
		return made.Document
	}
	prefix := "arn:aws:iam::" + o.Account + ":"
	if name == "bastion" {
		s.group = []inline{
			{"assume", policy("bastion-user", Options{Egress: o.Egress, Roles: []string{prefix + "role/" + o.Role}})},
			{"mfa", policy("mfa", Options{})},
			{"guard", policy("user-guard", Options{Egress: o.Egress, VPCs: o.VPCs, BreakGlass: o.BreakGlass})},
		}
		s.keeper = inline{"break-glass", Document{Version: version, Statement: []Statement{{Sid: "BreakGlass", Effect: "Allow",
			Action: Values{"sts:AssumeRole"}, Resource: Values{prefix + "role/" + breakGlassRole}}}}}
		for _, arn := range o.BreakGlass {
			_, user, _ := strings.Cut(arn, ":user/")
			s.keepers = append(s.keepers, user[strings.LastIndexByte(user, '/')+1:])
		}
		size := 0
		for _, p := range s.group {
			size += len(p.Line())
		}
		if err == nil && size > maxGroupInline {
			err = fmt.Errorf("the group's policies have %d characters, and AWS takes %d: name fewer addresses and identities", size, maxGroupInline)
		}
	} else {
		var users []string
		for _, u := range o.Users {
			users = append(users, prefix+"user/"+u)
		}
		s.roles = []stackRole{{"Role", o.Role, "What people do their work as, from the bastion only", o.Policy,
			policy("role-trust", Options{Egress: o.Egress, Users: users}), &inline{"perimeter-guard", policy("role-guard", Options{Egress: o.Egress, VPCs: o.VPCs})}}}
		if len(o.BreakGlass) > 0 { // the guard spares nobody: another role has none
			s.Warnings = slices.DeleteFunc(s.Warnings, func(w string) bool { return w == noBreakGlass })
			s.roles = append(s.roles, stackRole{"BreakGlass", breakGlassRole, "For the day the bastion is dead: from anywhere, with MFA", "arn:aws:iam::aws:policy/AdministratorAccess",
				Document{Version: version, Statement: []Statement{{Sid: "BreakGlass", Effect: "Allow", Principal: Principal{"AWS": o.BreakGlass}, Action: Values{"sts:AssumeRole"},
					Condition: Condition{"Bool": {"aws:MultiFactorAuthPresent": {"true"}}}}}}, nil})
		}
	}
	slices.Sort(s.Warnings)
	s.Warnings = slices.Compact(s.Warnings)
	return s, err
}

func (o *StackOptions) check(name string) error {
	if o.Account == "" {
		return fmt.Errorf("stack %s: no account: give the other side's with --account: %s", name,
			map[string]string{"bastion": "the one whose role the users become", "production": "the one that the users live in"}[name])
	}
	if err := CheckAccount(o.Account); err != nil {
		return err
	}
	if o.Role == "" {
		o.Role = "PowerUser"
	}
	if o.Policy == "" {
		o.Policy = "PowerUserAccess"
	}
	if !iamName.MatchString(o.Role) || o.Role == breakGlassRole {
		return fmt.Errorf("role %q: want a role's name, not an ARN, as in PowerUser", o.Role)
	}
	if a, ok := parseARN(o.Policy); ok && a.service == "iam" && strings.HasPrefix(a.resource, "policy/") {
	} else if iamPath.MatchString(o.Policy) {
		o.Policy = "arn:aws:iam::aws:policy/" + o.Policy
	} else {
		return fmt.Errorf("policy %q: want an AWS managed policy's name or a policy's ARN, as in PowerUserAccess", o.Policy)
	}
	if len(o.Users) == 0 {
		return errors.New("no user: name those who become the role with --user NAME")
	}
	for i, u := range o.Users {
		if !iamName.MatchString(u) {
			return fmt.Errorf("user %q: want a user's name, not an ARN, as in alice", u)
		}
		if slices.Contains(o.Users[:i], u) {
			return fmt.Errorf("user %q: named twice", u)
		}
	}
	for _, arn := range o.BreakGlass {
		if err := checkPrincipal("--break-glass", arn, false, "user"); err != nil {
			return err
		}
		_, user, _ := strings.Cut(arn, ":user/")
		if slices.Contains(o.Users, user) {
			return fmt.Errorf("--break-glass %q: %s is one of the users, whose keys lie about: name a user whose keys are in a safe", arn, user)
		}
		if ofOther := strings.Contains(arn, "::"+o.Account+":"); ofOther != (name == "production") {
			return fmt.Errorf("--break-glass %q: not a user of the Bastion account; --account %s is of the other side", arn, o.Account)
		}
	}
	return nil
}
