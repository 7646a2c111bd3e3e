package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
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

func newCACommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "ca",
		Short: "Show the built-in CA, or replace it by another",
		Long: `Examples:
  perimeterd ca show
  perimeterd ca rotate              a new CA issues from now on, and the old one is still trusted
  perimeterd ca rotate --finish     the old one is not trusted any more

They work with the daemon running or stopped.`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return usageError{errors.New("ca: show or rotate?\nhint: `perimeterd ca --help` shows how it is used")}
		},
	}
	cmd.AddCommand(newCAShowCommand(), newCARotateCommand())
	return cmd
}

// builtIn is loadConfig for what only the built-in CA has.
func builtIn(cmd *cobra.Command) (*configs.Config, error) {
	c, err := loadConfig(cmd)
	if err == nil && c.Identity.External() {
		err = usageError{errExternal}
	}
	return c, err
}

// authority is a CA as `ca show` has it.
type authority struct {
	Name    string    `json:"name"`
	ID      string    `json:"id"` // of its key
	SHA256  string    `json:"sha256"`
	Until   time.Time `json:"until"`
	Issues  bool      `json:"issues"`
	Devices int       `json:"devices"` // that come in by it now
	Gate    bool      `json:"gate"`    // it issued the gate's certificate
}

func newCAShowCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "show",
		Short: "List the CAs that are trusted, and how many devices each let in",
		Long: `Examples:
  perimeterd ca show
  perimeterd ca show --json`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := builtIn(cmd)
			if err != nil {
				return err
			}
			bundle, err := identity.ReadCertificates(c.Identity.CA)
			if err != nil {
				return err
			}
			shown, err := identity.ReadCertificates(c.Identity.Cert)
			if err != nil {
				return err
			}
			var all []authority
			err = withUsers(cmd.Context(), c, func(us users) error {
				list, err := us.ListUsers(cmd.Context())
				newest := identity.Newest(bundle)
				for _, a := range bundle {
					sum := sha256.Sum256(a.Raw)
					all = append(all, authority{Name: a.Subject.CommonName, ID: identity.AuthorityID(a), SHA256: hex.EncodeToString(sum[:]), Until: a.NotAfter,
						Issues: a.Equal(newest), Devices: len(devicesOf(list, a, bundle, time.Now())), Gate: shown[0].CheckSignatureFrom(a) == nil})
				}
				return err
			})
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), all)
			}
			w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
			fmt.Fprintln(w, "CA\tUNTIL\tDEVICES\tGATE\tSTATE\tSHA-256")
			for _, a := range all {
				state, gate := "leaving", "no"
				if a.Issues {
					state = "issues"
				}
				if a.Gate {
					gate = "yes"
				}
				fmt.Fprintf(w, "%s\t%s\t%d\t%s\t%s\t%s\n", a.Name, a.Until.Local().Format(time.DateOnly), a.Devices, gate, state, a.SHA256)
			}
			return w.Flush()
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// devicesOf are the devices that come in by certificates of an authority. One whose successor was never used comes in by the
// certificate before.
func devicesOf(all []identity.User, a *x509.Certificate, bundle []*x509.Certificate, now time.Time) (names []string) {
	for _, u := range all {
		for _, d := range u.Devices {
			if u.Active() && d.Active(now) && issuedBy(d, a, bundle) {
				names = append(names, u.Name+"/"+d.Name)
			}
		}
	}
	return names
}

// issuedBy takes a certificate whose issuer nobody wrote down for one of the oldest authority.
func issuedBy(d identity.Device, a *x509.Certificate, bundle []*x509.Certificate) bool {
	return d.Issuer == identity.AuthorityID(a) || d.Issuer == "" && a.Equal(bundle[0])
}

