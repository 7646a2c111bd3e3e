package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"perimeterd/configs"
	"perimeterd/internal/identity"
)

// leastFree is how much room state_dir should have: a day of the log's worth, and a revocation always.
const leastFree = 64 << 20

// checkState reads the whole state, as it is at this moment, and looks whether it can go on.
func checkState(ctx context.Context, c *configs.Config) (string, error) {
	data, held, err := copyState(ctx, c, true)
	none := errors.Is(err, fs.ErrNotExist)
	if err != nil && !none {
		return "", err
	}
	daemon := "the daemon is not running"
	if held {
		daemon = "the daemon is running"
	}
	free, err := room(c.StateDir, held)
	if err != nil {
		return "", err
	}
	if none {
		return fmt.Sprintf("no file yet, %s; %s free", daemon, size(free)), nil
	}
	contents, err := identity.ReadContents(bytes.NewReader(data), int64(len(data)))
	if err != nil {
		return "", fmt.Errorf("state file %s: %w", c.StateFile(), err)
	}
	active, _, _ := contents.Count()
	return fmt.Sprintf("users: %d, %s; schema %d, %s, whole; %s free", active, daemon, contents.Schema, size(contents.Size), size(free)), nil
}

// room is how much may be written in a state directory, bytes. Whether an operator may write there is the daemon's matter where one
// runs.
func room(dir string, held bool) (int64, error) {
	for { // where it is not made yet, what it will be made in
		err := unix.Access(dir, unix.W_OK)
		if errors.Is(err, fs.ErrNotExist) && dir != filepath.Dir(dir) {
			dir = filepath.Dir(dir)
			continue
		}
		if err != nil && !(held && errors.Is(err, fs.ErrPermission) && os.Geteuid() != 0) {
			return 0, missing(&fs.PathError{Op: "write to", Path: dir, Err: err})
		}
		break
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, &fs.PathError{Op: "statfs", Path: dir, Err: err}
	}
	free := int64(st.Bavail) * st.Bsize
	if free < leastFree {
		return 0, fmt.Errorf("%s has %s free, less than %s: soon no session begins and no revocation is kept: make room", dir, size(free), size(leastFree))
	}
	return free, nil
}
