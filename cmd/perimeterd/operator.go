package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"perimeterd/internal/control"
	"perimeterd/internal/identity"
	"perimeterd/internal/session"
	"perimeterd/internal/statefile"
	"perimeterd/proxy"
)

// places are where the daemon answers and where the state lies: configs.Paths, or a whole *configs.Config.
type places interface {
	ControlSocket() string
	StateFile() string // empty: not known
	AuditDir() string
}

// withUsers runs fn on the running daemon, or on the state file where none runs.
func withUsers(ctx context.Context, p places, fn func(users) error) error {
	return withState(ctx, p, func(daemon *control.Client) error { return fn(daemon) }, func(path string) error {
		db, err := identity.OpenState(path)
		if err != nil {
			return err
		}
		// Sessions persist, so revoking must end them here too, or the daemon would take them up again at its start.
		sessions, err := session.OpenBolt(db, time.Now())
		if err == nil {
			err = fn(audited{dir: p.AuditDir(), users: &control.Operations{Users: identity.NewUsers(db), Sessions: sessions, Now: time.Now, Log: slog.New(slog.DiscardHandler)}})
		}
		return errors.Join(err, db.Close())
	})
}

// withState runs one of the two: on the running daemon, or on the path of the state file where none runs. The file's lock is
// the truth: who holds it writes, so the two never write both. The daemon is asked first, since a held lock shows only after
// a second.
func withState(ctx context.Context, p places, running func(*control.Client) error, stopped func(path string) error) error {
	daemon := control.NewClient(p.ControlSocket())
	_, err := daemon.Status(ctx)
	if err == nil {
		return running(daemon)
	}
	if !errors.Is(err, control.ErrNotRunning) {
		return err
	}
	if p.StateFile() == "" {
		return fmt.Errorf("%w; without it the state file is needed: correct state_dir in the configuration", err)
	}
	err = stopped(p.StateFile())
	if errors.Is(err, identity.ErrStateHeld) {
		// It began after it was asked, or it is just ending.
		if _, e := daemon.Status(ctx); e == nil {
			return running(daemon)
		}
		return fmt.Errorf("%w; %s gives no answer: is it starting or stopping? Try again", err, p.ControlSocket())
	}
	return err
}

// readUsers is withUsers for an fn that only lists them: the state file is only read.
func readUsers(ctx context.Context, p places, fn func(users) error) error {
	return withState(ctx, p, func(daemon *control.Client) error { return fn(daemon) }, func(path string) error {
		db, err := identity.ReadState(path)
		if errors.Is(err, fs.ErrNotExist) {
			return fn(nobody{}) // the first user makes it
		}
		if err != nil {
			return err
		}
		defer db.Close()
		return fn(&control.Operations{Users: identity.NewUsers(db)})
	})
}

type nobody struct{ users }

func (nobody) ListUsers(context.Context) ([]identity.User, error) { return []identity.User{}, nil }

// copyState is the state file as it is now, and whether a daemon has it; check says that the copy is not kept. Errors:
// fs.ErrNotExist, where there is none.
func copyState(ctx context.Context, p places, check bool) (data []byte, held bool, err error) {
	err = withState(ctx, p, func(daemon *control.Client) error {
		held = true
		data, err = daemon.Backup(ctx, check)
		return err
	}, func(path string) error {
		f, err := statefile.Hold(path, false)
		if err != nil {
			return err
		}
		defer f.Close()
		data, err = io.ReadAll(f)
		return err
	})
	return data, held, err
}

func newStatusCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show how the running daemon is",
		Long: `Examples:
  perimeterd status
  perimeterd status --json`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			p, err := findPaths(cmd)
			if err != nil {
				return err
			}
			s, err := control.NewClient(p.ControlSocket()).Status(cmd.Context())
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), s)
			}
			w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
			fmt.Fprintf(w, "version\t%s\nrunning for\t%v\nendpoint\t%s\negress\t%v\n",
				s.Version, time.Since(s.Started).Round(time.Second), s.Endpoint, s.Egress)
			fmt.Fprintf(w, "users\t%d\nsessions\t%d of %d\nopen windows\t%d\n", s.Users, s.Sessions, s.Limit, s.Windows)
			for _, p := range s.Problems {
				fmt.Fprintf(w, "problem\t%s\n", p)
			}
			for _, o := range s.Observed {
				fmt.Fprintf(w, "would refuse\t%s\n", observation(o))
			}
			return w.Flush()
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// observation says what proxy.mode = "observe" has let through.
func observation(o proxy.Observation) string {
	users := strings.Join(o.Users, ", ")
	if o.Destination == "" {
		return fmt.Sprintf("others, %d requests, of %s", o.Requests, users)
	}
	return fmt.Sprintf("%s, %d requests, of %s: %s", o.Destination, o.Requests, users, o.Reason)
}

func newSessionsCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "sessions",
		Short: "List who is inside",
		Long: `Examples:
  perimeterd sessions
  perimeterd sessions --json | jq -r '.[].user'`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			p, err := findPaths(cmd)
			if err != nil {
				return err
			}
			all, err := control.NewClient(p.ControlSocket()).Sessions(cmd.Context())
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), all)
			}
			w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
			fmt.Fprintln(w, "ID\tUSER\tDEVICE\tADDRESS\tFROM\tENDS IN\tPOST-QUANTUM")
			for _, s := range all {
				pq := "no"
				if s.PostQuantum {
					pq = "yes"
				}
				fmt.Fprintf(w, "%v\t%s\t%s\t%v\t%v\t%v\t%s\n",
					s.ID, s.User, s.Device, s.Address, s.Outer, time.Until(s.Expires).Round(time.Second), pq)
			}
			return w.Flush()
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func newKickCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "kick NAME|ID",
		Short: "End a session, or all sessions of a user; he may come again",
		Long: `Examples:
  perimeterd kick alice
  perimeterd kick 5f3a...    an id from perimeterd sessions

To keep somebody out, revoke him.`,
		Args: oneArgument("NAME or ID", "alice"),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := findPaths(cmd)
			if err != nil {
				return err
			}
			daemon := control.NewClient(p.ControlSocket())
			all, err := daemon.Sessions(cmd.Context())
			if err != nil {
				return err
			}
			ended := 0
			for _, s := range all {
				if s.User != args[0] && s.ID.String() != args[0] {
					continue
				}
				if err := daemon.Kick(cmd.Context(), s.ID); err != nil {
					return fmt.Errorf("session %v of %s: %w", s.ID, s.User, err)
				}
				fmt.Fprintf(cmd.OutOrStdout(), "session %v of %s ended\n", s.ID, s.User)
				ended++
			}
			if ended == 0 {
				return fmt.Errorf("%q is neither a user who is inside nor the id of a session: `perimeterd sessions` lists them", args[0])
			}
			return nil
		},
	}
}
