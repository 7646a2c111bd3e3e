package main

import "github.com/spf13/cobra"

func awsCommand(profile *string) *cobra.Command {
	c := &cobra.Command{Use: "aws", Short: "AWS policies and sessions that work at the egress only"}
	c.AddCommand(awsPolicyCommand(profile), awsCredentialsCommand(profile), awsConfigureCommand(profile))
	return c
}
