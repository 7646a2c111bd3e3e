package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"perimeterd/vpn/client"
)

func execCommand(profile *string) *cobra.Command {
	timeout, awsProfile := defaultTimeout, ""
	c := &cobra.Command{
		Use: "exec -- COMMAND [ARG]...", Short: "Run a command through the tunnel", Args: needsCommand,
		Long: "Brings the tunnel up where it is down, for as long as the command runs, and points the command's proxy variables at it.\n" +
			"The command never runs without the tunnel. Its exit status is passed on; 125: no tunnel, 126: not executable, 127: not found.",
		Example: "  vpn exec -- aws sts get-caller-identity\n  vpn exec --aws-profile production -- aws s3 ls",
		RunE: func(_ *cobra.Command, args []string) error {
			if err := useAWSProfile(awsProfile); err != nil {
				fmt.Fprintf(os.Stderr, "vpn: %v; %s was not run\n", err, args[0])
				return exitStatus(exitNoTunnel)
			}
			return through(*profile, args, func(p *client.Profile) (func(), client.Status, error) {
				ctx, stop := interrupted()
				defer stop()
				report := newReporter(os.Stderr)
				step := func(s string) {
					if report.terminal {
						report.step(s)
					}
				}
				for {
					if _, err := raise(ctx, p, *profile, timeout, true, step); err != nil {
						return nil, client.Status{}, err
					}
					held, s, err := hold(ctx, p, timeout)
					if errors.Is(err, client.ErrDown) && ctx.Err() == nil {
						continue // its last holder left in this very moment
					}
					if err != nil {
						return nil, s, err
					}
					return func() { held.Close() }, s, nil
				}
			})
		},
	}
	c.Flags().SetInterspersed(false)
	c.Flags().DurationVar(&timeout, "timeout", timeout, "give up after so long")
	c.Flags().StringVar(&awsProfile, "aws-profile", "", "run it with this profile of ~/.aws/config, and no inherited AWS credentials")
	return c
}

// hold waits for the tunnel a little longer than its process does, which then says why.
func hold(ctx context.Context, p *client.Profile, timeout time.Duration) (net.Conn, client.Status, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout+5*time.Second)
	defer cancel()
	return client.Hold(ctx, p, timeout)
}

func needsCommand(_ *cobra.Command, args []string) error {
	if len(args) == 0 {
		return errors.New("no command to run")
	}
	return nil
}

const (
	exitNoTunnel      = 125
	exitNotExecutable = 126
	exitNotFound      = 127
)

// through runs a command while hold keeps the tunnel up.
func through(profile string, args []string, hold func(*client.Profile) (func(), client.Status, error)) error {
	fail := func(status int, err error) error {
		fmt.Fprintln(os.Stderr, "vpn:", err)
		return exitStatus(status)
	}
	path, err := exec.LookPath(args[0]) // before the tunnel: a misspelt name need not knock
	switch {
	case errors.Is(err, exec.ErrNotFound) || errors.Is(err, os.ErrNotExist):
		return fail(exitNotFound, err)
	case err != nil:
		return fail(exitNotExecutable, err)
	}
	p, err := client.LoadProfile(profile)
	if err != nil {
		return fail(exitNoTunnel, err)
	}
	release, s, err := hold(p)
	if err != nil {
		return fail(exitNoTunnel, fmt.Errorf("%w; %s was not run", err, args[0]))
	}
	defer release()

	// From here on every signal is the command's. The terminal sends its own to both of us.
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, passedSignals...)
	cmd := exec.Command(path, args[1:]...)
	cmd.Args[0] = args[0]
	cmd.Env = environ(os.Environ(), client.Environment(s))
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	if err := client.WithoutPrivilege(cmd.Start); err != nil {
		return fail(exitNotExecutable, err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	for {
		select {
		case sig := <-signals:
			if !fromTerminal(sig) {
				cmd.Process.Signal(sig)
			}
		case err := <-done:
			var exit *exec.ExitError
			switch {
			case err == nil:
				return nil
			case !errors.As(err, &exit):
				return fail(exitFailed, err)
			}
			release()
			return dieLike(exit.ProcessState)
		}
	}
}

// environ lays set over base. Programs differ in which of two equal names they take.
func environ(base, set []string) []string {
	names := map[string]bool{}
	for _, e := range set {
		name, _, _ := strings.Cut(e, "=")
		names[name] = true
	}
	var out []string
	for _, e := range base {
		if name, _, _ := strings.Cut(e, "="); !names[name] {
			out = append(out, e)
		}
	}
	return append(out, set...)
}
