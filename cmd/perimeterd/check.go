package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"perimeterd/configs"
	"perimeterd/firewall"
	"perimeterd/internal/identity"
)

// expiryWarning is how long before its end a certificate is a problem: time enough to hand out new ones.
const expiryWarning = 30 * 24 * time.Hour

// check is one line of `perimeterd check`. Run says what is well, or returns what is not with the way out.
type check struct {
	name string
	run  func(context.Context, *configs.Config) (string, error)
}

func checks() []check {
	return []check{
		{"keys", checkKeys},
		{"certificates", checkCertificates},
		{"state", checkState},
	}
}

// line is what check prints of one thing.
type line struct {
	status string // ok, warning, problem
	name   string
	text   string
}

// found makes a line of what was found out.
func found(name, text string, err error) line {
	if err != nil {
		return line{"problem", name, err.Error()}
	}
	return line{"ok", name, text}
}

func newCheckCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "check",
		Short: "Say what is wrong with configuration, keys, this host and its kernel",
		Long: `Examples:
  perimeterd check
  perimeterd check --config /tmp/new.toml    before it goes live

Whether the kernel can do its part is tried by doing it, in a network namespace of its own, with knocks that it sends itself;
that takes root and a second or two. The running daemon and the host's traffic are not touched.

Exit status, for monitors: 0 all is well, 1 something is not, 2 the configuration is wrong.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := loadConfig(cmd)
			if err != nil {
				return err
			}
			out := cmd.OutOrStdout()
			fmt.Fprintf(out, "ok       configuration: %s\n", c.File)
			problems := 0
			show := func(lines ...line) {
				for _, l := range lines {
					if l.status == "problem" {
						problems++
					}
					fmt.Fprintf(out, "%-8s %s: %s\n", l.status, l.name, l.text)
				}
			}
			for _, k := range checks() {
				text, err := k.run(cmd.Context(), c)
				show(found(k.name, text, err))
			}
			show(checkExternal(c)...)
			show(checkHost(cmd.Context(), c)...)
			for _, a := range firewall.CheckKernel(cmd.Context(), c.Firewall) {
				show(found("kernel, "+a.Name, a.Text, a.Err))
			}
			if problems > 0 {
				return fmt.Errorf("problems: %d, see above", problems)
			}
			return nil
		},
	}
}

func checkKeys(ctx context.Context, c *configs.Config) (string, error) {
	id := c.Identity
	dir := filepath.Dir(id.Master)
	st, err := os.Stat(dir)
	if err != nil {
		return "", missing(err)
	}
	others := fs.FileMode(0o066) // who passes through sees nothing
	if _, gid, err := numbers(signerUser); err == nil && int(st.Sys().(*syscall.Stat_t).Gid) == gid {
		others = 0o026
	}
	if st.Mode().Perm()&others != 0 {
		return "", fmt.Errorf("%s has mode %04o: others may look in: chmod go-rw %s", dir, st.Mode().Perm(), dir)
	}
	for _, path := range []string{id.Key, id.Master, id.WireGuardKey, id.CAKey} {
		st, err := os.Stat(path)
		if path == id.CAKey && (id.External() || errors.Is(err, fs.ErrNotExist)) {
			continue // kept elsewhere, which is better
		}
		if err != nil {
			return "", missing(err)
		}
		if st.Mode().Perm()&0o077 != 0 {
			return "", fmt.Errorf("%s has mode %04o: others may read it: chmod 600 %s", path, st.Mode().Perm(), path)
		}
	}
	if err := checkSigner(id.CAKey); err != nil && !id.External() {
		return "", err
	}
	if err := checkDaemon(ctx, c); err != nil {
		return "", err
	}
	for _, path := range []string{id.Master, id.WireGuardKey} {
		if _, err := identity.ReadKey(path); err != nil {
			return "", missing(err)
		}
	}
	return dir + "/ is complete and private", nil
}

func missing(err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: `perimeterd init` makes it, a backup has it", err)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w: run it as root", err)
	}
	return err
}

func checkCertificates(_ context.Context, c *configs.Config) (string, error) {
	now := time.Now()
	authorities, err := identity.ReadCertificates(c.Identity.CA)
	if err != nil {
		return "", missing(err)
	}
	pair, err := tls.LoadX509KeyPair(c.Identity.Cert, c.Identity.Key)
	if err != nil {
		return "", missing(err)
	}
	roots := x509.NewCertPool()
	for _, a := range authorities {
		roots.AddCert(a)
	}
	id, err := identity.ReadServerID(c.Identity.ServerID)
	if err != nil {
		return "", missing(err)
	}
	host, _, err := net.SplitHostPort(c.Endpoint)
	if err != nil {
		return "", err
	}
	// Clients look for the server id; stock ones for the host.
	for _, name := range []string{hex.EncodeToString(id[:]), host} {
		_, err := pair.Leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: name, CurrentTime: now})
		if err != nil {
			return "", fmt.Errorf("%s as %s: %w%s", c.Identity.Cert, name, err, serverWay(c, hex.EncodeToString(id[:]), host))
		}
	}
	end := pair.Leaf.NotAfter
	for _, a := range authorities {
		if a.NotAfter.Before(end) {
			end = a.NotAfter
		}
	}
	if end.Before(now.Add(expiryWarning)) {
		return "", fmt.Errorf("one of %s and %s ends on %s: after that nobody comes in", c.Identity.CA, c.Identity.Cert, end.Format(time.DateOnly))
	}
	return "good until " + end.Local().Format(time.DateOnly), nil
}
