package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/diff"
	"github.com/spf13/cobra"

	"perimeterd/configs"
	"perimeterd/firewall"
	"perimeterd/internal/control"
	"perimeterd/internal/identity"
)

func newApplyCommand() *cobra.Command {
	var trial time.Duration
	cmd := &cobra.Command{
		Use:   "apply",
		Short: "Take up the configuration file; with --confirm only on trial",
		Long: `Examples:
  perimeterd diff                       what would change in the nftables table
  perimeterd apply
  perimeterd apply --confirm 60s        for a minute; then, if the door still lets you in:
  perimeterd confirm

All or nothing: a file with an error changes nothing. Connections, windows and sessions stay as far as the new configuration
allows them. On trial the kernel itself goes back to the last good rules when the time is over, also where the daemon was
killed meanwhile, and a daemon that starts before the trial was confirmed takes the last good configuration. What was not
confirmed is not taken up by a restart until the file changes.

With the daemon stopped it makes the nftables table, which is closed to all who do not knock, and nothing else.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if cmd.Flags().Changed("confirm") && (trial < minTrial || trial > maxTrial) {
				return usageError{fmt.Errorf("--confirm %v: want from %v to %v", trial, minTrial, maxTrial)}
			}
			cfg, err := loadConfig(cmd)
			if err != nil {
				return err
			}
			a, err := control.NewClient(cfg.ControlSocket()).Apply(cmd.Context(), trial)
			switch {
			case errors.Is(err, control.ErrNotRunning) && trial > 0:
				return fmt.Errorf("%w; only a running daemon knows the configuration to go back to", err)
			case errors.Is(err, control.ErrNotRunning):
				return applyStopped(cmd.OutOrStdout(), cfg)
			case err != nil:
				return err
			case a.Until.IsZero():
				fmt.Fprintf(cmd.OutOrStdout(), "%s rules now.\n", a.File)
			default:
				fmt.Fprintf(cmd.OutOrStdout(), "%s is on trial until %s. Does the door let you in? Then `perimeterd confirm` keeps it.\nOtherwise the last good configuration comes back by itself.\n", a.File, clock(a.Until))
			}
			return nil
		},
	}
	cmd.Flags().DurationVar(&trial, "confirm", 0, "go back after so long, as in 60s, unless it is confirmed")
	return cmd
}

// applyStopped makes the table without a daemon. Nobody gets in by it: what a sequence opens has nothing behind it.
func applyStopped(out io.Writer, cfg *configs.Config) error {
	return withTable(cfg, func(table firewall.Config, meta *identity.Meta) error {
		if err := makeTable(table, meta); err != nil {
			return err
		}
		fmt.Fprintf(out, "table inet %s is as %s says; the daemon is not running.\n", firewall.TableName, cfg.File)
		return meta.SetUnconfirmed(nil) // somebody said so
	})
}

// withTable completes the table's configuration from the state file, which no daemon holds.
func withTable(cfg *configs.Config, fn func(firewall.Config, *identity.Meta) error) error {
	return withGoodTable(cfg, func(cfg *configs.Config, _ *identity.Meta) (*configs.Config, error) { return cfg, nil }, fn)
}

// withGoodTable is withTable for the configuration that choose makes of cfg.
func withGoodTable(cfg *configs.Config, choose func(*configs.Config, *identity.Meta) (*configs.Config, error), fn func(firewall.Config, *identity.Meta) error) error {
	db, err := identity.OpenState(cfg.StateFile())
	if err != nil {
		return err
	}
	defer db.Close()
	gid, err := groupOfDaemon()
	if err != nil {
		return err
	}
	meta := identity.NewMeta(db)
	if cfg, err = choose(cfg, meta); err != nil {
		return err
	}
	table, err := tableConfig(cfg, &credentials{users: identity.NewUsers(db), meta: meta}, gid, slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	return fn(table, meta)
}

func newConfirmCommand() *cobra.Command {
	return decideCommand("confirm", "Keep the configuration that is on trial", func(c *control.Client, ctx context.Context) (string, error) {
		a, err := c.Confirm(ctx)
		return fmt.Sprintf("The trial that would have ended at %s is confirmed: %s rules from now on, as it was when it was applied.",
			a.Until.Local().Format(time.TimeOnly), a.File), err
	})
}

func newRollbackCommand() *cobra.Command {
	return decideCommand("rollback", "Go back to the last good configuration before a trial is over", func(c *control.Client, ctx context.Context) (string, error) {
		a, err := c.Rollback(ctx)
		return "The last good configuration rules again. " + a.File + " is as you left it.", err
	})
}

func decideCommand(use, short string, do func(*control.Client, context.Context) (string, error)) *cobra.Command {
	return &cobra.Command{
		Use: use, Short: short, Args: noArguments,
		Long: "Examples:\n  perimeterd apply --confirm 60s\n  perimeterd " + use,
		RunE: func(cmd *cobra.Command, _ []string) error {
			p, err := findPaths(cmd)
			if err != nil {
				return err
			}
			said, err := do(control.NewClient(p.ControlSocket()), cmd.Context())
			if err != nil {
				return err
			}
			fmt.Fprintln(cmd.OutOrStdout(), said)
			return nil
		},
	}
}

func newDiffCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "diff",
		Short: "Show what apply would change in the nftables table, in nft's own words",
		Long: `Examples:
  perimeterd diff

Each line is an nft command: - would go, + would come. Windows, tokens and sessions stay and are not shown. The rest of the
configuration, as proxy rules, is not in it. It takes root. Nothing is printed where nothing would change.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := loadConfig(cmd)
			if err != nil {
				return err
			}
			show := func(table firewall.Config) error { return printDiff(cmd.Context(), cmd.OutOrStdout(), table) }
			table, err := control.NewClient(cfg.ControlSocket()).Table(cmd.Context())
			switch {
			case errors.Is(err, control.ErrNotRunning):
				return withTable(cfg, func(table firewall.Config, _ *identity.Meta) error { return show(table) })
			case err != nil:
				return err
			}
			return show(table)
		},
	}
}

func printDiff(ctx context.Context, out io.Writer, table firewall.Config) error {
	is, err := firewall.Script(ctx)
	if err != nil {
		return err
	}
	planned, err := firewall.PlannedScript(ctx, table)
	if err != nil {
		return err
	}
	text := func(commands []string) []byte { return []byte(strings.Join(commands, "\n") + "\n") }
	for line := range strings.Lines(string(diff.Diff("is", text(is), "planned", text(planned)))) {
		if strings.HasPrefix(line, "-add ") || strings.HasPrefix(line, "+add ") {
			fmt.Fprint(out, line[:1]+" "+line[1:])
		}
	}
	return nil
}
