package backup

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
)

// Place is a file or directory that lies ready on the file system where it belongs.
type Place struct{ Ready, Path string }

// Swap puts all in their places, durably, or none. What is in the way goes into a new directory of that name beside it, 0700. The
// first place is emptied first and filled last, so that nothing is there while anything is half done.
func Swap(places []Place, aside string) (err error) {
	var undo []func() error
	defer func() {
		if err == nil {
			return
		}
		slices.Reverse(undo)
		for _, fn := range undo {
			err = errors.Join(err, fn())
		}
	}()
	move := func(from, to string) error {
		if err := syscall.Rename(from, to); err != nil { // os.Rename puts no directory in the place of an empty one
			return &os.LinkError{Op: "rename", Old: from, New: to, Err: err}
		}
		undo = append(undo, func() error { return os.Rename(to, from) })
		return nil
	}
	made := map[string]bool{}
	for _, p := range places {
		if there, err := InTheWay(p.Path); err != nil {
			return err
		} else if !there {
			continue
		}
		dir := filepath.Join(filepath.Dir(p.Path), aside)
		if !made[dir] {
			if err := os.Mkdir(dir, 0o700); err != nil {
				return err
			}
			made[dir] = true
			undo = append(undo, func() error { return os.Remove(dir) })
		}
		if err := move(p.Path, filepath.Join(dir, filepath.Base(p.Path))); err != nil {
			return err
		}
	}
	for _, p := range slices.Backward(places) {
		if err := move(p.Ready, p.Path); err != nil {
			return err
		}
	}
	for _, p := range places {
		if err := syncDir(filepath.Dir(p.Path)); err != nil {
			return err
		}
	}
	return nil
}

// InTheWay says whether something is at path that a Swap would move: anything but an empty directory.
func InTheWay(path string) (bool, error) {
	st, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil || !st.IsDir() {
		return true, err
	}
	list, err := os.ReadDir(path)
	return len(list) > 0, err
}

// WriteFile makes a file that was not there of an entry's content, durably, with mode and owner. Its error is of the medium, or of
// the content.
func (e Entry) WriteFile(path string, content io.Reader) (err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	n, err := io.Copy(f, content)
	if err == nil && n != e.Size {
		err = fmt.Errorf("%s: %d of %d bytes", e.Name, n, e.Size)
	}
	if err != nil {
		return err
	}
	if err := e.Own(path); err != nil {
		return err
	}
	return f.Sync()
}

// Own gives a path the entry's mode, and owner where this process may.
func (e Entry) Own(path string) error {
	if os.Geteuid() == 0 {
		uid, gid := e.owner()
		if err := os.Lchown(path, uid, gid); err != nil {
			return err
		}
	}
	return os.Chmod(path, e.Mode) // after the owner, whose change takes bits away
}

// owner goes by name, since numbers differ between hosts. A name that is not known here is root's.
func (e Entry) owner() (uid, gid int) {
	uid, gid = e.UID, e.GID
	if e.Owner != "" {
		uid = 0
		if u, err := user.Lookup(e.Owner); err == nil {
			uid, _ = strconv.Atoi(u.Uid)
		}
	}
	if e.Group != "" {
		gid = 0
		if g, err := user.LookupGroup(e.Group); err == nil {
			gid, _ = strconv.Atoi(g.Gid)
		}
	}
	return uid, gid
}

// Unknown are the owners of entries whom this host does not know, so that root gets what was theirs.
func (m *Manifest) Unknown() (names []string) {
	for _, e := range m.Entries {
		if e.Owner != "" {
			if _, err := user.Lookup(e.Owner); err != nil && !slices.Contains(names, e.Owner) {
				names = append(names, e.Owner)
			}
		}
	}
	return names
}

// NewEntry describes what lies at a path, or where its link leads.
func NewEntry(name, path string) (Entry, error) {
	st, err := os.Stat(path)
	if err != nil {
		return Entry{}, err
	}
	e := Entry{Name: name, Dir: st.IsDir(), Mode: st.Mode().Perm()}
	switch {
	case st.Mode().IsRegular():
		e.Size = st.Size()
	case !e.Dir:
		return Entry{}, fmt.Errorf("%s is neither a file nor a directory, but %v: move it elsewhere", path, st.Mode().Type())
	}
	if owner, ok := st.Sys().(*syscall.Stat_t); ok {
		e.UID, e.GID = int(owner.Uid), int(owner.Gid)
		if u, err := user.LookupId(strconv.Itoa(e.UID)); err == nil {
			e.Owner = u.Username
		}
		if g, err := user.LookupGroupId(strconv.Itoa(e.GID)); err == nil {
			e.Group = g.Name
		}
	}
	return e, nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
