package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"perimeterd/internal/control"
	"perimeterd/internal/identity"
)

// users is what the commands need: the running daemon, or the state file where none runs.
type users interface {
	AddUser(context.Context, identity.Enrolment) (identity.User, error)
	ListUsers(context.Context) ([]identity.User, error)
	RevokeUser(ctx context.Context, name, device string) (identity.User, error)
	TakeUpAuthority(ctx context.Context, act string) error
	SetUser(ctx context.Context, name string, c identity.Change) (control.Changed, error)
}

var (
	_ users = (*control.Client)(nil)
	_ users = (*control.Operations)(nil)
)

func newUserCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "user",
		Short: "Add, show, change and revoke users",
		Long: `Examples:
  perimeterd user add alice --group operators --device mac
  perimeterd user list
  perimeterd user revoke alice

They work with the daemon running or stopped.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return usageError{errors.New("user: add, list, show, set, profile or revoke?\nhint: `perimeterd user --help` shows how it is used")}
		},
	}
	cmd.AddCommand(newUserAddCommand(), newUserListCommand(), newUserShowCommand(), newUserSetCommand(), newUserProfileCommand(), newUserRevokeCommand())
	return cmd
}

func newUserAddCommand() *cobra.Command {
	var o addOptions
	var valid string
	cmd := &cobra.Command{
		Use:   "add NAME",
		Short: "Enter a user, or another device of one, and write his profile",
		Long: `Examples:
  perimeterd user add alice                                writes alice.profile
  perimeterd user add alice --device desk --out desk.profile
  perimeterd user add bob --group operators --group db --valid 30d
  perimeterd user add bot --passphrase-file /run/secrets/bot
  perimeterd user add alice --request alice.csr            for a key that ` + "`vpn enroll`" + ` made on her laptop, and that stays there

The profile holds the user's key, certificate and knock secret. On a terminal a passphrase is asked for, which protects
the whole file (age, scrypt); elsewhere --passphrase-file names a file with it in its first line, or there is none.
A revoked user who is added again gets a new knock secret, and none of his old certificates back.

Where the CA is another's (identity.ca_key is empty) it enters the name and the groups, and writes no profile.`,
		Args: oneArgument("NAME", "alice"),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			o.name = args[0]
			c, err := o.read(cmd, valid)
			if err != nil {
				return err
			}
			return o.run(cmd, c)
		},
	}
	o.flags(cmd, &valid)
	cmd.Flags().StringArrayVar(&o.groups, "group", nil, "`GROUP` of the user; may be repeated")
	return cmd
}

func newUserListCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List users and their devices",
		Long: `Examples:
  perimeterd user list
  perimeterd user list --json | jq -r '.[] | select(.revoked == null) | .name'`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			p, err := findPaths(cmd)
			if err != nil {
				return err
			}
			return readUsers(cmd.Context(), p, func(us users) error {
				all, err := us.ListUsers(cmd.Context())
				if err != nil {
					return err
				}
				now := time.Now()
				if _, err := insideNow(cmd.Context(), us, all, now); err != nil {
					return err
				}
				if asJSON {
					return printJSON(cmd.OutOrStdout(), all)
				}
				return printUsers(cmd.OutOrStdout(), all, now)
			})
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func printUsers(out io.Writer, all []identity.User, now time.Time) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "USER\tDEVICE\tGROUPS\tUNTIL\tLAST SEEN\tSTATE")
	for _, u := range all {
		groups := strings.Join(u.Groups, ",")
		if groups == "" {
			groups = "-"
		}
		if len(u.Devices) == 0 { // certificates of an external CA are not known here
			state := "active"
			if !u.Active() {
				state = "revoked " + u.Revoked.Local().Format(time.DateOnly)
			}
			fmt.Fprintf(w, "%s\t-\t%s\t-\t-\t%s\n", u.Name, groups, state)
		}
		for _, d := range u.Devices {
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", u.Name, d.Name, groups, d.NotAfter.Local().Format(time.DateOnly), seenText(d, now), deviceState(d, now))
		}
	}
	return w.Flush()
}

func newUserRevokeCommand() *cobra.Command {
	var device string
	cmd := &cobra.Command{
		Use:   "revoke NAME",
		Short: "End a user's right to come in, and his sessions",
		Long: `Examples:
  perimeterd user revoke alice                 all of alice's devices
  perimeterd user revoke alice --device mac    that one only

It acts at once, on live sessions too, and for good: added again, a user gets new certificates.`,
		Args: oneArgument("NAME", "alice"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if device == "" && cmd.Flags().Changed("device") {
				return usageError{errors.New(`--device "": name one, or leave the flag off to revoke the user`)}
			}
			p, err := findPaths(cmd)
			if err != nil {
				return err
			}
			return withUsers(cmd.Context(), p, func(us users) error {
				if _, err := us.RevokeUser(cmd.Context(), args[0], device); err != nil {
					return err
				}
				forget(cmd, us, args[0], device)
				who := args[0]
				if device != "" {
					who += "'s device " + device
				}
				fmt.Fprintf(cmd.OutOrStdout(), "%s is revoked. No session of it is left.\n", who)
				return nil
			})
		},
	}
	cmd.Flags().StringVar(&device, "device", "", "revoke this device `NAME` only")
	return cmd
}

func printJSON(out io.Writer, v any) error {
	e := json.NewEncoder(out)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// stderrf is for what a person should see and a pipe should not.
func stderrf(format string, a ...any) { fmt.Fprintf(os.Stderr, format+"\n", a...) }
