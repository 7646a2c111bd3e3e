package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/net/netutil"

	"perimeterd/vpn/client"
)

func execCommand(profile *string) *cobra.Command {
	timeout, awsProfile := defaultTimeout, ""
	c := &cobra.Command{
		Use: "exec -- COMMAND [ARG]...", Short: "Run a command through the tunnel", Args: needsCommand,
		Long: "Brings the tunnel up where it is down, for as long as the command runs, and points the command's proxy variables at it.\n" +
			"They name a port and a password that are this command's alone. The command never runs without the tunnel.\n" +
			"Its exit status is passed on; 125: no tunnel, 126: not executable, 127: not found.",
		Example: "  vpn exec -- aws sts get-caller-identity\n  vpn exec --aws-profile production -- aws s3 ls",
		RunE: func(_ *cobra.Command, args []string) error {
			if err := useAWSProfile(awsProfile); err != nil {
				fmt.Fprintf(os.Stderr, "vpn: %v; %s was not run\n", err, args[0])
				return exitStatus(exitNoTunnel)
			}
			return through(*profile, args, timeout, func(_ *client.Profile, s client.Status) ([]string, []string, error) {
				return args[1:], client.Environment(s), nil
			})
		},
	}
	c.Flags().SetInterspersed(false)
	c.Flags().DurationVar(&timeout, "timeout", timeout, "give up after so long")
	c.Flags().StringVar(&awsProfile, "aws-profile", "", "run it with profile `NAME` of ~/.aws/config, and no inherited AWS credentials")
	return c
}

// raiseAndHold keeps the profile's tunnel up, bringing it up first where it is down.
func raiseAndHold(p *client.Profile, profile string, timeout time.Duration) (*client.Held, error) {
	ctx, stop := interrupted()
	defer stop()
	report := newReporter(os.Stderr)
	step := func(s string) {
		if report.terminal {
			report.step(s)
		}
	}
	for {
		if _, err := raise(ctx, p, profile, timeout, true, step); err != nil {
			return nil, err
		}
		held, err := hold(ctx, p, timeout)
		if errors.Is(err, client.ErrDown) && ctx.Err() == nil {
			continue // its last holder left in this very moment
		}
		return held, err
	}
}

// hold waits for the tunnel a little longer than its process does, which then says why.
func hold(ctx context.Context, p *client.Profile, timeout time.Duration) (*client.Held, error) {
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

// through runs a command while the tunnel is held up, with the arguments and variables that fit it.
func through(profile string, args []string, timeout time.Duration, fit func(*client.Profile, client.Status) (arguments, env []string, err error)) error {
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
	held, err := raiseAndHold(p, profile, timeout)
	if err != nil {
		return fail(exitNoTunnel, fmt.Errorf("%w; %s was not run", err, args[0]))
	}
	defer held.Release()
	arguments, env, err := fit(p, held.Status)
	if err != nil {
		return fail(exitFailed, err)
	}

	// From here on every signal is the command's. The terminal sends its own to both of us.
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, passedSignals...)
	cmd := exec.Command(path, arguments...)
	cmd.Args[0] = args[0]
	cmd.Env = environ(os.Environ(), env)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	if err := client.WithoutPrivilege(cmd.Start); err != nil {
		return fail(exitNotExecutable, err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	lost := make(chan error, 1)
	go func() {
		why, gone := held.Lost()
		lost <- why
		for !gone {
			_, gone = held.Lost()
		}
		refuseAt(held.Status.URL, why)
	}()
	for {
		select {
		case err := <-lost:
			fmt.Fprintf(os.Stderr, "vpn: the tunnel is lost, and nothing more of %s goes through: %v\n", args[0], err)
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
			held.Release()
			return dieLike(exit.ProcessState)
		}
	}
}

// refuseAt answers in the place of a proxy that is no more, so that programs hear why and not only that nobody is there.
func refuseAt(proxy string, why error) {
	u, err := url.Parse(proxy)
	if err != nil {
		return
	}
	for range 20 {
		l, err := net.Listen("tcp4", u.Host)
		if err != nil { // its last connections may be on their way out
			time.Sleep(50 * time.Millisecond)
			continue
		}
		s := http.Server{ReadHeaderTimeout: 10 * time.Second, MaxHeaderBytes: 16 << 10, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, "vpn: the tunnel is lost: "+why.Error(), http.StatusServiceUnavailable)
		})}
		s.Serve(netutil.LimitListener(l, 64)) // as long as the command runs
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
