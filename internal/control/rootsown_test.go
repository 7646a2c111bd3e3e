package control

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestRootMakesNoSocketWhereOthersMaySwapIt(t *testing.T) {
	for name, spoil := range map[string]func(dir string) error{
		"another's directory":   func(dir string) error { return os.Chown(dir, 65534, -1) },
		"a group's directory":   func(dir string) error { return os.Chmod(dir, 0o775) },
		"everybody's directory": func(dir string) error { return os.Chmod(dir, 0o777|os.ModeSticky) },
		"a link": func(dir string) error {
			return os.Rename(dir, dir+"-real")
		},
	} {
		dir := filepath.Join(t.TempDir(), "run")
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := spoil(dir); err != nil {
			t.Fatal(err)
		}
		if name == "a link" {
			if err := os.Symlink(dir+"-real", dir); err != nil {
				t.Fatal(err)
			}
		}
		ln, err := Listen("unix", filepath.Join(dir, "s"))
		if err == nil {
			ln.Close()
		}
		if err == nil || !strings.Contains(err.Error(), dir+" is ") || !strings.Contains(err.Error(), "root makes no socket where others may write") {
			t.Errorf("%s: %v", name, err)
		}
		if entries, _ := os.ReadDir(dir); len(entries) > 0 {
			t.Errorf("%s: it left %v", name, entries)
		}
	}
}

func TestAUserMakesSocketsInHisOwnDirectory(t *testing.T) {
	top, err := os.MkdirTemp("", "control-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(top) })
	dir := filepath.Join(top, "run")
	for _, err := range []error{os.Chmod(top, 0o755), os.Mkdir(dir, 0o755), os.Chown(dir, 65534, 65534)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread is another user's now
		if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), 65534, ^uintptr(0)); e != 0 {
			done <- e
			return
		}
		// Of a group that is on no host, since he is no member of the daemon's.
		ln, err := listen("unix", filepath.Join(dir, "s"), "no such group")
		if err == nil {
			err = ln.Close()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
