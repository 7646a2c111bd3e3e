package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"perimeterd/configs"
	"perimeterd/internal/control"
	"perimeterd/internal/signer"
)

// signerUser owns the CA key, and daemonUser is whom the daemon runs as, where the package made them.
const (
	signerUser = "perimeterd-signer"
	daemonUser = "perimeterd"
)

// pairFD is where a signer that a process of ours started finds its end of the socket pair.
const pairFD = 3

func newSignerCommand() *cobra.Command {
	var ca, key string
	var pair, renewals, quiet bool
	cmd := &cobra.Command{
		Use:   "signer",
		Short: "Hold the CA key, and sign for root and the daemon what each may have signed",
		Long: `Examples:
  perimeterd signer                                          on the socket that systemd passes, else on run_dir/signer.sock
  perimeterd signer --ca pki/ca.crt --ca-key pki/ca.key      without a configuration file

It becomes the user who owns the CA key. Root may have it issue certificates; the daemon's user only renewals, which it
judges by its own record, pki/` + signer.Renewable + `. As a rule nobody starts it by hand: the service is started by its socket, and where there
is none, the commands and the daemon start one of their own.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			socket := ""
			if ca == "" || key == "" {
				c, err := loadConfig(cmd)
				if err != nil {
					return err
				}
				ca, key, socket = c.Identity.CA, c.Identity.CAKey, c.SignerSocket()
				if c.Identity.External() {
					return usageError{errExternal}
				}
			}
			log := slog.New(slog.NewJSONHandler(os.Stderr, nil))
			if quiet {
				log = slog.New(slog.DiscardHandler)
			}
			s, err := signer.Open(ca, key, log, time.Now)
			if err != nil {
				return err
			}
			defer s.Close()
			signal.Ignore(syscall.SIGHUP) // the daemon's, sent to every process of its name
			if pair {
				return servePair(s, renewals)
			}
			return serveSocket(cmd.Context(), s, socket)
		},
	}
	cmd.Flags().StringVar(&ca, "ca", "", "the CA's certificates, `FILE` (default: the configuration's)")
	cmd.Flags().StringVar(&key, "ca-key", "", "its key, `FILE`")
	cmd.Flags().BoolVar(&pair, "pair", false, "")
	cmd.Flags().BoolVar(&renewals, "renewals", false, "")
	cmd.Flags().BoolVar(&quiet, "quiet", false, "")
	for _, own := range []string{"pair", "renewals", "quiet"} {
		cmd.Flags().Lookup(own).Hidden = true
	}
	return cmd
}

func servePair(s *signer.Signer, renewals bool) error {
	file := os.NewFile(pairFD, "pair")
	c, err := net.FileConn(file)
	if err != nil {
		return fmt.Errorf("--pair: %w: only a process of ours starts it so", err)
	}
	defer c.Close()
	file.Close()
	pair, ok := c.(*net.UnixConn)
	if !ok {
		return fmt.Errorf("--pair: a %T: want a unix socket", c)
	}
	if err := s.Become(); err != nil {
		return err
	}
	may := signer.Everything
	if renewals {
		may = signer.Renewals
	}
	return s.ServeOne(pair, may)
}

func serveSocket(ctx context.Context, s *signer.Signer, path string) error {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	passed, err := activation.Listeners()
	if err != nil {
		return err
	}
	var ln net.Listener
	switch {
	case len(passed) > 1:
		return fmt.Errorf("systemd passed %d sockets: want one", len(passed))
	case len(passed) == 1:
		ln = passed[0]
	case path == "":
		return usageError{errors.New("no socket: start it by systemd's, or without --ca and --ca-key, by a configuration with run_dir")}
	default:
		if ln, err = control.Listen("unixpacket", path); err != nil {
			return fmt.Errorf("signer socket %s: %w", path, err)
		}
		defer os.Remove(path)
	}
	listener, ok := ln.(*net.UnixListener)
	if !ok || listener.Addr().Network() != "unixpacket" {
		return fmt.Errorf("the socket is %s: want ListenSequentialPacket= of a path", ln.Addr().Network())
	}
	defer listener.Close()
	if err := s.Become(); err != nil {
		return err
	}
	return s.Serve(ctx, listener, signerRights)
}

// signerRights are what a user of this host may ask the signer for.
func signerRights(uid uint32) signer.Rights {
	if uid == 0 {
		return signer.Everything
	}
	if u, err := user.Lookup(daemonUser); err == nil && u.Uid == strconv.Itoa(int(uid)) {
		return signer.Renewals
	}
	return signer.Nothing
}

// isSigner says whether a user of this host may be the signer: root or systemd made it listen, or it did so itself.
func isSigner(uid uint32) bool {
	if uid == 0 || int(uid) == os.Geteuid() {
		return true
	}
	u, err := user.Lookup(signerUser)
	return err == nil && u.Uid == strconv.Itoa(int(uid))
}

// newSigner asks the signer's socket, or starts a signer where there is none.
func newSigner(c *configs.Config, args ...string) *signer.Client {
	return signer.NewClient(c.SignerSocket(), isSigner, func() (*exec.Cmd, error) {
		if c.Identity.External() {
			return nil, errExternal
		}
		// Here, since a signer that ends at its start cannot say why.
		if err := unix.Access(c.Identity.CAKey, unix.R_OK); errors.Is(err, fs.ErrPermission) {
			return nil, fmt.Errorf("%s: %w: issuing a certificate needs the CA key: run it as root", c.Identity.CAKey, err)
		}
		// This very program, also where a newer one lies in its place by now.
		cmd := exec.Command("/proc/self/exe", append([]string{"signer", "--pair", "--ca", c.Identity.CA, "--ca-key", c.Identity.CAKey}, args...)...)
		cmd.Args[0] = "perimeterd"
		cmd.Stderr = os.Stderr
		return cmd, nil
	})
}

// giveToSigner makes the signer's user the owner of what is the signer's alone, where the package made that user. He must
// open the directory, and the daemon pass through it; what else lies there has modes of its own.
func giveToSigner(key string) error {
	uid, gid, err := numbers(signerUser)
	if errors.Is(err, errNoUser) || err == nil && os.Geteuid() != 0 {
		return nil
	}
	if err != nil {
		return err
	}
	dir := filepath.Dir(key)
	return errors.Join(os.Chown(key, uid, gid), os.Chown(filepath.Join(dir, signer.Renewable), uid, gid), os.Chown(dir, -1, gid), os.Chmod(dir, 0o751))
}

// forget tells the signer of a revocation. The daemon does too: this is so that a gate which was taken over cannot keep it
// from the signer.
func forget(cmd *cobra.Command, us users, name, device string) {
	c, err := loadConfig(cmd)
	if err == nil && c.Identity.External() {
		return // nothing is renewed here
	}
	if err == nil {
		sign := newSigner(c, "--quiet")
		defer sign.Close()
		err = sign.Forget(cmd.Context(), name, device)
	}
	var refusal *signer.Refusal
	notOurs := errors.Is(err, fs.ErrPermission) || errors.As(err, &refusal) && refusal.Code == signer.Forbidden
	if _, remote := us.(*control.Client); err != nil && !(remote && notOurs) {
		stderrf("warning: %s is revoked, and the signer was not told: %v: run it again as root, or a gate that is taken over could renew the certificate", name, err)
	}
}

// checkSigner finds a CA key that is not the signer's, although the package made a user for him.
func checkSigner(key string) error {
	return checkOwner(signerUser, "only the signer should hold it", key, filepath.Join(filepath.Dir(key), signer.Renewable))
}
