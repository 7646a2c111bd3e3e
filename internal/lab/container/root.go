//go:build linux

// Package container tests the Debian packages as they are installed: in a Debian of its own, with systemd as its first process, in the
// lab's bastion. `make test-container` builds the packages and runs it in a container, `make test-vm` in a virtual machine, with Debian's
// kernel, in the bastion's place; both as root.
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
const included = "systemd-sysv,nftables,iproute2,knockd,procps"

// What it does without, to be small.
var excluded = []string{"/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/info/*", "/usr/share/i18n/*", "/usr/lib/*/gconv/*"}

// prepareRoot unpacks a release of Debian below cache, or takes what is there from an earlier run.
func prepareRoot(ctx context.Context, cache, release string) (root string, err error) {
	return prepare(cache, release, included+strings.Join(excluded, ","), func(root string) error { return unpack(ctx, release, root, included) })
}

// prepare has what follows from release and recipe made below cache, or takes what is there from an earlier run.
func prepare(cache, release, recipe string, make func(path string) error) (path string, err error) {
	sum := sha256.Sum256([]byte(recipe))
	path = filepath.Join(cache, fmt.Sprintf("%s-%x", release, sum[:4]))
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		return path, err
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
	made := filepath.Join(tmp, "made")
	if err := make(made); err != nil {
		return "", err
	}
	stale, err := filepath.Glob(filepath.Join(cache, release+"-*"))
	for _, old := range stale { // of an older recipe
		err = errors.Join(err, os.RemoveAll(old))
	}
	return path, errors.Join(err, os.Rename(made, path))
}

// unpack installs a release of Debian, and the packages, which are separated by commas, into a directory that it makes.
func unpack(ctx context.Context, release, root, packages string, more ...string) error {
	args := []string{"--variant=minbase", "--include=" + packages, "--dpkgopt=force-unsafe-io", "--aptopt=APT::Install-Recommends \"false\""}
	for _, path := range excluded {
		args = append(args, "--dpkgopt=path-exclude="+path)
	}
	if out, err := exec.CommandContext(ctx, "mmdebstrap", append(append(args, more...), release, root)...).CombinedOutput(); err != nil {
		return fmt.Errorf("mmdebstrap %s: %w\n%s", release, err, out)
	}
	return nil
}
