package awsiam

import (
	"fmt"
	"regexp"
	"strings"
)

var (
	accountID  = regexp.MustCompile(`^[0-9]{12}$`)
	partition  = regexp.MustCompile(`^aws(-[a-z]+)*$`)
	vpcID      = regexp.MustCompile(`^vpc-([0-9a-f]{8}|[0-9a-f]{17})$`)
	iamName    = regexp.MustCompile(`^[\w+=,.@-]{1,64}$`)
	iamPath    = regexp.MustCompile(`^([\x21-\x29\x2b-\x3e\x40-\x7e]+/)*[\w+=,.@-]{1,64}$`) // a path, without * and ?
	anyPath    = regexp.MustCompile(`^[\w+=,.@/*-]+$`)
	actionName = regexp.MustCompile(`^[a-zA-Z0-9-]+:[a-zA-Z0-9*?]+$`)
)

// Identity Center makes its roles below this path, which nobody else may use; their names end in random digits.
const identityCenter = "role/aws-reserved/sso.amazonaws.com/"

// arn is the six parts of an Amazon Resource Name.
type arn struct{ partition, service, region, account, resource string }

func parseARN(s string) (a arn, ok bool) {
	f := strings.SplitN(s, ":", 6)
	if len(f) != 6 || f[0] != "arn" {
		return a, false
	}
	return arn{f[1], f[2], f[3], f[4], f[5]}, true
}

// checkPrincipal wants the ARN of a person's or program's identity in IAM: one of kinds, such as "user" or "role"; "root" is
// the account itself. Without anyAccount it is one account's.
func checkPrincipal(what, s string, anyAccount bool, kinds ...string) error {
	want := map[string]string{
		"user": "arn:aws:iam::111122223333:user/alice", "role": "arn:aws:iam::111122223333:role/PowerUser", "root": "arn:aws:iam::111122223333:root",
		"saml-provider": "arn:aws:iam::111122223333:saml-provider/NAME", "oidc-provider": "arn:aws:iam::111122223333:oidc-provider/HOST",
	}
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%s %q: %s: want one as %s", what, s, fmt.Sprintf(format, args...), want[kinds[0]])
	}
	a, ok := parseARN(s)
	switch {
	case !ok:
		return bad("not an ARN")
	case a.service == "sts":
		return bad("a session, and the next has another ARN")
	case a.service != "iam" || a.region != "" || !partition.MatchString(a.partition) && !(anyAccount && a.partition == "*"):
		return bad("not an identity in IAM")
	case !accountID.MatchString(a.account) && !(anyAccount && a.account == "*"):
		return bad("account %q is not 12 digits", a.account)
	}
	kind, name, _ := strings.Cut(a.resource, "/")
	for _, k := range kinds {
		if kind != k {
			continue
		}
		reserved := strings.HasPrefix(a.resource, identityCenter) && anyPath.MatchString(name) && !strings.HasSuffix(a.resource, "/*")
		if k == "root" && a.resource == "root" || k != "root" && iamPath.MatchString(name) || k == "role" && reserved {
			return nil
		}
		if strings.ContainsAny(name, "*?") {
			return bad("a wildcard, which whoever may create a matching identity can slip through")
		}
		return bad("%q is no name", name)
	}
	return bad("%q is not a %s", a.resource, strings.Join(kinds, " or "))
}

// CheckAccount wants an AWS account's number.
func CheckAccount(s string) error {
	if !accountID.MatchString(s) {
		return fmt.Errorf("account %q: want its 12 digits, as in 111122223333: `aws sts get-caller-identity` shows them", s)
	}
	return nil
}

func checkVPCs(ids []string) error {
	for _, id := range ids {
		if !vpcID.MatchString(id) {
			return fmt.Errorf("VPC %q: want its id, as in vpc-0123456789abcdef0: `aws ec2 describe-vpcs` shows it", id)
		}
	}
	return nil
}
