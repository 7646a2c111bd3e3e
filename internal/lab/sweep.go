//go:build linux

package lab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const ownRun = "/run"

// A lab's name, at the start of everything it makes: owner's PID, then a number.
var labName = regexp.MustCompile(`^perimeter-lab-([0-9]{1,9})-[0-9]{1,9}(-|$)`)

// claim takes a free name for a lab of this process by making its directory.
func claim() (name, dir string, err error) {
	for n := 1; ; n++ {
		name = fmt.Sprintf("perimeter-lab-%d-%d", os.Getpid(), n)
		dir = filepath.Join(ownRun, name)
		err = os.Mkdir(dir, 0o755)
		if errors.Is(err, os.ErrExist) {
			continue
		}
		if err != nil {
			return "", "", err
		}
		start, err := startOf(os.Getpid())
		if err != nil {
			return "", "", errors.Join(err, os.Remove(dir))
		}
		// A PID comes round again; with the time its process began, it does not.
		return name, dir, os.WriteFile(filepath.Join(dir, "owner"), []byte(start), 0o644)
	}
}

// sweep removes every lab whose owner is gone.
func sweep() error {
	dead := map[string]bool{}
	for _, dir := range []string{ownRun, namedSpaces, ownEtc} {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		for _, e := range entries {
			m := labName.FindStringSubmatch(e.Name())
			if m == nil {
				continue
			}
			name := strings.TrimSuffix(m[0], "-")
			if _, known := dead[name]; !known {
				pid, _ := strconv.Atoi(m[1]) // the pattern holds digits only
				dead[name] = !owns(pid, name)
			}
		}
	}
	var errs []error
	for name, gone := range dead {
		if gone {
			errs = append(errs, remove(name))
		}
	}
	return errors.Join(errs...)
}

// owns tells whether pid lives and is the process that made the lab.
func owns(pid int, name string) bool {
	start, err := startOf(pid)
	if err != nil {
		return false
	}
	recorded, err := os.ReadFile(filepath.Join(ownRun, name, "owner"))
	// Not recorded yet, or no longer: its owner is at work.
	return err != nil || len(recorded) == 0 || string(recorded) == start
}

// startOf gives the time since boot at which a process began, in clock ticks; an error if it does not live (proc(5), field 22).
func startOf(pid int) (string, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", err
	}
	// The name in parentheses may hold spaces and parentheses itself.
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	if len(fields) < 20 || strings.Contains("ZX", fields[0]) {
		return "", fmt.Errorf("process %d is dead", pid)
	}
	return fields[19], nil
}

// remove removes all that carries a lab's name, and kills who is inside. What someone else removes meanwhile is no error.
func remove(name string) error {
	var errs []error
	spaces, err := filepath.Glob(filepath.Join(namedSpaces, name+"-*"))
	errs = append(errs, err)
	for _, path := range spaces {
		errs = append(errs, killInside(filepath.Base(path)))
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && err != unix.EINVAL && err != unix.ENOENT {
			errs = append(errs, fmt.Errorf("unmount %s: %w", path, err))
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	etcs, err := filepath.Glob(filepath.Join(ownEtc, name+"-*"))
	errs = append(errs, err)
	for _, dir := range append(etcs, filepath.Join(ownRun, name)) {
		errs = append(errs, os.RemoveAll(dir))
	}
	return errors.Join(errs...)
}

// killInside kills every process in a named network namespace until there is none, for at most 5 s.
func killInside(name string) error {
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(2 * time.Millisecond) {
		pids, err := inside(name)
		if err != nil || len(pids) == 0 {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("namespace %s: processes %v outlive SIGKILL", name, pids)
		}
		for _, pid := range pids {
			p, err := os.FindProcess(pid) // by pidfd: who has this PID from here on is the one that is asked and killed
			if err != nil {
				continue
			}
			if again, err := inside(name, pid); err == nil && len(again) == 1 {
				p.Kill()
			}
			p.Release()
		}
	}
}

// inside lists which of the given processes (none given: of all) live in a named network namespace, this process aside.
func inside(name string, pids ...int) ([]int, error) {
	var ns unix.Stat_t
	if err := unix.Stat(filepath.Join(namedSpaces, name), &ns); err == unix.ENOENT {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("stat %s: %w", name, err)
	}
	if pids == nil {
		procs, err := os.ReadDir("/proc")
		if err != nil {
			return nil, err
		}
		for _, p := range procs {
			if pid, err := strconv.Atoi(p.Name()); err == nil {
				pids = append(pids, pid)
			}
		}
	}
	var in []int
	for _, pid := range pids {
		var st unix.Stat_t
		// A dead process, reaped or not, has no namespace any more.
		err := unix.Stat(fmt.Sprintf("/proc/%d/ns/net", pid), &st)
		if err == nil && st.Dev == ns.Dev && st.Ino == ns.Ino && pid != os.Getpid() {
			in = append(in, pid)
		}
	}
	return in, nil
}
