package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"perimeterd/vpn/client"
)

func renewCommand(profile *string) *cobra.Command {
	timeout := defaultTimeout
	c := &cobra.Command{
		Use: "renew", Short: "Get the next certificate, for a new key", Args: noArguments,
		Long: "A tunnel that is up renews its certificate by itself, when less than a third of its time is left. This does it now, with the\n" +
			"tunnel up or down. The session goes on. The new key is made here and never leaves this machine; the profile's file is\n" +
			"replaced, and the old certificate opens nothing any more once the new one was used.",
		RunE: func(*cobra.Command, []string) error {
			p, err := client.LoadProfile(*profile)
			if err != nil {
				return err
			}
			ctx, stop := interrupted()
			defer stop()
			ctx, cancel := context.WithTimeout(ctx, timeout+5*time.Second)
			defer cancel()
			err = client.AskRenew(ctx, p, timeout)
			if errors.Is(err, client.ErrDown) {
				err = renew(ctx, p)
			}
			if err != nil {
				return err
			}
			if p, err = client.LoadProfile(*profile); err != nil {
				return err
			}
			fmt.Printf("certificate renewed; it is valid until %s\n", p.Expires().Local().Format("2006-01-02 15:04"))
			return nil
		},
	}
	c.Flags().DurationVar(&timeout, "timeout", timeout, "give up after so long")
	return c
}

func renew(ctx context.Context, p *client.Profile) error {
	tokens, err := client.NewTokens(p)
	if err != nil {
		return err
	}
	_, err = client.Renew(ctx, p, tokens)
	return err
}
