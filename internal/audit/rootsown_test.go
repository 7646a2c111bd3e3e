package audit

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestRootIsLedNowhereByWhoOwnsTheState(t *testing.T) {
	name := makeName(1, dayOf(began0)).name
	for what, c := range map[string]struct {
		spoil func(dir, elsewhere string) error
		want  string
	}{
		"the directory a link":   {func(dir, elsewhere string) error { return os.Symlink(elsewhere, dir) }, "links are not followed"},
		"the directory a file":   {func(dir, _ string) error { return os.WriteFile(dir, nil, 0o600) }, "links are not followed"},
		"the directory a pipe":   {func(dir, _ string) error { return syscall.Mkfifo(dir, 0o600) }, "links are not followed"},
		"a stranger's directory": {func(dir, _ string) error { return errors.Join(os.Mkdir(dir, 0o700), os.Chown(dir, 65533, -1)) }, "belongs to the user 65533: want root, or 65534"},
		"a file a link": {func(dir, elsewhere string) error {
			return errors.Join(os.Mkdir(dir, 0o700), os.Symlink(filepath.Join(elsewhere, name), filepath.Join(dir, name)))
		}, name + " is no plain file, and links are not followed"},
		"a file a pipe": {func(dir, _ string) error {
			return errors.Join(os.Mkdir(dir, 0o700), syscall.Mkfifo(filepath.Join(dir, name), 0o600))
		}, name + " is no plain file"},
	} {
		state, elsewhere := t.TempDir(), t.TempDir()
		write(t, elsewhere, Options{}, began0, "alice")
		before, err := os.ReadFile(filepath.Join(elsewhere, name))
		if err != nil {
			t.Fatal(err)
		}
		dir := filepath.Join(state, "audit")
		if err := errors.Join(os.Chown(state, 65534, -1), c.spoil(dir, elsewhere)); err != nil {
			t.Fatal(err)
		}
		w, err := OpenWriter(dir, Options{Reserved: 1})
		if err == nil {
			w.Close()
		}
		if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), dir) {
			t.Errorf("%s: %v", what, err)
		}
		if after, err := os.ReadFile(filepath.Join(elsewhere, name)); err != nil || string(after) != string(before) {
			t.Errorf("%s: the file elsewhere changed: %v", what, err)
		}
	}
}

func TestADirectoryThatIsSwappedLaterLeadsRootNowhere(t *testing.T) {
	state, elsewhere := t.TempDir(), t.TempDir()
	if err := os.Chown(state, 65534, 65534); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(state, "audit")
	w := openWriter(t, dir, Options{})
	if err := errors.Join(os.Rename(dir, dir+"-away"), os.Symlink(elsewhere, dir)); err != nil {
		t.Fatal(err)
	}
	if err := w.Append(began0, Record{Time: began0, Kind: SessionBegan, User: "alice"}); err != nil {
		t.Fatal(err)
	}
	if err := w.Sync(); err == nil || !strings.Contains(err.Error(), "somebody removed or replaced it") {
		t.Error(err)
	}
	if err := w.Turn(began0.Add(24 * time.Hour)); err == nil {
		t.Error("it goes on")
	}
	if there, err := os.ReadDir(elsewhere); err != nil || len(there) > 0 {
		t.Errorf("elsewhere lies %v %v", there, err)
	}
	for _, path := range []string{dir + "-away", filepath.Join(dir+"-away", w.file.name)} {
		st, err := os.Lstat(path)
		if err != nil {
			t.Fatal(err)
		}
		if s := st.Sys().(*syscall.Stat_t); s.Uid != 65534 || s.Gid != 65534 {
			t.Errorf("%s is of %d:%d, want the owner of the state", path, s.Uid, s.Gid)
		}
	}
}
