package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"time"

	"github.com/spf13/cobra"

	"perimeterd/configs"
	"perimeterd/internal/identity"
	"perimeterd/internal/session"
)

// errExternal is of what only the built-in CA does.
var errExternal = errors.New("the CA is another's (identity.ca_key is empty), and issues certificates itself")

func newVerifier(c configs.Identity, users *identity.Users) (*identity.Verifier, error) {
	if !c.External() {
		return identity.NewVerifier(c.CA, users, time.Now)
	}
	return identity.NewExternalVerifier(c.CA, identity.External{CRL: c.CRL, Allowed: c.Allowed}, users, time.Now)
}

// endRefused ends the sessions whose certificate would not be let in any more: their user was revoked while the daemon was
// down, or an external CA's files say otherwise than before.
func endRefused(store session.Store, verifier *identity.Verifier, log *slog.Logger) error {
	var errs []error
	for _, s := range store.List() {
		_, err := verifier.Again(s.Chain)
		var refusal *identity.Refusal
		if !errors.As(err, &refusal) {
			continue
		}
		if refusal.Code == identity.StateFailed { // says nothing of the certificate
			errs = append(errs, err, refusal.Err)
			continue
		}
		if refusal.Code == identity.Superseded {
			continue // its owner has another since, and goes on
		}
		log.Warn("a session's certificate is not let in any more", "session", s.ID, "user", s.User, "device", s.Device, "reason", refusal.Code, "err", refusal.Text)
		if err := store.End(s.ID, session.Revoked); err != nil && !errors.Is(err, session.ErrNotFound) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// followAuthority acts on changes of an external CA's files, live sessions included.
func followAuthority(ctx context.Context, store session.Store, verifier *identity.Verifier, log *slog.Logger) error {
	return verifier.Follow(ctx, log, func() {
		if err := endRefused(store, verifier, log); err != nil {
			log.Error("sessions not all judged anew", "err", err)
		}
	})
}

// checkExternal says how an external CA's files are.
func checkExternal(c *configs.Config) (lines []line) {
	const name = "external CA"
	if !c.Identity.External() {
		return nil
	}
	v, err := newVerifier(c.Identity, nil)
	if err != nil {
		return []line{found(name, "", missing(err))}
	}
	for _, path := range []string{c.Identity.CA, c.Identity.Allowed} {
		if st, err := os.Stat(path); err == nil && st.Mode().Perm()&0o002 != 0 {
			lines = append(lines, line{"problem", name, fmt.Sprintf("%s has mode %04o: others may let themselves in: chmod o-w %s", path, st.Mode().Perm(), path)})
		}
	}
	for _, p := range v.Problems() {
		lines = append(lines, line{"problem", name, p.Text})
	}
	if c.Identity.CRL == "" {
		lines = append(lines, line{"warning", name, "identity.crl is empty: who is revoked there is let in, until he is revoked here or taken off the list too"})
	}
	for _, l := range v.CRLs() {
		lines = append(lines, found(name, fmt.Sprintf("CRL of %s until %s", l.Issuer, l.NextUpdate.Local().Format(time.DateTime)), nil))
	}
	return lines
}

// serverWay says how the gate's certificate comes to the names that clients look for.
func serverWay(c *configs.Config, serverID, host string) string {
	if !c.Identity.External() {
		return ""
	}
	kind := "DNS"
	if net.ParseIP(host) != nil {
		kind = "IP"
	}
	return fmt.Sprintf(": let the CA issue it for both names, as in `easyrsa --subject-alt-name=DNS:%s,%s:%s build-server-full gate nopass`", serverID, kind, host)
}

// enterName enters a user of an external CA, who has his certificate from there.
func (o *addOptions) enterName(cmd *cobra.Command, c *configs.Config) error {
	for _, flag := range []string{"device", "valid", "out", "passphrase-file", "request"} {
		if cmd.Flags().Changed(flag) {
			return usageError{fmt.Errorf("--%s: %w: leave it off", flag, errExternal)}
		}
	}
	return withUsers(cmd.Context(), c, func(us users) error {
		u, err := us.AddUser(cmd.Context(), identity.Enrolment{Name: o.name, Groups: o.groups})
		if err != nil {
			return err
		}
		out := cmd.OutOrStdout()
		fmt.Fprintf(out, "%s may come in with a certificate of the CA in %s that says CN=%s.\n", u.Name, c.Identity.CA, u.Name)
		if !u.Barred.IsZero() {
			fmt.Fprintf(out, "He was revoked on %s: certificates issued before then stay out.\n", u.Barred.Local().Format(time.DateTime))
		}
		if c.Identity.Allowed != "" {
			fmt.Fprintf(out, "His subject must stand in %s too.\n", c.Identity.Allowed)
		}
		return nil
	})
}
