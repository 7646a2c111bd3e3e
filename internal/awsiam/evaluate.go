package awsiam

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// File is a policy and where it was read.
type File struct {
	Name string
	Document
}

// Set is the policies that apply to a request, in layers. A layer without a policy allows everything; in the others something
// must allow, and a Deny in any is final.
type Set struct {
	Identity []File // of the user or role
	Resource []File // of the role that is to be assumed (its trust), or of the resource
	Session  []File // given to AssumeRole
	SCP      []File // of the account. Where none of them allows, AWS's FullAWSAccess is taken to be beside them
}

// Decision is what AWS would answer.
type Decision struct {
	Allow bool
	By    string // file and statement; empty: none decided
	Text  string // why, for a person
}

// Evaluate follows docs.aws.amazon.com/IAM/latest/UserGuide/reference_policies_evaluation-logic.html. What it does not know is an
// error, also where another statement would have decided.
func (s Set) Evaluate(r Request) (Decision, error) {
	layers := []struct {
		name  string
		files []File
	}{{"service control policy", s.SCP}, {"resource or trust policy", s.Resource}, {"policy of the user or role", s.Identity}, {"session policy", s.Session}}
	denied, allowed, itself := "", map[string]string{}, false
	for _, l := range layers {
		for _, f := range l.files {
			for i, st := range f.Statement {
				by := f.Name + ", statement " + label(i, st.Sid)
				applies, err := st.applies(f.Version, r)
				switch {
				case err != nil:
					return Decision{}, fmt.Errorf("%s: %w", by, err)
				case applies && st.Effect == "Deny" && denied == "":
					denied = by
				case applies && st.Effect == "Allow":
					allowed[l.name] = cmp.Or(allowed[l.name], by)
					itself = itself || st.Principal.itself(r)
				}
			}
		}
	}
	switch {
	case strings.EqualFold(r.Action, "sts:GetCallerIdentity"):
		return Decision{true, "", "AWS answers it to everybody, whatever policies say, so it tests nothing: choose another action"}, nil
	case denied != "":
		return Decision{false, denied, "an explicit Deny is final"}, nil
	}
	// Every user may ask for a session of their own, unless a Deny says otherwise.
	if strings.EqualFold(r.Action, "sts:GetSessionToken") {
		return Decision{true, "", "it needs no Allow"}, nil
	}
	// In one account a resource's policy that names the caller suffices, or the caller's own; one that names the account leaves it
	// to the caller's. Across accounts, and for a role's trust, both must allow. An ARN without an account is taken for the caller's.
	if r.acrossAccounts() || strings.HasPrefix(strings.ToLower(r.Action), "sts:assumerole") {
		itself = false
	} else if len(s.Identity) > 0 && allowed[layers[2].name] != "" && len(s.Resource) > 0 {
		allowed[layers[1].name] = cmp.Or(allowed[layers[1].name], allowed[layers[2].name])
	}
	if itself && len(s.Identity) > 0 {
		allowed[layers[2].name] = cmp.Or(allowed[layers[2].name], allowed[layers[1].name])
	}
	d := Decision{true, "", "no policy was given"}
	for _, l := range layers {
		by := allowed[l.name]
		switch {
		case len(l.files) == 0:
			continue
		case l.name == "service control policy" && !slices.ContainsFunc(l.files, File.allows):
			continue
		case by == "":
			return Decision{false, "", "no " + l.name + " allows it"}, nil
		}
		d = Decision{true, by, "it allows, and nothing denies"}
	}
	return d, nil
}

// allows says whether a statement of the file allows anything.
func (f File) allows() bool {
	return slices.ContainsFunc(f.Statement, func(s Statement) bool { return s.Effect == "Allow" })
}

// applies says whether all of a statement's elements hold. Each is asked, so that one which is not understood is never passed over.
func (s Statement) applies(version string, r Request) (bool, error) {
	lookup := r.variable
	if version != "2012-10-17" {
		lookup = nil
	}
	var actions Values // names of actions differ in more than case
	for _, a := range slices.Concat(s.Action, s.NotAction) {
		actions = append(actions, strings.ToLower(a))
	}
	action, err := anyMatch(actions, nil, func(p pattern) bool { return p.matches(strings.ToLower(r.Action)) }, s.NotAction != nil)
	if err != nil {
		return false, err
	}
	resource := true
	if list := slices.Concat(s.Resource, s.NotResource); len(list) > 0 {
		if resource, err = anyMatch(list, lookup, r.on, s.NotResource != nil); err != nil {
			return false, err
		}
		resource = resource != (s.NotResource != nil)
	}
	principal, err := s.principal(r)
	if err != nil {
		return false, err
	}
	condition, err := s.Condition.holds(lookup, r)
	return action != (s.NotAction != nil) && resource && principal && condition, err
}

