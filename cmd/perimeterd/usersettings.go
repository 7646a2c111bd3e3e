package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"perimeterd/configs"
	"perimeterd/internal/control"
	"perimeterd/internal/identity"
	"perimeterd/internal/session"
	"perimeterd/vpn/gate"
)

func newUserSetCommand() *cobra.Command {
	var groups []string
	var address, max string
	var devices int
	cmd := &cobra.Command{
		Use:   "set NAME",
		Short: "Change a user's groups and what he has of his own",
		Long: `Examples:
  perimeterd user set alice --group operators --group db    these two, and no others
  perimeterd user set alice --group ''                      none
  perimeterd user set alice --address 10.77.0.50            always this tunnel address, and nobody else has it
  perimeterd user set alice --devices 2 --session-max 8h    instead of session.devices and session.max
  perimeterd user set alice --address none --devices 0 --session-max 0    as everybody

Groups, address and the longest session act at once: his sessions end, and his client begins new ones by itself. What he has
open through the proxy breaks. A lower number of devices acts at his next session.

The address goes to his first session. While that lives, a second device of his gets another one.`,
		Args: oneArgument("NAME", "alice --group operators"),
		RunE: func(cmd *cobra.Command, args []string) error {
			var c identity.Change
			given := cmd.Flags().Changed
			if given("group") {
				c.Groups = slices.DeleteFunc(groups, func(g string) bool { return g == "" && len(groups) == 1 })
				if c.Groups == nil {
					c.Groups = []string{}
				}
			}
			if given("devices") {
				c.Sessions = &devices
			}
			if given("session-max") {
				d, err := configs.ParseDuration(max)
				if err != nil {
					return usageError{fmt.Errorf("--session-max %w", err)}
				}
				seconds := int64(d / time.Second)
				c.SessionMax = &seconds
			}
			if given("address") {
				a, err := parseOwnAddress(cmd, address)
				if err != nil {
					return err
				}
				c.Address = &a
			}
			if c.Groups == nil && c.Address == nil && c.Sessions == nil && c.SessionMax == nil {
				return usageError{errors.New("user set: what? Give --group, --address, --devices or --session-max\nhint: `perimeterd user set --help` shows how it is used")}
			}
			p, err := findPaths(cmd)
			if err != nil {
				return err
			}
			return withUsers(cmd.Context(), p, func(us users) error {
				done, err := us.SetUser(cmd.Context(), args[0], c)
				if err != nil {
					return err
				}
				out := cmd.OutOrStdout()
				fmt.Fprintf(out, "%s: groups %s; %s\n", args[0], cmp.Or(strings.Join(done.User.Groups, ","), "none"), settingsText(done.User.Settings))
				if done.Ended > 0 {
					fmt.Fprintf(out, "Sessions ended: %d. His client begins new ones with the new settings.\n", done.Ended)
				}
				return nil
			})
		},
	}
	f := cmd.Flags()
	f.StringArrayVar(&groups, "group", nil, "`GROUP` of the user, instead of those he has; may be repeated; '' alone: none")
	f.StringVar(&address, "address", "", "tunnel `ADDRESS` of his own; none: one of the pool")
	f.IntVar(&devices, "devices", 0, "how many live sessions a certificate of his may hold; 0: session.devices")
	f.StringVar(&max, "session-max", "", "longest `TIME` that a session of his lasts, as in 8h; 0: session.max")
	return cmd
}

// parseOwnAddress wants an address of the tunnel's network that clients may have.
func parseOwnAddress(cmd *cobra.Command, text string) (a netip.Addr, err error) {
	if text == "none" {
		return a, nil
	}
	c, err := loadConfig(cmd)
	if err != nil {
		return a, err
	}
	network := c.Gate.Network
	bad := func(what string) error {
		return usageError{fmt.Errorf("--address %q: %s: want one of tunnel.network %v, as in %v, or none", text, what, network, nth(network, 50))}
	}
	if a, err = netip.ParseAddr(text); err != nil {
		return a, bad("not an address")
	}
	switch {
	case !network.Contains(a):
		return a, bad("not of the tunnel's network")
	case a == network.Addr() || a == network.Addr().Next() || !network.Contains(a.Next()):
		return a, bad("the network's own, the daemon's or the broadcast address")
	}
	return a, nil
}

