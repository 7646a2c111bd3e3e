package main

import (
	"fmt"
	"io"
	"net/netip"

	"github.com/spf13/cobra"

	"perimeterd/internal/awsiam"
	"perimeterd/internal/awsiam/awscmd"
)

func newAWSStackCommand(configured func() ([]netip.Prefix, error)) *cobra.Command {
	var o awsiam.StackOptions
	var egress []string
	terraform := false
	cmd := &cobra.Command{
		Use:   "stack bastion|production",
		Short: "Print one account's part of the two-account pattern, for CloudFormation or Terraform",
		Long: `Examples:
  perimeterd aws stack bastion --account 111122223333 --user alice --user bob > bastion.json
  perimeterd aws stack production --account 999900001111 --user alice --user bob > production.json
  perimeterd aws stack production --account 999900001111 --user alice --break-glass arn:aws:iam::999900001111:user/rescue --terraform

bastion:     a group of users who enrol MFA, ask for sessions and become the role; from the egress only.
production:  the role, whom it trusts, and its guard; with --break-glass a second role without a guard, which that user becomes with
             MFA on the day the bastion is dead.

The bastion's part goes first: a role cannot trust a user who does not exist, and the break-glass user is made by hand before both.
In each, --account is the other account. The template goes to stdout, warnings and the next command to stderr.`,
		Args:      oneArgument("stack", "bastion"),
		ValidArgs: []string{"bastion", "production"},
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if o.Egress, err = awscmd.Egress("", egress, configured); err != nil {
				return usageError{err}
			}
			s, err := awsiam.MakeStack(args[0], o)
			if err != nil {
				return usageError{err}
			}
			for _, w := range s.Warnings {
				fmt.Fprintf(cmd.ErrOrStderr(), "warning: %s\n", w)
			}
			text, next := s.CloudFormation(), "aws cloudformation create-stack --stack-name perimeter-"+s.Name+" --template-body file://FILE --capabilities CAPABILITY_NAMED_IAM"
			if terraform {
				text, next = s.Terraform(), "terraform init && terraform plan"
			}
			fmt.Fprintf(cmd.ErrOrStderr(), "next, with an administrator's session of the %s account: %s\n", s.Name, next)
			_, err = io.WriteString(cmd.OutOrStdout(), text)
			return err
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Account, "account", "", "the other side's `NUMBER`: the role's account for bastion, the users' for production")
	f.StringVar(&o.Role, "role", "PowerUser", "the role's `NAME`")
	f.StringVar(&o.Policy, "policy", "PowerUserAccess", "what the role may: the `NAME|ARN` of a managed policy")
	f.StringSliceVar(&o.Users, "user", nil, "a user's `NAME`")
	f.StringSliceVar(&o.VPCs, "vpc", nil, "`ID` of a VPC whose endpoints are a way in too")
	f.StringArrayVar(&o.BreakGlass, "break-glass", nil, "`ARN` of a user of the Bastion account who may work without a guard")
	f.StringSliceVar(&egress, "egress", nil, "what AWS sees of the bastion, a `CIDR` (default: as it is configured)")
	f.BoolVar(&terraform, "terraform", false, "print HCL for Terraform instead")
	return cmd
}