// on says whether the pattern covers the request's resource. An action without one is covered by * only.
func (r Request) on(p pattern) bool {
	return p.all() || r.Resource != "*" && p.matchesARN(r.Resource)
}

func anyMatch(list Values, lookup func(string) (string, bool, error), matches func(pattern) bool, negated bool) (found bool, err error) {
	for _, v := range list {
		p, err := compile(v, true, lookup)
		if errors.Is(err, errNoValue) && !negated {
			continue
		}
		if err != nil {
			return false, err
		}
		found = found || matches(p)
	}
	return found, nil
}

// principal says whether a statement is about the caller; one of an identity's policy is about whoever has it.
func (s Statement) principal(r Request) (bool, error) {
	if s.Principal == nil && s.NotPrincipal == nil {
		return true, nil
	}
	if r.Principal == "" {
		return false, fmt.Errorf("it names a principal, and the caller is not known: give --principal ARN")
	}
	if s.NotPrincipal != nil {
		return !s.NotPrincipal.names(r), nil
	}
	return s.Principal.names(r), nil
}

func (p Principal) names(r Request) bool {
	a, ok := parseARN(r.Principal)
	kind := "AWS"
	if !ok {
		kind = "Service"
	} else if strings.HasPrefix(a.resource, "saml-provider/") || strings.HasPrefix(a.resource, "oidc-provider/") {
		kind = "Federated"
	}
	identities := []string{"*", r.Principal}
	if kind == "AWS" {
		identities = append(identities, a.account, "arn:"+a.partition+":iam::"+a.account+":root")
		identities = append(identities, r.context["aws:principalarn"]...)
	}
	return slices.ContainsFunc(p[kind], func(name string) bool { return slices.Contains(identities, name) }) ||
		slices.Contains(p["AWS"], "*")
}

// itself says whether the caller is named, and not only the account.
func (p Principal) itself(r Request) bool {
	return slices.ContainsFunc(slices.Concat([]string{"*", r.Principal}, r.context["aws:principalarn"]), func(s string) bool {
		return slices.Contains(p["AWS"], s) && !strings.HasSuffix(s, ":root")
	})
}

// acrossAccounts says whether the caller's account and the resource's are known to differ.
func (r Request) acrossAccounts() bool {
	caller, ok := parseARN(r.Principal)
	resource, there := parseARN(r.Resource)
	return ok && there && resource.account != "" && resource.account != caller.account
}

func (c Condition) holds(lookup func(string) (string, bool, error), r Request) (bool, error) {
	all := true
	for _, operator := range sorted(c) {
		op, err := parseOperator(operator)
		if err != nil {
			return false, err
		}
		for _, key := range sorted(c[operator]) {
			got, err := r.value(key)
			if err != nil {
				return false, err
			}
			ok, err := op.holds(c[operator][key], got, lookup)
			if err != nil {
				return false, fmt.Errorf("%s %s: %w", operator, key, err)
			}
			all = all && ok
		}
	}
	return all, nil
}

// holds compares the request's values, none where it does not have the key, with the policy's.
func (o operator) holds(want Values, got []string, lookup func(string) (string, bool, error)) (bool, error) {
	if o.name == "Null" {
		absent := slices.ContainsFunc(want, func(w string) bool { return strings.EqualFold(w, fmt.Sprint(len(got) == 0)) })
		return absent, nil
	}
	if len(got) > 1 && o.set == "" {
		return false, fmt.Errorf("the request has %d values, and it takes one: write ForAllValues: or ForAnyValue: before it", len(got))
	}
	var patterns []pattern
	var texts []string
	for _, w := range want {
		p, err := compile(w, o.wildcards(), lookup)
		if errors.Is(err, errNoValue) && !o.negated {
			continue
		}
		if err != nil {
			return false, err
		}
		patterns, texts = append(patterns, p), append(texts, p.String())
	}
	matched := 0 // of the request's values
	for _, g := range got {
		found := false
		for i, p := range patterns {
			ok, err := comparisons[o.name].compare(p, texts[i], g)
			if err != nil {
				return false, err
			}
			found = found || ok
		}
		if found != o.negated {
			matched++
		}
	}
	switch {
	case o.set == "ForAnyValue":
		return matched > 0, nil // of an absent key too, with IfExists or without: repost.aws/questions/QU9HFmDzP0QGuU-fd7rS6B7w
	case len(got) == 0:
		return o.ifExists || o.set == "ForAllValues" || o.negated, nil
	}
	return matched == len(got), nil
}
