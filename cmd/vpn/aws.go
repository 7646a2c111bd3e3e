package main

import (
	"errors"

	"github.com/spf13/cobra"
)

func awsCommand(profile *string) *cobra.Command {
	c := &cobra.Command{
		Use:   "aws",
		Short: "AWS policies and sessions that work at the egress only",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return usageError{errors.New("aws: policy, credentials or configure?\nhint: `vpn aws --help` shows how it is used")}
		},
	}
	c.AddCommand(awsPolicyCommand(profile), awsCredentialsCommand(profile), awsConfigureCommand(profile))
	return c
}
