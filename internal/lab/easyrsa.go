//go:build linux

package lab

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// EasyRSA is a certificate authority as OpenVPN's administrators have it: Debian's easy-rsa in a directory of its own.
type EasyRSA struct {
	Dir string // PKI is below it

	settings []string
}

// NewEasyRSA makes an authority below dir. Settings are variables of easy-rsa, as in EASYRSA_ALGO=ec.
func NewEasyRSA(ctx context.Context, dir string, settings ...string) (*EasyRSA, error) {
	e := &EasyRSA{Dir: filepath.Join(dir, "easy-rsa"), settings: settings}
	if out, err := exec.CommandContext(ctx, "make-cadir", e.Dir).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("make-cadir %s: %w\n%s", e.Dir, err, out)
	}
	for _, args := range [][]string{{"init-pki"}, {"--req-cn=Example VPN CA", "build-ca", "nopass"}} {
		if err := e.Run(ctx, args...); err != nil {
			return nil, err
		}
	}
	return e, nil
}

// Run runs a command of easyrsa, which asks nothing.
func (e *EasyRSA) Run(ctx context.Context, args ...string) error {
	c := exec.CommandContext(ctx, "./easyrsa", append([]string{"--batch"}, args...)...)
	c.Dir = e.Dir
	c.Env = append(os.Environ(), e.settings...)
	if out, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("easyrsa %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}

// Path is of a file in its PKI, such as issued/alice.crt, private/alice.key, ca.crt or crl.pem.
func (e *EasyRSA) Path(file string) string { return filepath.Join(e.Dir, "pki", file) }
