package client

import (
	"errors"
	"fmt"
	"os"
	"os/user"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// BecomeInvoker makes a process that sudo started the invoking user's again, but for CAP_NET_ADMIN, which a tunnel needs:
// profiles, state and sockets are that user's, commands run as that user, and nothing is written as root where a user's
// link may lead elsewhere. It starts the program anew and returns only on error, or when there is nothing to do.
func BecomeInvoker() error {
	uid, err := strconv.Atoi(os.Getenv("SUDO_UID"))
	if os.Geteuid() != 0 || os.Getenv("SUDO_UID") == "" || err == nil && uid == 0 {
		return nil
	}
	bad := func(err error) error {
		return fmt.Errorf("SUDO_UID=%q: sudo's user is not found here: %w: run it as that user, with cap_net_admin on the program, "+
			"or as root without SUDO_UID", os.Getenv("SUDO_UID"), err)
	}
	if err != nil {
		return bad(err)
	}
	u, err := user.LookupId(strconv.Itoa(uid))
	if err != nil {
		return bad(err)
	}
	gid, err := strconv.Atoi(u.Gid)
	if err != nil {
		return bad(err)
	}
	groups := []int{gid}
	names, err := u.GroupIds()
	if err != nil {
		return bad(err)
	}
	for _, name := range names {
		if g, err := strconv.Atoi(name); err == nil && !slices.Contains(groups, g) {
			groups = append(groups, g)
		}
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	// The runtime directory of a login is not the tunnel's, and root's is closed to the user.
	env := slices.DeleteFunc(os.Environ(), func(e string) bool {
		name, _, _ := strings.Cut(e, "=")
		return slices.Contains([]string{"SUDO_UID", "SUDO_GID", "SUDO_USER", "SUDO_COMMAND", "XDG_RUNTIME_DIR"}, name)
	})
	env = environ(env, "HOME="+u.HomeDir, "USER="+u.Username, "LOGNAME="+u.Username)
	// Identity is a thread's, and the new program has that of the thread which starts it.
	runtime.LockOSThread()
	if err := become(uid, gid, groups); err != nil {
		return fmt.Errorf("from root to %s: %w", u.Username, err)
	}
	return fmt.Errorf("%s as %s: %w", self, u.Username, unix.Exec(self, os.Args, env))
}

// become gives this thread an identity, with one capability that outlives exec.
func become(uid, gid int, groups []int) error {
	if err := unix.Prctl(unix.PR_SET_KEEPCAPS, 1, 0, 0, 0); err != nil {
		return err
	}
	if err := errors.Join(syscall.Setgroups(groups), syscall.Setresgid(gid, gid, gid), syscall.Setresuid(uid, uid, uid)); err != nil {
		return err
	}
	have, err := capabilities()
	if err != nil {
		return err
	}
	admin := have[0].Permitted & (1 << unix.CAP_NET_ADMIN) // a container may have none: then the tunnel is rootless
	if err := setCapabilities(admin); err != nil || admin == 0 {
		return err
	}
	return unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, unix.CAP_NET_ADMIN, 0, 0)
}

func capabilities() (have [2]unix.CapUserData, err error) {
	if err = unix.Capget(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &have[0]); err != nil {
		err = fmt.Errorf("capabilities: %w", err)
	}
	return have, err
}

// setCapabilities leaves this thread these alone.
func setCapabilities(mask uint32) error {
	set := [2]unix.CapUserData{{Effective: mask, Permitted: mask, Inheritable: mask}}
	if err := unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &set[0]); err != nil {
		return fmt.Errorf("capabilities: %w", err)
	}
	return nil
}

// WithoutPrivilege calls start on a thread without the capabilities that the tunnel needs, so that a command started there
// has none. Root keeps its own.
func WithoutPrivilege(start func() error) error {
	if os.Geteuid() == 0 {
		return start()
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with this goroutine
		err := setCapabilities(0)
		if err == nil {
			err = start()
		}
		done <- err
	}()
	return <-done
}

// environ lays set over base.
func environ(base []string, set ...string) []string {
	out := slices.DeleteFunc(base, func(e string) bool {
		name, _, _ := strings.Cut(e, "=")
		return slices.ContainsFunc(set, func(s string) bool { return strings.HasPrefix(s, name+"=") })
	})
	return append(out, set...)
}
