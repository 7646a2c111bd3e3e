package main

import (
	"errors"
	"io"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"perimeterd/internal/control"
)

func newEventsCommand() *cobra.Command {
	var f filterFlags
	var follow, asJSON bool
	cmd := &cobra.Command{
		Use:   "events",
		Short: "Show what happened last in the running daemon, or what happens",
		Long: `Examples:
  perimeterd events                          the last ones, of 4096 that the daemon remembers
  perimeterd events -f --user alice          from now until Ctrl-C, as they happen
  perimeterd events -f --kind proxy-refused --json | jq -r .destination

What is older, perimeterd audit query has. A reader who is slower than the events is cut off: the daemon waits for nobody.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			filter, err := f.filter(time.Now())
			if err != nil {
				return err
			}
			p, err := findPaths(cmd)
			if err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			if follow && filter.Since.IsZero() {
				filter.Since = time.Now()
			}
			print, _ := recordPrinter(cmd.OutOrStdout(), asJSON, false)
			err = control.NewClient(p.ControlSocket()).Events(ctx, follow, filter, print)
			if err == io.EOF {
				return errors.New("the daemon stopped")
			}
			return err
		},
	}
	f.add(cmd)
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with what happens")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON, one event a line")
	return cmd
}
