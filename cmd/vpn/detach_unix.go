//go:build unix

package main

import (
	"os/exec"
	"syscall"
)

// detach gives a command a session of its own: the terminal's end and its signals are not for it.
func detach(cmd *exec.Cmd) { cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} }
