package main

import (
	"os"
	"os/exec"
	"syscall"
)

// detach gives a command a process group of its own: Ctrl-C is not for it.
func detach(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{CreationFlags: syscall.CREATE_NEW_PROCESS_GROUP}
}

// passNews makes the pipe the standard output: Windows hands on no other descriptors.
func passNews(cmd *exec.Cmd, w *os.File) { cmd.Stdout = w }

func openNews() *os.File { return os.Stdout }
