package main

import (
	"errors"
	"net/netip"

	"github.com/spf13/cobra"

	"perimeterd/internal/awsiam/awscmd"
)

func newAWSCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "aws",
		Short: "AWS's side of the egress address: policies, stacks, and what a policy leaves open",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return usageError{errors.New("aws: policy, stack or test?\nhint: `perimeterd aws --help` shows how it is used")}
		},
	}
	configured := func() ([]netip.Prefix, error) {
		cfg, err := loadConfig(c)
		if err != nil {
			return nil, err
		}
		return cfg.Egress.Public, nil
	}
	c.AddCommand(awscmd.Policy("perimeterd", configured, func(err error) error { return usageError{err} }), newAWSTestCommand(configured), newAWSStackCommand(configured))
	return c
}