// nth is an address in a network for an example.
func nth(network netip.Prefix, n int) netip.Addr {
	a := network.Addr()
	for i := 0; i < n && network.Contains(a.Next().Next()); i++ {
		a = a.Next()
	}
	return a
}

func settingsText(s identity.Settings) string {
	address, devices, max := "any address", "live sessions of a device as session.devices", "sessions as long as session.max"
	if s.Address.IsValid() {
		address = "address " + s.Address.String()
	}
	if s.Sessions > 0 {
		devices = fmt.Sprintf("live sessions of a device: %d", s.Sessions)
	}
	if s.SessionMax > 0 {
		max = fmt.Sprintf("sessions of at most %v", s.Max(0))
	}
	return address + "; " + devices + "; " + max
}

func newUserShowCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "show NAME",
		Short: "Show a user with his devices, settings and sessions",
		Long: `Examples:
  perimeterd user show alice
  perimeterd user show alice --json`,
		Args: oneArgument("NAME", "alice"),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := findPaths(cmd)
			if err != nil {
				return err
			}
			return readUsers(cmd.Context(), p, func(us users) error {
				u, err := findUser(cmd.Context(), us, args[0])
				if err != nil {
					return err
				}
				now := time.Now()
				all := []identity.User{u}
				live, err := insideNow(cmd.Context(), us, all, now)
				if err != nil {
					return err
				}
				live = slices.DeleteFunc(live, func(s control.Session) bool { return s.User != u.Name })
				if asJSON {
					return printJSON(cmd.OutOrStdout(), struct {
						identity.User
						Live []control.Session `json:"sessions"`
					}{all[0], append([]control.Session{}, live...)})
				}
				return printUser(cmd.OutOrStdout(), all[0], live, now)
			})
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func findUser(ctx context.Context, us users, name string) (identity.User, error) {
	all, err := us.ListUsers(ctx)
	if err != nil {
		return identity.User{}, err
	}
	for _, u := range all {
		if u.Name == name {
			return u, nil
		}
	}
	return identity.User{}, fmt.Errorf("user %q is %w: `perimeterd user list` shows who is", name, identity.ErrNoUser)
}

// insideNow lists the live sessions, and notes in all whose devices are inside. Without a daemon nobody is.
func insideNow(ctx context.Context, us users, all []identity.User, now time.Time) ([]control.Session, error) {
	daemon, running := us.(*control.Client)
	if !running {
		return nil, nil
	}
	live, err := daemon.Sessions(ctx)
	for _, s := range live {
		for _, u := range all {
			for i := range u.Devices {
				if d := &u.Devices[i]; u.Name == s.User && d.Name == s.Device && d.Active(now) {
					d.LastSeen = now
				}
			}
		}
	}
	return live, err
}

func printUser(out io.Writer, u identity.User, live []control.Session, now time.Time) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	state := "active"
	if !u.Active() {
		state = "revoked " + u.Revoked.Local().Format(time.DateOnly)
	}
	fmt.Fprintf(w, "user\t%s, %s\nentered\t%s\ngroups\t%s\n", u.Name, state, u.Created.Local().Format(time.DateOnly), cmp.Or(strings.Join(u.Groups, ", "), "none"))
	fmt.Fprintf(w, "settings\t%s\nknock\tcredential %d, secret %d\n", settingsText(u.Settings), u.Credential, u.Epoch)
	if err := w.Flush(); err != nil {
		return err
	}
	fmt.Fprintln(w, "\nDEVICE\tENROLLED\tUNTIL\tRENEWED UNTIL\tLAST SEEN\tSTATE\tKEY")
	for _, d := range u.Devices {
		renewals := d.Created.Add(identity.Renewals)
		if renewals.Before(d.NotAfter) {
			renewals = d.NotAfter
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%x\n", d.Name, d.Created.Local().Format(time.DateOnly), d.NotAfter.Local().Format(time.DateOnly),
			renewals.Local().Format(time.DateOnly), seenText(d, now), deviceState(d, now), d.Key[:8])
	}
	if len(live) > 0 {
		fmt.Fprintln(w, "\nSESSION\tDEVICE\tADDRESS\tFROM\tENDS IN")
	}
	for _, s := range live {
		fmt.Fprintf(w, "%v\t%s\t%v\t%v\t%v\n", s.ID, s.Device, s.Address, s.Outer, time.Until(s.Expires).Round(time.Second))
	}
	return w.Flush()
}

