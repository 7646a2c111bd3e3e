// Package awscmd is what perimeterd and vpn have in common on a command line: `aws policy`. The author of a policy need not be
// on the bastion.
package awscmd

import (
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"perimeterd/internal/awsiam"
)

// Policy is the command. egress is asked for the address where --egress is not given, usage marks an error as the caller's.
func Policy(program string, egress func() ([]netip.Prefix, error), usage func(error) error) *cobra.Command {
	var o awsiam.Options
	var addresses []string
	var before string
	quiet := false
	c := &cobra.Command{
		Use:   "policy KIND",
		Short: "Print an IAM policy that works with the bastion's egress address only",
		Long: strings.ReplaceAll(`Examples:
  PROGRAM aws policy bastion-user --role arn:aws:iam::111122223333:role/PowerUser
  PROGRAM aws policy role-trust --user arn:aws:iam::999900001111:user/alice > trust.json
  PROGRAM aws policy role-guard --break-glass arn:aws:iam::111122223333:role/BreakGlass > guard.json
  aws iam put-role-policy --role-name PowerUser --policy-name perimeter-guard --policy-document file://guard.json
  PROGRAM aws policy revoke-sessions --before 2026-01-31T12:00:00Z

The policy goes to stdout; what it protects, what it does not, and warnings go to stderr (--quiet: warnings only).

Kinds:
`, "PROGRAM", program) + awsiam.Kinds().String(),
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return fmt.Errorf("aws policy wants one kind: %s", strings.Join(awsiam.Kinds().Names(), ", "))
			}
			return nil
		},
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return awsiam.Kinds().Names(), cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(c *cobra.Command, args []string) (err error) {
			if before != "" {
				if o.Before, err = time.Parse(time.RFC3339, before); err != nil {
					return usage(fmt.Errorf("--before %q: want a time as in 2026-01-31T12:00:00Z", before))
				}
			} else if args[0] == "revoke-sessions" {
				o.Before = time.Now()
			}
			if o.Egress, err = Egress(args[0], addresses, egress); err != nil {
				return usage(err)
			}
			p, err := awsiam.Make(args[0], o)
			if err != nil {
				return usage(err)
			}
			about := p.Warn()
			if !quiet {
				about = p.Explain() + about
			}
			if _, err := io.WriteString(c.ErrOrStderr(), about); err != nil {
				return err
			}
			_, err = io.WriteString(c.OutOrStdout(), p.Text())
			return err
		},
	}
	f := c.Flags()
	f.StringSliceVar(&addresses, "egress", nil, "what AWS sees of the bastion, a `CIDR` (default: as it is configured)")
	f.StringArrayVar(&o.BreakGlass, "break-glass", nil, "`ARN` of an identity that the guard spares, for the day the bastion is dead")
	f.StringSliceVar(&o.VPCs, "vpc", nil, "`ID` of a VPC whose endpoints are a way in too")
	f.StringArrayVar(&o.Roles, "role", nil, "`ARN` of a role: whom users may become; in scp-guard, a role of people")
	f.StringArrayVar(&o.Users, "user", nil, "`ARN` of a user that the role trusts, or of its account's root: everybody there who may")
	f.StringVar(&o.SAML, "saml", "", "`ARN` of a SAML provider that the role trusts")
	f.StringVar(&o.OIDC, "oidc", "", "`ARN` of an OpenID Connect provider that the role trusts")
	f.StringVar(&o.Audience, "audience", "", "`NAME` that the provider's tokens are for, as in sts.amazonaws.com")
	f.StringVar(&o.Subject, "subject", "", "`NAME` that the provider's tokens are of, as in repo:example/infra:ref:refs/heads/main")
	f.StringSliceVar(&o.Actions, "action", nil, "what a service's account does, `SERVICE:ACTION`")
	f.StringArrayVar(&o.Resources, "resource", nil, "`ARN` of what a service's account does it to")
	f.StringVar(&before, "before", "", "sessions issued before this `TIME` are revoked (default: now)")
	f.BoolVar(&quiet, "quiet", false, "on stderr, warnings only")
	return c
}

// Egress is the addresses that a policy names: those given, else those of configured, which is not asked where kind names none.
func Egress(kind string, given []string, configured func() ([]netip.Prefix, error)) ([]netip.Prefix, error) {
	nameless := kind != "" && !awsiam.Kinds().NeedEgress(kind)
	switch {
	case nameless && len(given) > 0 && slices.Contains(awsiam.Kinds().Names(), kind):
		return nil, fmt.Errorf("--egress: %s names no address: leave it off", kind)
	case len(given) > 0:
		return awsiam.ParseEgress(given...)
	case nameless:
		return nil, nil
	}
	egress, err := configured()
	if err != nil {
		return nil, fmt.Errorf("%w\nhint: --egress CIDR gives the address here", err)
	}
	return egress, nil
}
