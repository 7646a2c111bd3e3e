package main

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// stranger runs fn with a thread's file accesses as those of another user, who is not root.
func stranger(uid int, fn func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends with this goroutine
		unix.SetfsuidRetUid(uid)
		fn()
	}()
	<-done
}

// What root makes in the daemon's directory stays where it is made: the daemon's user, whose directory that is, once put links in its
// place.
func TestRestoreWritesThroughNoLinkOfTheDaemonsUser(t *testing.T) {
	const daemon = 65534
	dir, config := bastion(t)
	file, passphrase := pack(t, config, false, nil)
	state, elsewhere := filepath.Join(dir, "state"), t.TempDir()
	for d := state; d != os.TempDir(); d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chown(state, daemon, daemon); err != nil {
		t.Fatal(err)
	}
	before, err := os.Stat(elsewhere)
	if err != nil {
		t.Fatal(err)
	}
	stop, swapped := make(chan struct{}), 0
	attack := func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			list, _ := os.ReadDir(state)
			for _, e := range list {
				made := filepath.Join(state, e.Name())
				if strings.HasPrefix(e.Name(), ".restore-") && e.IsDir() && os.Rename(made, filepath.Join(state, "away-"+e.Name())) == nil && os.Symlink(elsewhere, made) == nil {
					swapped++
				}
			}
		}
	}
	ended := make(chan struct{})
	go func() { stranger(daemon, attack); close(ended) }()
	for range 5 {
		if err := restore(file, passphrase, dir, "--force"); err != nil {
			t.Error(err)
		}
		for _, at := range []string{dir, state} { // two of the same second would have one name
			replaced, _ := filepath.Glob(filepath.Join(at, "replaced-*"))
			for _, r := range replaced {
				os.RemoveAll(r)
			}
		}
	}
	close(stop)
	<-ended
	if after, err := os.Stat(elsewhere); err != nil || !after.ModTime().Equal(before.ModTime()) || swapped > 0 {
		t.Errorf("%d links were put; root wrote there: %v (%v)", swapped, err == nil && !after.ModTime().Equal(before.ModTime()), err)
	}
	st, err := os.Stat(state)
	if err != nil {
		t.Fatal(err)
	}
	if owner := st.Sys().(*syscall.Stat_t); owner.Uid != daemon || owner.Gid != daemon || st.Mode().Perm() != 0o755 {
		t.Errorf("the directory was given back as %v of %d:%d", st.Mode(), owner.Uid, owner.Gid)
	}
}
