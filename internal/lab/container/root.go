//go:build linux

// Package container tests the Debian packages as they are installed: in a Debian of its own, with systemd as its first process, in the
// lab's bastion. `make test-container` builds the packages and runs it as root.
package container

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// What the packages depend on lies ready, so that nothing is fetched while the tests run; knockd is for the client's diversion.
const included = "systemd-sysv,nftables,iproute2,knockd"

// What it does without, to be small.
var excluded = []string{"/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/info/*", "/usr/share/i18n/*", "/usr/lib/*/gconv/*"}

// prepareRoot unpacks a release of Debian below cache, or takes what is there from an earlier run.
func prepareRoot(ctx context.Context, cache, release string) (root string, err error) {
	recipe := sha256.Sum256([]byte(included + strings.Join(excluded, ",")))
	root = filepath.Join(cache, fmt.Sprintf("%s-%x", release, recipe[:4]))
	if _, err := os.Stat(root); !errors.Is(err, fs.ErrNotExist) {
		return root, err
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp(cache, "new-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	if err := os.Chmod(tmp, 0o755); err != nil {
		return "", err
	}
	args := []string{"--variant=minbase", "--include=" + included, "--dpkgopt=force-unsafe-io", "--aptopt=APT::Install-Recommends \"false\""}
	for _, path := range excluded {
		args = append(args, "--dpkgopt=path-exclude="+path)
	}
	made := filepath.Join(tmp, "root")
	if out, err := exec.CommandContext(ctx, "mmdebstrap", append(args, release, made)...).CombinedOutput(); err != nil {
		return "", fmt.Errorf("mmdebstrap %s: %w\n%s", release, err, out)
	}
	stale, err := filepath.Glob(filepath.Join(cache, release+"-*"))
	for _, old := range stale { // of an older recipe
		err = errors.Join(err, os.RemoveAll(old))
	}
	return root, errors.Join(err, os.Rename(made, root))
}
