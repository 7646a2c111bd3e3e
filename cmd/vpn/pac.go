package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"

	"perimeterd/vpn/client"
)

func pacCommand(load func() (*client.Profile, error)) *cobra.Command {
	url := false
	c := &cobra.Command{
		Use: "pac", Short: "Print the proxy configuration for a browser", Args: noArguments,
		Long: "Prints the PAC file that the bastion makes of its policy for you: what you are allowed goes to the proxy, all else goes direct.\n" +
			"A browser that is given its URL asks by itself, whenever the tunnel is up.",
		Example: "  vpn pac --url                   what to write into the browser's settings\n" +
			"  chromium --proxy-pac-url=\"$(vpn pac --url)\"",
		RunE: func(*cobra.Command, []string) error {
			p, err := load()
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			s, err := client.AskStatus(ctx, p)
			if err != nil {
				return err
			}
			if !s.Console.IsValid() {
				return client.ErrDown
			}
			if url {
				fmt.Println(client.PACURL(s))
				return nil
			}
			body, err := client.FetchPAC(ctx, s)
			if err == nil {
				_, err = os.Stdout.Write(body)
			}
			return err
		},
	}
	c.Flags().BoolVar(&url, "url", false, "print where it is instead")
	return c
}
