//go:build linux

package container

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"perimeterd/internal/lab"
)

// container is a machine that systemd runs in a network namespace of the lab, on this host's kernel. Its files are a layer in memory over a root, mounted where
// nobody else sees it, so that nothing is left of it when this process ends, however it does.
type container struct {
	ns     *lab.Namespace
	root   string // where its files are mounted, for the thread below
	thread chan func()
	cgroup string // of its processes, a directory
	nspawn *exec.Cmd
	ended  chan struct{}
	out    journal
	leader int // its first process, as this host numbers it
}

// journal is what the machine says on its console.
type journal struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (j *journal) Write(b []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.text.Write(b)
}

func (j *journal) String() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.text.String()
}

// newContainer lays an empty layer over the root, which stays as it is. Dir is an empty directory.
func newContainer(root, dir string, ns *lab.Namespace) (*container, error) {
	// Version 2, alone or beside version 1. Without one of its own, two machines would share the test's.
	groups := "/sys/fs/cgroup"
	if _, err := os.Stat(groups + "/unified"); err == nil {
		groups += "/unified"
	}
	m := &container{ns: ns, root: filepath.Join(dir, "root"), thread: make(chan func()), cgroup: filepath.Join(groups, ns.Name)}
	if err := os.Mkdir(m.cgroup, 0o755); err != nil {
		return nil, err
	}
	ready := make(chan error, 1)
	go m.keep(func() error { return m.mount(root, dir) }, ready)
	return m, <-ready
}

// keep is a thread with mounts of its own, which starts the machine: the kernel kills that when the thread ends.
func (m *container) keep(mount func() error, ready chan<- error) {
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() { // this one outlives every goroutine: while it is held, the next is another
		done := make(chan struct{})
		go func() { defer close(done); m.keep(mount, ready) }()
		<-done
		runtime.UnlockOSThread()
		return
	}
	err := unix.Unshare(unix.CLONE_NEWNS)
	if err == nil {
		err = unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, "")
	}
	if err == nil {
		err = mount()
	}
	ready <- err
	for job := range m.thread {
		job()
	}
}

func (m *container) mount(root, dir string) error {
	if err := unix.Mount("container", dir, "tmpfs", 0, "mode=0755"); err != nil {
		return fmt.Errorf("tmpfs: %w", err)
	}
	for _, name := range []string{"root", "upper", "work"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			return err
		}
	}
	layers := fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%[2]s/work", root, dir)
	if err := unix.Mount("container", m.root, "overlay", 0, layers); err != nil {
		return fmt.Errorf("overlay: %w", err)
	}
	for name, text := range map[string]string{
		"etc/resolv.conf": "nameserver 198.19.1.2\noptions timeout:1 attempts:2\n", // the lab's
		// A container has no udev, whose rules are these (50-udev-default.rules).
		"etc/tmpfiles.d/tun.conf": "z /dev/net/tun 0666 root root -\n",
	} {
		if err := os.WriteFile(filepath.Join(m.root, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// Start boots it, and returns when it is up.
func (m *container) Start(ctx context.Context) error {
	m.nspawn = exec.Command("systemd-nspawn", "--quiet", "--boot", "--register=no", "--keep-unit", "--console=pipe", "--link-journal=no", "--resolv-conf=off",
		"--timezone=off", "--capability=CAP_NET_ADMIN", "--network-namespace-path=/run/netns/"+m.ns.Name, "--directory="+m.root, "--machine="+m.ns.Name)
	m.nspawn.Env = append(os.Environ(), "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1")
	m.nspawn.Stdout, m.nspawn.Stderr = &m.out, &m.out
	group, err := os.Open(m.cgroup)
	if err != nil {
		return err
	}
	defer group.Close()
	m.nspawn.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL, UseCgroupFD: true, CgroupFD: int(group.Fd())}
	started := make(chan error)
	m.thread <- func() { started <- m.nspawn.Start() }
	if err := <-started; err != nil {
		return err
	}
	ended := make(chan struct{})
	m.ended, m.leader = ended, 0
	go func() { m.nspawn.Wait(); close(ended) }()
	err = eventually(ctx, "the machine is up", func() error {
		select {
		case <-ended:
			return fatal{fmt.Errorf("systemd-nspawn ended: %v", m.nspawn.ProcessState)}
		default:
		}
		if m.leader == 0 {
			children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", m.nspawn.Process.Pid))
			if err != nil {
				return err
			}
			first, _, _ := strings.Cut(strings.TrimSpace(string(children)), " ")
			if m.leader, err = strconv.Atoi(first); err != nil {
				return fmt.Errorf("children %q", children)
			}
		}
		return isUp(ctx, m)
	})
	if err != nil {
		return fmt.Errorf("%w\n%s", errors.Join(err, m.Stop()), m.out.String())
	}
	return nil
}

// Run runs a command in it. It starts on the machine's thread: any other may have been a namespace's, ends, and takes it along.
func (m *container) Run(ctx context.Context, name string, args ...string) ([]byte, error) {
	c := exec.CommandContext(ctx, "nsenter", append([]string{"--target", strconv.Itoa(m.leader), "--all", "--", "env", "--chdir=/root", name}, args...)...)
	c.Env = environment
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	c.WaitDelay = 2 * time.Second
	var out bytes.Buffer
	c.Stdout, c.Stderr = &out, &out
	started := make(chan error)
	m.thread <- func() { started <- c.Start() }
	err := <-started
	if err == nil {
		err = c.Wait()
	}
	return out.Bytes(), err
}

// Copy puts a file of this host into root's home there.
func (m *container) Copy(_ context.Context, path string) error {
	from, err := os.Open(path)
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := os.Create(fmt.Sprintf("/proc/%d/root/root/%s", m.leader, filepath.Base(path)))
	if err != nil {
		return err
	}
	_, err = io.Copy(to, from)
	return errors.Join(err, to.Close())
}

// Stop takes its power away: nothing in it ends in order.
func (m *container) Stop() error {
	if m.ended == nil {
		return nil
	}
	if m.leader != 0 {
		_ = syscall.Kill(m.leader, syscall.SIGKILL) // its processes go with the first
	}
	select {
	case <-m.ended:
	case <-time.After(20 * time.Second):
		_ = m.nspawn.Process.Kill()
		<-m.ended
	}
	m.ended = nil
	// The network namespace is the lab's, and stays; a host without power has neither.
	for _, c := range [][]string{{"ip", "link", "delete", "perimeter0"}, {"nft", "flush", "ruleset"}} {
		if out, err := m.ns.Command(context.Background(), c[0], c[1:]...).CombinedOutput(); err != nil && !bytes.Contains(out, []byte("Cannot find device")) {
			return fmt.Errorf("%v: %w %s", c, err, out)
		}
	}
	return nil
}

// Remove takes its files away.
func (m *container) Remove() error {
	defer close(m.thread)
	err := m.Stop()
	os.Remove("/run/systemd/nspawn/propagate/" + m.ns.Name) // nspawn does not dare
	var groups []string
	for _, top := range []string{m.cgroup, "/sys/fs/cgroup/systemd/" + m.ns.Name} { // and where version 1 mirrors it
		e := filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				groups = append(groups, path)
			}
			return err
		})
		if !errors.Is(e, fs.ErrNotExist) {
			err = errors.Join(err, e)
		}
	}
	for _, g := range slices.Backward(groups) { // children first
		err = errors.Join(err, os.Remove(g))
	}
	return err
}
