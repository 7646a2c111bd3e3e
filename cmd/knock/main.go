// Command knock opens the bastion's door: with the profile's one-time token, or as knockd's client does.
package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"perimeterd/internal/cmdline"
	"perimeterd/knock"
	"perimeterd/vpn/client"
)

func main() { os.Exit(run(os.Args[1:])) }

func run(args []string) int {
	root := command()
	root.SetArgs(args)
	understood := false
	root.PersistentPreRun = func(*cobra.Command, []string) { understood = true }
	err := client.BecomeInvoker()
	if err == nil {
		if err = root.Execute(); err != nil && !understood {
			err = usageError{err}
		}
	}
	var usage usageError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &usage):
		fmt.Fprintf(os.Stderr, "knock: %v\nhint: `knock --help` shows how it is used\n", err)
		return exitUsage
	}
	fmt.Fprintln(os.Stderr, "knock:", err)
	return exitFailed
}

// Exit statuses.
const (
	exitFailed = 1
	exitUsage  = 2
)

// usageError is a command line that was not understood.
type usageError struct{ error }

type options struct {
	profile              string
	timeout              time.Duration
	udp, verbose, v4, v6 bool
	delay                uint
	version              bool
}

func command() *cobra.Command {
	var o options
	c := &cobra.Command{
		Use:   "knock [HOST PORT[:PROTO]...]",
		Short: "Open the bastion's door to this address",
		Long: "Without arguments: knocks as the profile says, tries the gate, and says whether it is open (exit status 0) or why probably\n" +
			"not (1). With a host and ports: sends a packet to each in turn, as knockd's client does, and asks nobody.\n\n" +
			"Exit status: 0 open, or all is sent; 1 not; 2 the command line is wrong.",
		Example: `  knock
  knock bastion.example.com 7102 19044 33127
  knock -u bastion.example.com 7102 19044:tcp 33127`,
		SilenceErrors: true,
		SilenceUsage:  true,
		RunE: func(c *cobra.Command, args []string) error {
			ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			switch {
			case o.version:
				fmt.Println("knock version", client.Version())
				return nil
			case len(args) == 0:
				return o.profileKnock(ctx)
			case o.profile != "":
				return usageError{errors.New("--profile knows its host: give it or HOST and ports, not both")}
			case len(args) == 1:
				return usageError{fmt.Errorf("no ports for %s: give them in order, as in knock %s 7102 19044:udp 33127", args[0], args[0])}
			}
			delay := knock.Gap
			if c.Flags().Changed("delay") {
				// Without any pause the order would be left to chance.
				delay = max(time.Duration(o.delay)*time.Millisecond, time.Millisecond)
			}
			return o.sequence(ctx, args[0], args[1:], delay)
		},
	}
	c.SetFlagErrorFunc(cmdline.FlagError)
	f := c.Flags()
	f.BoolVarP(&o.udp, "udp", "u", false, "make all port hits UDP (default is TCP)")
	f.UintVarP(&o.delay, "delay", "d", 0, "wait so many `milliseconds` between port hits (default 15)")
	f.BoolVarP(&o.v4, "ipv4", "4", false, "force IPv4")
	f.BoolVarP(&o.v6, "ipv6", "6", false, "force IPv6")
	f.BoolVarP(&o.verbose, "verbose", "v", false, "say what is sent")
	f.BoolVarP(&o.version, "version", "V", false, "print the version")
	f.StringVar(&o.profile, "profile", "", "profile `NAME|FILE` (default: the one of `vpn use`, else the only one)")
	f.DurationVar(&o.timeout, "timeout", 5*time.Second, "give up after so long, without HOST")
	addManual(c)
	return c
}

func (o *options) profileKnock(ctx context.Context) error {
	start := time.Now()
	p, err := client.LoadProfile(o.profile)
	if err != nil {
		return err
	}
	tokens, err := client.NewTokens(p)
	if err != nil {
		return err
	}
	d := client.Dialer{Profile: p, Tokens: tokens}
	if o.verbose {
		d.Progress = func(step string) {
			fmt.Fprintf(os.Stderr, "%s %.1f ms\n", step, float64(time.Since(start).Microseconds())/1000)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	conn, err := d.Dial(ctx)
	if err != nil {
		return err
	}
	took := time.Since(start)
	conn.Close()
	fmt.Printf("open, %d s (%d ms)\n", int(p.Window().Seconds()), took.Milliseconds())
	return nil
}

// sequence does what knockd's client does.
func (o *options) sequence(ctx context.Context, host string, args []string, delay time.Duration) error {
	var ports []knock.Port
	for _, a := range args {
		if o.udp && !strings.ContainsAny(a, ":/") {
			a += ":udp"
		}
		p, err := knock.ParsePort(a)
		if err != nil {
			return usageError{err}
		}
		ports = append(ports, p)
	}
	addr, err := o.resolve(ctx, host)
	if err != nil {
		return err
	}
	if o.verbose {
		for _, p := range ports {
			proto := "tcp"
			if p.Proto == knock.UDP {
				proto = "udp"
			}
			fmt.Printf("hitting %s %s\n", proto, netip.AddrPortFrom(addr, p.Number))
		}
	}
	return client.ExplainSend(knock.Send(ctx, netip.Addr{}, addr, ports, delay))
}

func (o *options) resolve(ctx context.Context, host string) (netip.Addr, error) {
	family := "ip"
	switch {
	case o.v4 && !o.v6:
		family = "ip4"
	case o.v6 && !o.v4:
		family = "ip6"
	}
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, family, host)
	if err != nil {
		return netip.Addr{}, err
	}
	return addrs[0].Unmap(), nil
}
