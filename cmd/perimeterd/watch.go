package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"perimeterd/configs"
	"perimeterd/firewall"
	"perimeterd/internal/control"
	"perimeterd/internal/identity"
)

func newWatchCommand() *cobra.Command {
	span := time.Minute
	cmd := &cobra.Command{
		Use:   "watch IP",
		Short: "Show what arrives from one address, and what becomes of it",
		Long: `Examples:
  perimeterd watch 198.51.100.7              while the user there tries to come in
  perimeterd watch 2001:db8::7 --for 10m

The user's own address as others see it: curl https://checkip.amazonaws.com on his machine says it. Shown are his knocks, his
connections to the gate, his tunnel's handshakes and whatever else he begins, at most 25 a second. It takes root. Nothing
stays behind, and nothing is let in that would not be.`,
		Args: oneArgument("address", "198.51.100.7"),
		RunE: func(cmd *cobra.Command, args []string) error {
			source, err := netip.ParseAddr(args[0])
			if err != nil || source.Zone() != "" {
				return usageError{fmt.Errorf("%q is not an IP address, such as 198.51.100.7", args[0])}
			}
			if span <= 0 {
				return usageError{fmt.Errorf("--for %v: want a time, such as 60s or 10m", span)}
			}
			c, err := loadConfig(cmd)
			if err != nil {
				return err
			}
			if os.Geteuid() != 0 {
				return errors.New("watch reads packets and the knock master, which takes root: run it with sudo")
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			return watch(ctx, cmd.OutOrStdout(), c, source.Unmap(), span)
		},
	}
	cmd.Flags().DurationVar(&span, "for", span, "how long")
	return cmd
}

func watch(ctx context.Context, out io.Writer, c *configs.Config, source netip.Addr, span time.Duration) error {
	door := firewall.New(slog.New(slog.DiscardHandler), 0)
	x, err := newExplainer(ctx, c, door, source)
	if err != nil {
		return err
	}
	timed, cancel := context.WithTimeout(ctx, span)
	defer cancel()
	ready, done := make(chan struct{}), make(chan error, 1)
	shown := 0
	go func() {
		done <- firewall.Trace(timed, 0, c.Firewall, source, ready, func(a firewall.Arrival) {
			shown++
			fmt.Fprintf(out, "%s  %s\n", a.At.Format("15:04:05.000"), x.explain(a))
		})
	}()
	select {
	case <-ready:
	case err := <-done:
		return err
	}
	fmt.Fprintf(out, "watching %v for %v; it is %s here; Ctrl-C ends it\n", source, span, time.Now().Format("15:04:05 MST"))
	for _, text := range x.situation(ctx) {
		fmt.Fprintln(out, text)
	}
	if err := <-done; err != nil {
		return err
	}
	if shown == 0 {
		fmt.Fprintf(out, "nothing arrived from %v. Does the user come from another address (curl https://checkip.amazonaws.com there)? "+
			"Does an outer firewall or security group drop %d/udp and %d/tcp? Does %s lead here?\n", source, c.Firewall.TunnelPort, c.Firewall.GatePorts[0], c.Endpoint)
	}
	return nil
}

// situation says what the door is like before anything arrives.
func (x *explainer) situation(ctx context.Context) (lines []string) {
	if _, err := control.NewClient(x.c.ControlSocket()).Status(ctx); err != nil {
		lines = append(lines, "the daemon gives no answer, so no new knock by token opens: "+err.Error())
	}
	there, err := x.door.Present()
	switch {
	case err != nil:
		return append(lines, err.Error())
	case !there:
		return append(lines, "the nftables table is not there: nobody comes in; `systemctl restart perimeterd` brings it back")
	}
	if w, left := x.window(time.Now()); w != "" {
		lines = append(lines, fmt.Sprintf("a window is open for %v already: %s, %v left", x.source, w, left))
	}
	return lines
}

// newExplainer reads who may knock.
func newExplainer(ctx context.Context, c *configs.Config, door door, source netip.Addr) (*explainer, error) {
	master, err := identity.ReadKey(c.Identity.Master)
	if err != nil {
		return nil, missing(err)
	}
	server, err := identity.ReadServerID(c.Identity.ServerID)
	if err != nil {
		return nil, missing(err)
	}
	x := &explainer{c: c, door: door, source: source, master: master[:], server: server}
	err = readUsers(ctx, c, func(us users) (err error) {
		x.users, err = us.ListUsers(ctx)
		return err
	})
	x.begin()
	return x, err
}
