//go:build linux

package lab

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Cmd is an exec.Cmd that starts inside a namespace. It sees the namespace's own resolv.conf, hosts and nsswitch.conf in
// /etc, and its own /sys, as under `ip netns exec`. It leads a process group, which dies when its context ends or
// the lab closes; if the lab's process dies first, the kernel kills it.
//
// A type of its own, since processes must start on a thread that outlives them: the kernel's death signal for a child
// follows the thread that made it, not the process.
type Cmd struct {
	*exec.Cmd
	ns   *Namespace
	wait sync.Once
	err  error
}

// Command prepares a process to run inside the namespace. SysProcAttr may be given a Credential; Setpgid and Pdeathsig are set.
func (n *Namespace) Command(ctx context.Context, name string, args ...string) *Cmd {
	c := &Cmd{Cmd: exec.CommandContext(ctx, name, args...), ns: n}
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	c.Cancel = c.kill
	// A grandchild that keeps the output open must not keep Wait from returning.
	c.WaitDelay = 2 * time.Second
	return c
}

func (c *Cmd) kill() error {
	if err := syscall.Kill(-c.Process.Pid, syscall.SIGKILL); err != nil {
		return os.ErrProcessDone
	}
	return nil
}

// Start is exec.Cmd.Start, inside.
func (c *Cmd) Start() (err error) {
	if c.Dir == "" {
		// The starting thread has the working directory of the time when the lab began.
		if c.Dir, err = os.Getwd(); err != nil {
			return err
		}
	}
	started := make(chan error, 1)
	select {
	case c.ns.spawn <- func() { started <- c.ns.start(c) }:
		return <-started
	case <-c.ns.quit:
		return fmt.Errorf("start %s: namespace %s is closed", c.Path, c.ns.Name)
	}
}

func (n *Namespace) start(c *Cmd) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.commands == nil {
		return fmt.Errorf("start %s: namespace %s is closed", c.Path, n.Name)
	}
	if err := c.Cmd.Start(); err != nil {
		return err
	}
	n.commands[c] = struct{}{}
	return nil
}

// Wait is exec.Cmd.Wait, and may be called more than once: Close reaps what nobody waited for.
func (c *Cmd) Wait() error {
	if c.Process == nil {
		return fmt.Errorf("wait for %s: it was not started", c.Path)
	}
	c.wait.Do(func() {
		c.err = c.Cmd.Wait()
		c.ns.mu.Lock()
		delete(c.ns.commands, c)
		c.ns.mu.Unlock()
	})
	return c.err
}

// Run starts the command and waits for it.
func (c *Cmd) Run() error {
	if err := c.Start(); err != nil {
		return err
	}
	return c.Wait()
}

// Output runs the command and returns its standard output; what it wrote to standard error is in the error.
func (c *Cmd) Output() ([]byte, error) {
	var out, complaint bytes.Buffer
	c.Stdout = &out
	if c.Stderr == nil {
		c.Stderr = &complaint
	}
	err := c.Run()
	if err != nil && complaint.Len() > 0 {
		err = fmt.Errorf("%w: %s", err, bytes.TrimSpace(complaint.Bytes()))
	}
	return out.Bytes(), err
}

// CombinedOutput runs the command and returns standard output and standard error together.
func (c *Cmd) CombinedOutput() ([]byte, error) {
	var out bytes.Buffer
	c.Stdout, c.Stderr = &out, &out
	err := c.Run()
	return out.Bytes(), err
}

// startSpawner makes the thread that starts this namespace's processes. They inherit its network namespace and its
// mount namespace, where the files of etc lie over those of /etc.
func (n *Namespace) startSpawner(etc string) error {
	ready := make(chan error, 1)
	go func() {
		defer close(n.ended)
		// onOwnThread keeps clear of the first thread and lets this one die at the end.
		o := onOwnThread(func() error {
			if err := n.enter(); err != nil {
				return err
			}
			if err := mountOver(etc); err != nil {
				return fmt.Errorf("mounts of %s: %w", n.Name, err)
			}
			ready <- nil
			for {
				select {
				case job := <-n.spawn:
					job()
				case <-n.quit:
					return nil
				}
			}
		})
		if o.panicked != "" {
			panic(o.panicked)
		}
		if o.err != nil {
			ready <- o.err
		}
	}()
	return <-ready
}

// mountOver gives the calling thread, which must be locked, a mount namespace of its own with its network's /sys and each file
// of dir over the one of that name in /etc.
func mountOver(dir string) error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return os.NewSyscallError("unshare", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return os.NewSyscallError("make mounts private", err)
	}
	if err := unix.Mount("lab", "/sys", "sysfs", 0, ""); err != nil {
		return os.NewSyscallError("mount /sys", err)
	}
	files, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, f := range files {
		from, to := filepath.Join(dir, f.Name()), filepath.Join("/etc", f.Name())
		if err := unix.Mount(from, to, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("bind %s over %s (it must exist on this machine): %w", from, to, err)
		}
	}
	return nil
}

// stop kills and reaps the namespace's processes and ends the thread that starts them.
func (n *Namespace) stop() error {
	n.mu.Lock()
	running := n.commands
	n.commands = nil
	n.mu.Unlock()
	for c := range running {
		c.kill()
	}
	err := killInside(n.Name)
	for c := range running {
		c.Wait()
	}
	close(n.quit)
	<-n.ended
	return err
}
