package client

import (
	"errors"
	"os"

	"golang.org/x/sys/windows"
)

// checkPrivate: %AppData% is its owner's alone by inheritance.
func checkPrivate(*os.File) error { return nil }

// syncDir: NTFS journals a rename by itself.
func syncDir(string) error { return nil }

// errLocked: someone else holds the lock.
var errLocked = errors.New("locked")

// lockFile takes the file; the system releases it when the process dies, however it dies.
func lockFile(f *os.File, wait bool) error {
	how := uint32(windows.LOCKFILE_EXCLUSIVE_LOCK)
	if !wait {
		how |= windows.LOCKFILE_FAIL_IMMEDIATELY
	}
	err := windows.LockFileEx(windows.Handle(f.Fd()), how, 0, 1, 0,
		&windows.Overlapped{OffsetHigh: 1}) // past the content: a lock here forbids reading
	if err == windows.ERROR_LOCK_VIOLATION {
		return errLocked
	}
	return err
}
