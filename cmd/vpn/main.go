// Command vpn brings up the tunnel to a bastion and runs programs through it.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"perimeterd/internal/cmdline"
	"perimeterd/vpn/client"
)

// Exit statuses. exec passes its command's on; 125 to 127 are as in env(1).
const (
	exitFailed = 1
	exitUsage  = 2
)

func main() { os.Exit(run(os.Args[1:])) }

func run(args []string) int {
	root := command()
	understood := false
	root.PersistentPreRun = func(*cobra.Command, []string) { understood = true }
	root.SetArgs(args)
	err := client.BecomeInvoker()
	if err == nil {
		var c *cobra.Command
		if c, err = root.ExecuteC(); err != nil && !understood {
			err = usageError{fmt.Errorf("%w\nhint: `%s --help` shows how it is used", err, c.CommandPath())}
		}
	}
	var status exitStatus
	switch {
	case err == nil:
		return 0
	case errors.As(err, &status):
		return int(status)
	}
	fmt.Fprintln(os.Stderr, "vpn:", err)
	var usage usageError
	if errors.As(err, &usage) {
		return exitUsage
	}
	return exitFailed
}

// exitStatus ends the program without another word.
type exitStatus int

func (s exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(s)) }

type usageError struct{ error }

func noArguments(_ *cobra.Command, args []string) error {
	if len(args) > 0 {
		return fmt.Errorf("%q is too much: it takes no arguments", args[0])
	}
	return nil
}

// oneArgument wants the one that the command's usage names.
func oneArgument(c *cobra.Command, args []string) error {
	_, name, _ := strings.Cut(c.Use, " ")
	switch len(args) {
	case 0:
		return fmt.Errorf("%s is missing", name)
	case 1:
		return nil
	}
	return fmt.Errorf("%q is too much: it takes one %s", args[1], name)
}

func command() *cobra.Command {
	var profile string
	root := &cobra.Command{
		Use:   "vpn",
		Short: "A tunnel to the bastion, and programs through it",
		Long: "A tunnel to the bastion, and programs through it.\n\n" +
			"It takes no privilege. With sudo, which works with your own profiles and runs commands as you, or once\n" +
			"sudo setcap cap_net_admin+ep \"$(command -v vpn)\", the tunnel is a device of the system's.\n\n" +
			"Exit status: 0 done, 1 failed, 2 the command line is wrong; exec has its own, see there.",
		Version: client.Version(),
		Example: `  vpn import alice.profile        keep the profile you were sent
  vpn up                          knock, and bring the tunnel up
  vpn exec -- aws s3 ls           one command through the tunnel
  vpn status
  vpn down`,
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.PersistentFlags().StringVar(&profile, "profile", "", "profile `NAME|FILE` (default: the one of `vpn use`, else the only one)")
	root.SetFlagErrorFunc(cmdline.FlagError)
	load := func() (*client.Profile, error) { return client.LoadProfile(profile) }
	root.AddCommand(upCommand(&profile), keepCommand(&profile), downCommand(load), statusCommand(load), execCommand(&profile),
		envCommand(load), browserCommand(&profile), doctorCommand(load), pacCommand(load), useCommand(), importCommand(), enrollCommand(), renewCommand(&profile), awsCommand(&profile))
	addManual(root)
	return root
}

// interrupted ends when the user or the system asks this process to.
func interrupted() (context.Context, func()) {
	return signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
}

func downCommand(load func() (*client.Profile, error)) *cobra.Command {
	return &cobra.Command{
		Use: "down", Short: "End the session and remove the tunnel", Args: noArguments,
		RunE: func(*cobra.Command, []string) error {
			p, err := load()
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			switch err := client.AskDown(ctx, p); {
			case errors.Is(err, client.ErrDown):
				fmt.Println("the tunnel was down")
			case err != nil:
				return err
			default:
				fmt.Println("tunnel down")
			}
			return nil
		},
	}
}

func statusCommand(load func() (*client.Profile, error)) *cobra.Command {
	asJSON := false
	c := &cobra.Command{
		Use: "status", Short: "Say how the tunnel is; exit status 1 when it is down or refused", Args: noArguments,
		RunE: func(*cobra.Command, []string) error {
			p, err := load()
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			defer cancel()
			s, err := client.AskStatus(ctx, p)
			down := errors.Is(err, client.ErrDown)
			if down {
				s = client.Status{State: "down", Profile: p.Name(), User: p.User, Device: p.Device}
			} else if err != nil {
				return err
			}
			if asJSON {
				out := json.NewEncoder(os.Stdout)
				out.SetIndent("", "  ")
				err = out.Encode(s)
			} else {
				fmt.Print(statusText(s, p.Expires(), time.Now()))
				err = nil
			}
			if err == nil && (down || s.State == client.Refused) {
				err = exitStatus(exitFailed)
			}
			return err
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

func statusText(s client.Status, certificate, now time.Time) string {
	var b strings.Builder
	line := func(name, format string, a ...any) {
		fmt.Fprintf(&b, "%-12s "+format+"\n", append([]any{name}, a...)...)
	}
	line("profile", "%s", s.Profile)
	line("tunnel", "%s", s.State)
	if s.Problem != "" {
		line("problem", "%s", s.Problem)
	}
	if s.Session != "" {
		line("data", "%s", s.Data)
		line("proxy", "http://%v", s.Listen)
		if s.Mode == client.ModeTUN {
			line("address", "%v on %s, its proxy http://%v", s.Address.Addr(), s.Interface, s.Proxy)
		} else {
			line("address", "%v, rootless", s.Address.Addr())
		}
		line("gate", "%v", s.Gate)
		line("egress", "%s", strings.Join(s.Egress, ", "))
		line("key exchange", "%s", map[bool]string{true: "post-quantum", false: "classical"}[s.PostQuantum])
		line("session", "%s, ends in %v", s.Session, s.Expires.Sub(now).Round(time.Second))
		if s.LastHandshake.IsZero() {
			line("handshake", "none yet")
		} else {
			line("handshake", "%v ago", now.Sub(s.LastHandshake).Round(time.Second))
		}
		line("traffic", "%d bytes received, %d sent", s.Received, s.Sent)
	}
	line("certificate", "ends in %d days", int(certificate.Sub(now).Hours()/24))
	return b.String()
}

func useCommand() *cobra.Command {
	return &cobra.Command{
		Use: "use NAME", Short: "Make an imported profile the default", Args: oneArgument,
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			names, _ := client.Names()
			return names, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(_ *cobra.Command, args []string) error {
			if err := client.Use(args[0]); err != nil {
				return err
			}
			fmt.Printf("%s is the default profile\n", args[0])
			return nil
		},
	}
}
