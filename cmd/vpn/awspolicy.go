package main

import (
	"net/netip"

	"github.com/spf13/cobra"

	"perimeterd/internal/awsiam"
	"perimeterd/internal/awsiam/awscmd"
	"perimeterd/vpn/client"
)

func awsPolicyCommand(profile *string) *cobra.Command {
	egress := func() ([]netip.Prefix, error) {
		p, err := client.LoadProfile(*profile)
		if err != nil {
			return nil, err
		}
		return awsiam.ParseEgress(p.Egress...)
	}
	return awscmd.Policy("vpn", egress, func(err error) error { return usageError{err} })
}
