//go:build unix

package main

import (
	"os"
	"os/exec"
	"syscall"
)

// detach gives a command a session of its own: the terminal's end and its signals are not for it.
func detach(cmd *exec.Cmd) { cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} }

// newsFD is where the process in the background finds its pipe.
const newsFD = 3

func passNews(cmd *exec.Cmd, w *os.File) { cmd.ExtraFiles = []*os.File{w} }

func openNews() *os.File { return os.NewFile(newsFD, "news") }