func deviceState(d identity.Device, now time.Time) string {
	switch {
	case !d.Revoked.IsZero():
		return "revoked " + d.Revoked.Local().Format(time.DateOnly)
	case !d.Active(now):
		return "expired"
	}
	return "active"
}

func seenText(d identity.Device, now time.Time) string {
	switch {
	case d.LastSeen.IsZero():
		return "-"
	case d.LastSeen.Equal(now):
		return "now"
	}
	return d.LastSeen.Local().Format("2006-01-02 15:04")
}

func newUserProfileCommand() *cobra.Command {
	o := addOptions{replace: true}
	var valid string
	cmd := &cobra.Command{
		Use:   "profile NAME",
		Short: "Write a new profile for a user's device, and revoke what it had",
		Long: `Examples:
  perimeterd user profile alice                            her only device
  perimeterd user profile alice --device mac --valid 30d
  perimeterd user profile alice --request alice.csr        for a key that stays on her laptop

For a profile that was lost or read by others, a certificate that ran out, or a year after the enrolment, when renewals end. The
device's old certificate opens nothing any more, and its sessions end. Its knock secret is the user's, which other devices
share, and stays: it hides the gate, no more. Groups and settings stay too.`,
		Args: oneArgument("NAME", "alice"),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			o.name = args[0]
			c, err := o.read(cmd, valid)
			if err != nil {
				return err
			}
			if c.Identity.External() {
				return fmt.Errorf("user profile: %w: docs/migrate-openvpn.md says how a profile is made by hand", errExternal)
			}
			if err := readUsers(cmd.Context(), c, func(us users) error { return o.chooseDevice(cmd.Context(), us) }); err != nil {
				return err
			}
			return o.run(cmd, c)
		},
	}
	o.flags(cmd, &valid)
	cmd.Flags().Lookup("device").DefValue = ""
	return cmd
}

// chooseDevice takes the user's only device where none was named, before anything is signed.
func (o *addOptions) chooseDevice(ctx context.Context, us users) error {
	u, err := findUser(ctx, us, o.name)
	if err != nil {
		return err
	}
	if !u.Active() {
		return fmt.Errorf("user %q was revoked: let him in again with `perimeterd user add %s`", u.Name, u.Name)
	}
	var names []string
	for _, d := range u.Devices {
		if !slices.Contains(names, d.Name) && (d.Revoked.IsZero() || d.Name == o.device) {
			names = append(names, d.Name)
		}
	}
	switch {
	case o.deviceGiven && slices.Contains(names, o.device):
		return nil
	case o.deviceGiven:
		return fmt.Errorf("user %q has no device %q, but %s: name one of them, or add it: perimeterd user add %s --device %s",
			u.Name, o.device, strings.Join(names, ", "), u.Name, o.device)
	case len(names) == 1:
		o.device = names[0]
		return nil
	}
	return fmt.Errorf("user %q has the devices %s: name one with --device", u.Name, strings.Join(names, ", "))
}

// reserve tells the gate which tunnel addresses are users' own.
func reserve(api *gate.Gate, users *identity.Users) error {
	list, err := users.List()
	if err != nil {
		return err
	}
	own := map[netip.Addr]string{}
	for _, u := range list {
		if u.Address.IsValid() {
			own[u.Address] = u.Name
		}
	}
	api.Reserve(own)
	return nil
}

// noteSeen remembers from a session's events when its certificate was inside.
func noteSeen(seen *identity.Seen) func(session.Event) {
	return func(e session.Event) {
		switch e.Ended {
		case "":
			seen.Note(e.Session.Certificate, e.Session.Created)
		case session.Deleted, session.Replaced: // its client did that
			seen.Note(e.Session.Certificate, time.Now())
		default:
			seen.Note(e.Session.Certificate, e.Session.Seen.Handshake)
		}
	}
}