func newCARotateCommand() *cobra.Command {
	var finish, force bool
	cmd := &cobra.Command{
		Use:   "rotate",
		Short: "Replace the CA by a new one, in two steps",
		Long: `Examples:
  perimeterd ca rotate
  perimeterd ca show                        how many devices have a certificate of the old one still
  perimeterd ca rotate --finish
  perimeterd ca rotate --finish --force     now, whoever is cut off: the old CA's key was stolen

The first step makes a new CA, which issues every certificate from then on; the old one's key is gone. Both are trusted, and
the gate goes on showing the old one's certificate, which every client knows. Our clients are told at their next session: they
renew their certificate at once and learn of the new CA with it. The second step gives the gate a certificate of the new CA and
ends the trust in the old one. It refuses while somebody would be cut off.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if force && !finish {
				return usageError{errors.New("--force: it is for --finish")}
			}
			c, err := builtIn(cmd)
			if err != nil {
				return err
			}
			err = withUsers(cmd.Context(), c, func(us users) error {
				list, err := us.ListUsers(cmd.Context())
				if err != nil {
					return err
				}
				if finish {
					return finishRotation(cmd, c, us, list, force)
				}
				return rotateCA(cmd, c, us, list)
			})
			if errors.Is(err, fs.ErrPermission) {
				return fmt.Errorf("%w: run it as root", err)
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&finish, "finish", false, "end the trust in the old CA")
	cmd.Flags().BoolVar(&force, "force", false, "also where devices have certificates of the old CA only: they need new profiles")
	return cmd
}

// nextKey is where a new CA's key lies until the CA is known to the gate.
func nextKey(c *configs.Config) string { return c.Identity.CAKey + ".next" }

// rotateCA makes the new CA here, as init made the first: nothing of an outsider's is read on the way. At every moment the CA
// whose key issues is in the bundle.
func rotateCA(cmd *cobra.Command, c *configs.Config, us users, list []identity.User) error {
	text, err := os.ReadFile(c.Identity.CA)
	if err != nil {
		return err
	}
	bundle, err := identity.ReadCertificates(c.Identity.CA)
	if err != nil {
		return err
	}
	if key, err := os.ReadFile(nextKey(c)); err == nil { // a crash came between the two steps below
		if ca, err := identity.ParseCA(text, key); err == nil && ca.Certificate.Equal(identity.Newest(bundle)) {
			return enterCA(cmd, c, us, list)
		}
	}
	if len(bundle) > 1 {
		return fmt.Errorf("%s has %d CAs: a rotation is under way: `perimeterd ca show` tells how far, --finish ends it", c.Identity.CA, len(bundle))
	}
	id, err := os.ReadFile(c.Identity.ServerID)
	if err != nil {
		return err
	}
	now := time.Now()
	ca, err := identity.NewCA(fmt.Sprintf("perimeterd CA %.8s %s", id, now.UTC().Format("2006-01")), now)
	if err != nil {
		return err
	}
	key, err := ca.EncodeKey()
	if err != nil {
		return err
	}
	if err := identity.Replace(nextKey(c), key, 0o600); err != nil {
		return err
	}
	if !bytes.HasSuffix(text, []byte("\n")) {
		text = append(text, '\n')
	}
	if err := identity.Replace(c.Identity.CA, append(text, identity.EncodeCertificate(ca.Certificate)...), 0o644); err != nil {
		return err
	}
	return enterCA(cmd, c, us, list)
}

// enterCA makes the next key the CA's, and has the daemon trust it first: a certificate of a CA that it does not know is refused.
func enterCA(cmd *cobra.Command, c *configs.Config, us users, list []identity.User) error {
	if err := us.TakeUpAuthority(cmd.Context(), control.CARotate); err != nil {
		return fmt.Errorf("the daemon does not take up the new CA: %w: see its log, then give the command again", err)
	}
	if err := giveToSigner(nextKey(c)); err != nil {
		return err
	}
	if err := identity.Rename(nextKey(c), c.Identity.CAKey); err != nil {
		return err
	}
	bundle, err := identity.ReadCertificates(c.Identity.CA)
	if err != nil {
		return err
	}
	newest := identity.Newest(bundle)
	waiting := 0
	for _, a := range bundle {
		if !a.Equal(newest) {
			waiting += len(devicesOf(list, a, bundle, time.Now()))
		}
	}
	out := cmd.OutOrStdout()
	fmt.Fprintf(out, "%s issues from now on, until %s; the CA before is trusted still, and its key is gone: back up %s.\n",
		newest.Subject.CommonName, newest.NotAfter.Local().Format(time.DateOnly), filepath.Dir(c.Identity.CAKey))
	fmt.Fprintf(out, "Devices with certificates of the one before: %d. Their clients renew at their next session; new profiles know both.\n\nNext, when `perimeterd ca show` says 0:\n    perimeterd ca rotate --finish\n", waiting)
	return nil
}

// finishRotation leaves the newest CA alone in the bundle. The gate's certificate comes first: while both are trusted, either
// does.
func finishRotation(cmd *cobra.Command, c *configs.Config, us users, list []identity.User, force bool) error {
	ctx := cmd.Context()
	bundle, err := identity.ReadCertificates(c.Identity.CA)
	if err != nil {
		return err
	}
	if len(bundle) == 1 {
		return fmt.Errorf("%s has one CA: no rotation is under way: `perimeterd ca rotate` begins one", c.Identity.CA)
	}
	if _, err := os.Stat(nextKey(c)); err == nil {
		return fmt.Errorf("%s: the first step was interrupted: finish it with `perimeterd ca rotate`", nextKey(c))
	}
	newest := identity.Newest(bundle)
	var cut []string
	for _, a := range bundle {
		if !a.Equal(newest) {
			cut = append(cut, devicesOf(list, a, bundle, time.Now())...)
		}
	}
	slices.Sort(cut)
	if len(cut) > 0 && !force {
		const shown = 20
		text := strings.Join(cut[:min(len(cut), shown)], ", ")
		if len(cut) > shown {
			text += fmt.Sprintf(" and %d more", len(cut)-shown)
		}
		return fmt.Errorf("devices that would be cut off: %s: wait until they were here, give them new profiles with `perimeterd user profile`, "+
			"revoke them, or --force", text)
	}
	cert, err := gateCertificate(ctx, c)
	if err != nil {
		return err
	}
	if cert.CheckSignatureFrom(newest) != nil {
		return fmt.Errorf("%s: its key is not that of %s: put the right one back, from a backup", c.Identity.CAKey, newest.Subject.CommonName)
	}
	if err := identity.Replace(c.Identity.Cert, identity.EncodeCertificate(cert), 0o644); err != nil {
		return err
	}
	if err := identity.Replace(c.Identity.CA, identity.EncodeCertificate(newest), 0o644); err != nil {
		return err
	}
	if err := us.TakeUpAuthority(ctx, control.CAFinish); err != nil {
		return fmt.Errorf("the files are changed, and the daemon does not take them up: %w: restart it", err)
	}
	fmt.Fprintf(cmd.OutOrStdout(), "%s alone is trusted from now on, and the gate's certificate is of it, until %s.\n",
		newest.Subject.CommonName, cert.NotAfter.Local().Format(time.DateOnly))
	if len(cut) > 0 {
		fmt.Fprintf(cmd.OutOrStdout(), "Cut off, until they have new profiles (perimeterd user profile NAME): %s\n", strings.Join(cut, ", "))
	}
	return nil
}

// gateCertificate has the CA issue another certificate for the gate's key.
func gateCertificate(ctx context.Context, c *configs.Config) (*x509.Certificate, error) {
	pair, err := tls.LoadX509KeyPair(c.Identity.Cert, c.Identity.Key)
	if err != nil {
		return nil, missing(err)
	}
	key, ok := pair.PrivateKey.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("%s: a %T signs no request", c.Identity.Key, pair.PrivateKey)
	}
	csr, err := identity.NewRequest(key, "", "")
	if err != nil {
		return nil, err
	}
	id, err := identity.ReadServerID(c.Identity.ServerID)
	if err != nil {
		return nil, err
	}
	host, _, err := net.SplitHostPort(c.Endpoint)
	if err != nil {
		return nil, err
	}
	sign := newSigner(c, "--quiet")
	defer sign.Close()
	return sign.Server(ctx, hex.EncodeToString(id[:]), host, csr.DER)
}

// takeUpAuthority reads what `ca rotate` wrote. The sessions of who comes in by an authority that is gone end.
func takeUpAuthority(c configs.Identity, api *gate.Gate, verifier *identity.Verifier, users *identity.Users, store session.Store, log *slog.Logger) error {
	pair, err := tls.LoadX509KeyPair(c.Cert, c.Key)
	if err != nil {
		return err
	}
	if err := verifier.Reload(); err != nil {
		return err
	}
	api.Present(pair)
	bundle, err := identity.ReadCertificates(c.CA)
	if err != nil {
		return err
	}
	list, err := users.List()
	if err != nil {
		return err
	}
	// Judged by what a device has now: its session may have begun with the certificate before.
	good := map[[32]byte]bool{}
	for _, u := range list {
		for _, d := range u.Devices {
			good[d.ID()] = slices.ContainsFunc(bundle, func(a *x509.Certificate) bool { return issuedBy(d, a, bundle) })
		}
	}
	var errs []error
	for _, s := range store.List() {
		if !good[s.Certificate] {
			log.Warn("a session's certificate is of a CA that is not trusted any more", "session", s.ID, "user", s.User, "device", s.Device)
			if err := store.End(s.ID, session.Revoked); err != nil && !errors.Is(err, session.ErrNotFound) {
				errs = append(errs, err)
			}
		}
	}
	api.CutRefused()
	return errors.Join(errs...)
}
