package awsiam

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Request is a call of AWS's API, as policies see it.
type Request struct {
	Action    string // s3:GetObject
	Resource  string // ARN; "*" of an action that has none
	Principal string // ARN of the caller's user, role, role session, account's root, or identity provider; SERVICE.amazonaws.com
	context   map[string][]string
	absent    map[string]bool // keys that the request is known not to have
}

// Caller is who asks, from where.
type Caller struct {
	Principal  string              // as in Request
	From       netip.Addr          // as AWS sees it
	VPC        string              // the request comes through an endpoint of this VPC
	MFA        bool                // the keys are a session's that was made with a code
	Issued     time.Time           // when the session was made; zero: long-lived keys
	ViaService bool                // AWS calls, on the caller's behalf
	Now        time.Time           // the request's time
	Set        map[string][]string // more keys
	Unset      []string            // keys that the request does not have
}

// Keys that only some requests have: docs.aws.amazon.com/IAM/latest/UserGuide/reference_policies_condition-keys.html. A key
// that is neither set nor listed here is not known, and evaluating it is an error.
var sometimes = []string{
	"aws:CalledVia", "aws:CalledViaFirst", "aws:CalledViaLast", "aws:MultiFactorAuthAge", "aws:MultiFactorAuthPresent", "aws:SourceIdentity", "aws:SourceIp",
	"aws:SourceVpc", "aws:SourceVpce", "aws:TokenIssueTime", "aws:VpcSourceIp", "aws:username", "sts:RoleSessionName", "sts:SourceIdentity",
}

// Make is the caller's request of an action.
func (c Caller) Make(action, resource string) (r Request, err error) {
	service, name, ok := strings.Cut(action, ":")
	if !ok || service == "" || name == "" || strings.ContainsAny(action, "*?") {
		return r, fmt.Errorf("action %q: want one, as s3:GetObject", action)
	}
	if resource != "*" && (strings.Count(resource, ":") < 5 || !strings.HasPrefix(resource, "arn:")) {
		return r, fmt.Errorf("resource %q: want an ARN, or * for an action that has none", resource)
	}
	if !c.From.IsValid() {
		return r, errors.New("the request comes from nowhere: give an address")
	}
	r = Request{Action: action, Resource: resource, Principal: c.Principal, context: map[string][]string{}, absent: map[string]bool{}}
	for _, k := range sometimes {
		r.absent[strings.ToLower(k)] = true
	}
	if err := r.identify(c.Principal, c.MFA || !c.Issued.IsZero()); err != nil {
		return r, err
	}
	r.set("aws:CurrentTime", c.Now.UTC().Format(time.RFC3339))
	r.set("aws:EpochTime", strconv.FormatInt(c.Now.Unix(), 10))
	r.set("aws:SecureTransport", "true")
	r.set("aws:ViaAWSService", strconv.FormatBool(c.ViaService))
	if c.VPC != "" {
		r.set("aws:SourceVpc", c.VPC)
		r.set("aws:VpcSourceIp", c.From.Unmap().String())
	} else {
		r.set("aws:SourceIp", c.From.Unmap().String())
	}
	if c.MFA {
		r.set("aws:MultiFactorAuthPresent", "true")
		r.set("aws:MultiFactorAuthAge", "0")
	} else if !c.Issued.IsZero() && strings.Contains(c.Principal, ":user/") {
		r.set("aws:MultiFactorAuthPresent", "false")
	}
	if !c.Issued.IsZero() {
		r.set("aws:TokenIssueTime", c.Issued.UTC().Format(time.RFC3339))
	}
	for _, k := range sorted(c.Set) {
		r.set(k, c.Set[k]...)
	}
	for _, k := range c.Unset {
		delete(r.context, strings.ToLower(k))
		r.absent[strings.ToLower(k)] = true
	}
	return r, nil
}

func (r *Request) set(key string, values ...string) {
	r.context[strings.ToLower(key)] = values
}

// identify sets the keys that follow from the principal's ARN.
func (r *Request) identify(principal string, session bool) error {
	if principal == "" {
		return nil
	}
	if service, ok := strings.CutSuffix(principal, ".amazonaws.com"); ok && service != "" && !strings.ContainsAny(service, "*?:/") {
		return nil
	}
	a, ok := parseARN(principal)
	kind, name, _ := strings.Cut(a.resource, "/")
	if !ok || strings.ContainsAny(principal, "*?") || a.service != "iam" && a.service != "sts" {
		return fmt.Errorf("principal %q: want an ARN as arn:aws:iam::111122223333:user/alice, or SERVICE.amazonaws.com", principal)
	}
	if strings.HasSuffix(kind, "-provider") {
		return nil // who comes with a provider's word has no identity in AWS yet
	}
	if err := CheckAccount(a.account); err != nil {
		return fmt.Errorf("principal %q: %w", principal, err)
	}
	r.set("aws:PrincipalAccount", a.account)
	switch {
	case a.service == "iam" && kind == "user" && name != "":
		r.set("aws:PrincipalArn", principal)
		r.set("aws:PrincipalType", "User")
		r.set("aws:username", name[strings.LastIndexByte(name, '/')+1:])
	case a.service == "iam" && kind == "role" && name != "":
		r.set("aws:PrincipalArn", principal)
		r.set("aws:PrincipalType", "AssumedRole")
	case a.service == "sts" && kind == "assumed-role" && strings.Count(name, "/") == 1:
		role, _, _ := strings.Cut(name, "/")
		r.set("aws:PrincipalArn", "arn:"+a.partition+":iam::"+a.account+":role/"+role)
		r.set("aws:PrincipalType", "AssumedRole")
	case a.service == "iam" && a.resource == "root":
		r.set("aws:PrincipalArn", principal)
		r.set("aws:PrincipalType", "Account")
	default:
		return fmt.Errorf("principal %q: want a user, a role, a role's session, root or an identity provider", principal)
	}
	return nil
}

// value is a key's, none where the request does not have it. An unknown key is an error: it might decide.
func (r Request) value(key string) (values []string, err error) {
	k := strings.ToLower(key)
	if values, ok := r.context[k]; ok {
		return values, nil
	}
	if r.absent[k] {
		return nil, nil
	}
	if slices.Contains([]string{"aws:principalarn", "aws:principalaccount", "aws:principaltype"}, k) {
		return nil, fmt.Errorf("%s is asked for, and the caller is not known: give --principal ARN", key)
	}
	return nil, fmt.Errorf("what %s is in the request is not known: give --set %s=VALUE, or --unset %[1]s where it has none", key, key)
}

// variable is value for ${…}, which takes a single one.
func (r Request) variable(key string) (string, bool, error) {
	values, err := r.value(key)
	if err != nil || len(values) == 0 {
		return "", false, err
	}
	if len(values) > 1 {
		return "", false, fmt.Errorf("${%s} has %d values in the request: a variable takes one", key, len(values))
	}
	return values[0], true, nil
}

// Context is the request's condition keys, in lower case.
func (r Request) Context() map[string][]string { return r.context }
