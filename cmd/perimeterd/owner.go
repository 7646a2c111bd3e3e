package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"perimeterd/configs"
)

// errNoUser is of a host on which no package made the users.
var errNoUser = errors.New("no such user on this host")

// numbers are those of a user of the package. Errors: errNoUser.
func numbers(name string) (uid, gid int, err error) {
	u, err := user.Lookup(name)
	if err != nil {
		return 0, 0, fmt.Errorf("%s: %w", name, errNoUser)
	}
	if uid, err = strconv.Atoi(u.Uid); err != nil {
		return 0, 0, err
	}
	gid, err = strconv.Atoi(u.Gid)
	return uid, gid, err
}

// service is the daemon's user, to whom root gives what it makes for the service. Nil gives nothing away: where the package made
// no such user, or the configuration is not the service's, who runs the daemon is not known.
type service struct{ uid, gid int }

func serviceOf(config string) (*service, error) {
	uid, gid, err := numbers(daemonUser)
	if errors.Is(err, errNoUser) || err == nil && (config != configs.DefaultPath || os.Geteuid() != 0) {
		return nil, nil
	}
	return &service{uid, gid}, err
}

// own gives the service what nobody but the owner may read: keys, and the state. Certificates stay root's, so that a daemon which
// was taken over cannot change them.
func (s *service) own(path string) error {
	if s == nil {
		return nil
	}
	st, err := os.Lstat(path)
	if err != nil || st.Mode().Perm()&0o044 != 0 {
		return err
	}
	return os.Lchown(path, s.uid, s.gid)
}

// ownTree is own for a directory and all that is in it.
func (s *service) ownTree(dir string) error {
	return filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		return errors.Join(err, s.own(path))
	})
}

// take makes a directory root's alone until it is given back. Whoever owns it could put a link in the place of what root makes there,
// and have root write, and give him, what is elsewhere. It changes nothing where this is not root, or the directory is root's.
func take(dir string) (giveBack func() error, err error) {
	f, err := os.OpenFile(dir, os.O_RDONLY|syscall.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	was := st.Sys().(*syscall.Stat_t)
	if os.Geteuid() != 0 || was.Uid == 0 {
		return f.Close, nil
	}
	return func() error {
		return errors.Join(f.Chmod(st.Mode().Perm()), f.Chown(int(was.Uid), int(was.Gid)), f.Close())
	}, errors.Join(f.Chown(0, 0), f.Chmod(0o700))
}

// read lets the service read the configuration, by its group.
func (s *service) read(config string) error {
	if s == nil {
		return nil
	}
	return os.Lchown(config, 0, s.gid)
}

// checkDaemon finds files that the service, which is another user's, cannot read. It is tried as that user: the way to a file
// may be shut, too.
func checkDaemon(ctx context.Context, c *configs.Config) error {
	service, err := serviceOf(c.File)
	if err != nil || service == nil {
		return err
	}
	args := []string{"-c", `for file; do [ ! -e "$file" ] || [ -r "$file" ] || echo "$file"; done`, "sh", c.File, c.StateFile()}
	for _, f := range c.Identity.Files() {
		if f.Path != "" && f.Key != "identity.ca_key" {
			args = append(args, f.Path)
		}
	}
	sh := exec.CommandContext(ctx, "/bin/sh", args...)
	sh.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(service.uid), Gid: uint32(service.gid)}}
	shut, err := sh.Output()
	if err != nil {
		return fmt.Errorf("look at the files as %s: %w", daemonUser, err)
	}
	if file, _, found := strings.Cut(string(shut), "\n"); found {
		return fmt.Errorf("%s: the service's user, %s, cannot read it: chown %[2]s %[1]s, where the directories above let him through", file, daemonUser)
	}
	return nil
}

// checkOwner finds files that are not those of a user whom the package made; why says what of it.
func checkOwner(name, why string, paths ...string) error {
	want, _, err := numbers(name)
	if errors.Is(err, errNoUser) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, path := range paths {
		st, err := os.Stat(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue // kept elsewhere
		}
		if err != nil {
			return missing(err)
		}
		if uid := int(st.Sys().(*syscall.Stat_t).Uid); uid != want {
			return fmt.Errorf("%s belongs to the user %d, and %s: chown %s %s", path, uid, why, name, path)
		}
	}
	return nil
}
