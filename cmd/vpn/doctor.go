package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"perimeterd/internal/awscred"
	"perimeterd/vpn/client"
)

func doctorCommand(load func() (*client.Profile, error)) *cobra.Command {
	asJSON, timeout, echo := false, 90*time.Second, client.EchoURL
	c := &cobra.Command{
		Use: "doctor [HOST[:PORT]]...", Short: "Find out what is wrong between here and the cloud, and what to do about it",
		Long: "Looks at each step of the way: the state directory, network and name, knock, gate, clock, certificate, session, UDP, tunnel,\n" +
			"proxy, egress address, and the shell's proxy variables; and at each HOST through the proxy, port 443 if none is given.\n" +
			"The tunnel is left as it is. Where it is down, a session of its own is tried and ended, if the certificate has no other.\n" +
			"Where no knock is answered, tokens of earlier times find out whether the clock is fast; none of times to come is sent.\n\n" +
			"Exit status: 0 all is well (there may be warnings), 1 something is not, 2 the command line is wrong.",
		Example: "  vpn doctor\n  vpn doctor s3.us-east-1.amazonaws.com     why is this one not reached?",
		RunE: func(_ *cobra.Command, args []string) error {
			destinations, err := destinations(args)
			if err != nil {
				return err
			}
			p, err := load()
			if err != nil {
				return err
			}
			ctx, stop := interrupted()
			defer stop()
			ctx, cancel := context.WithTimeout(ctx, timeout)
			defer cancel()
			d := client.Doctor{Profile: p, Now: time.Now, Environ: os.Environ(), Echo: echo, Destinations: destinations}
			if !asJSON {
				d.Found = func(f client.Finding) { fmt.Println(f) }
			}
			report := d.Examine(ctx)
			if err := ctx.Err(); err != nil {
				return fmt.Errorf("not finished: %w", err)
			}
			for _, t := range awscred.Check(os.Environ()) {
				f := client.Finding{Status: client.Warning, Step: "aws", Code: t.Code, Text: t.Text, Fix: t.Fix}
				if report.Findings = append(report.Findings, f); !asJSON {
					fmt.Println(f)
				}
			}
			if asJSON {
				out := json.NewEncoder(os.Stdout)
				out.SetIndent("", "  ")
				if err := out.Encode(report); err != nil {
					return err
				}
			}
			if !report.Healthy {
				return exitStatus(exitFailed)
			}
			return nil
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	c.Flags().DurationVar(&timeout, "timeout", timeout, "give up after so long")
	c.Flags().StringVar(&echo, "echo", echo, "`URL` that answers with the address it sees")
	return c
}

// destinations gives each HOST[:PORT] its port.
func destinations(args []string) ([]string, error) {
	var all []string
	for _, a := range args {
		host, port, err := net.SplitHostPort(a)
		if err != nil {
			host, port = strings.Trim(a, "[]"), "443"
		}
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 || host == "" || strings.ContainsAny(host, " \t\r\n/@?#[]") {
			return nil, usageError{fmt.Errorf("%q: want HOST or HOST:PORT, as in s3.us-east-1.amazonaws.com or 198.51.100.7:8443", a)}
		}
		all = append(all, net.JoinHostPort(host, port))
	}
	return all, nil
}
