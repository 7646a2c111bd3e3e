//go:build linux

package main

import (
	"fmt"
	"io"
)

// file is one of the payload's, in the machine.
type file struct {
	name string
	mode uint32 // permissions
	data []byte
}

// archive writes what the kernel takes as its initial file system: cpio's newc, with all files root's
// (linux: Documentation/driver-api/early-userspace/buffer-format.rst).
type archive struct {
	w    io.Writer
	size int
	ino  uint32
	err  error
}

func (a *archive) add(name string, mode uint32, data []byte) {
	a.ino++
	a.write(fmt.Appendf(nil, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		a.ino, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0, name))
	a.write(data)
}

// write pads to 4 bytes, as header and data must be.
func (a *archive) write(b []byte) {
	for _, part := range [][]byte{b, make([]byte, -(a.size+len(b))&3)} {
		if a.err == nil {
			_, a.err = a.w.Write(part)
		}
		a.size += len(part)
	}
}

func (a *archive) end() error {
	a.add("TRAILER!!!", 0, nil)
	return a.err
}
