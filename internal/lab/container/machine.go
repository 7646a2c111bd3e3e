//go:build linux

package container

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"
)

// machine is a Debian with systemd, in the place of the lab's bastion.
type machine interface {
	// Start boots it, and returns when it is up.
	Start(ctx context.Context) error
	// Run runs a command there as root, and returns all that it printed.
	Run(ctx context.Context, name string, args ...string) ([]byte, error)
	// Copy puts a file of this host into root's home there.
	Copy(ctx context.Context, path string) error
	// Stop takes its power away: nothing in it ends in order, and what its kernel held is gone.
	Stop() error
	// Remove takes its files away, too.
	Remove() error
}

// environment is that of commands in a machine.
var environment = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C.UTF-8", "DEBIAN_FRONTEND=noninteractive"}

// isUp is no error once systemd has started all. Failed units are the tests' to judge.
func isUp(ctx context.Context, m machine) error {
	out, _ := m.Run(ctx, "systemctl", "is-system-running")
	if !bytes.Contains(out, []byte("running")) && !bytes.Contains(out, []byte("degraded")) {
		return fmt.Errorf("systemd is %q", bytes.TrimSpace(out))
	}
	return nil
}

// fatal is an error after which waiting is no use.
type fatal struct{ error }

// eventually tries until it is well, or three minutes have passed: a machine may be emulated.
func eventually(ctx context.Context, what string, try func() error) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	for {
		err := try()
		var f fatal
		switch {
		case err == nil:
			return nil
		case errors.As(err, &f):
			return fmt.Errorf("%s: %w", what, err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("not in time: %s: %w", what, err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}
