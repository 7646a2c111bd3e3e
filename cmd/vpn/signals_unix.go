//go:build unix

package main

import (
	"os"
	"os/signal"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// passedSignals are those that a person or a supervisor sends to a command. Stopping is left to the system: it stops
// both, and the shell sees it.
var passedSignals = []os.Signal{unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2, unix.SIGALRM, unix.SIGWINCH}

// fromTerminal says whether the command has the signal already: the terminal sends these to its whole foreground group.
// A second interrupt means something else to many programs (terraform gives up at once).
func fromTerminal(sig os.Signal) bool {
	if sig != unix.SIGINT && sig != unix.SIGQUIT && sig != unix.SIGWINCH {
		return false
	}
	tty, err := unix.Open("/dev/tty", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(tty)
	foreground, err := unix.IoctlGetInt(tty, unix.TIOCGPGRP)
	return err == nil && foreground == unix.Getpgrp()
}

// dieLike ends as the command did: a shell tells a loop's interrupt by the signal that ended its command.
func dieLike(state *os.ProcessState) error {
	status := state.Sys().(syscall.WaitStatus)
	if !status.Signaled() {
		return exitStatus(status.ExitStatus())
	}
	sig := status.Signal()
	switch sig {
	case unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGKILL: // the others would write a trace or a core of ours
		signal.Reset(sig)
		unix.Kill(unix.Getpid(), sig)
		time.Sleep(100 * time.Millisecond) // it is delivered meanwhile
	}
	return exitStatus(128 + int(sig))
}
