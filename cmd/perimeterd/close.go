package main

import (
	"errors"
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"perimeterd/configs"
	"perimeterd/firewall"
	"perimeterd/internal/control"
	"perimeterd/internal/identity"
)

// newCloseCommand is for the unit that closes the door before the network is up, and again after nftables.service loaded
// rules of its own. Unlike apply it changes nothing where a daemon runs, which keeps the table itself.
func newCloseCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "close",
		Short:  "Make the nftables table before the daemon runs: for perimeterd-early.service",
		Hidden: true,
		Args:   noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := loadConfig(cmd)
			if err != nil {
				return err
			}
			if _, err := control.NewClient(cfg.ControlSocket()).Status(cmd.Context()); !errors.Is(err, control.ErrNotRunning) {
				return err
			}
			good := func(cfg *configs.Config, meta *identity.Meta) (*configs.Config, error) {
				return lastGood(cfg, meta, slog.New(slog.NewTextHandler(os.Stderr, nil)))
			}
			err = withGoodTable(cfg, good, makeTable)
			if errors.Is(err, identity.ErrStateHeld) {
				return nil // a daemon that is just starting: the table is the first thing it makes
			}
			return err
		},
	}
}

// makeTable makes the table where no daemon runs. Of a new one nobody knows which tokens were spent, and the daemon that finds
// it must not think that it does.
func makeTable(table firewall.Config, meta *identity.Meta) error {
	door := firewall.New(slog.New(slog.DiscardHandler), 0)
	there, err := door.Exists()
	if err != nil {
		return err
	}
	if !there { // first: a crash between the two closes steps, never opens one twice
		if err := firewall.CloseSteps(meta); err != nil {
			return err
		}
	}
	fresh, err := door.Apply(table)
	if err == nil && fresh && there { // another tool's, of our name
		err = firewall.CloseSteps(meta)
	}
	return err
}
