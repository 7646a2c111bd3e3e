//go:build linux

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"perimeterd/internal/lab"
)

// holder is a process that holds silent tunnels at a proxy: both ends of more than this one could, beside its own, have open.
type holder struct {
	cmd  *lab.Cmd
	in   io.WriteCloser
	said *json.Decoder
}

// wanted is what a holder is told, and held so far what it says.
type (
	wanted struct {
		Caller caller
		Count  int
	}
	said struct {
		Tunnels int
		Failed  string // why there are not more, or what became of the silent ones
	}
)

// holder starts one. It has the origin's socket from here, and is else in the namespace of the clients.
func (r *room) holder(ctx context.Context, c *contender, thread, count int) (*holder, error) {
	k, ns, err := r.caller(c, cloudName, thread)
	if err != nil {
		return nil, err
	}
	text, err := json.Marshal(wanted{*k, count})
	if err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	own, err := unix.FcntlInt(uintptr(k.origin), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	origin := os.NewFile(uintptr(own), "origin")
	defer origin.Close()
	h := &holder{cmd: ns.Command(context.WithoutCancel(ctx), self, "-holder", string(text))}
	h.cmd.Stderr, h.cmd.ExtraFiles = os.Stderr, []*os.File{origin}
	if h.in, err = h.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := h.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	h.said = json.NewDecoder(out)
	return h, h.cmd.Start()
}

// hear waits for what it says next.
func (h *holder) hear() (s said, err error) { return s, h.said.Decode(&s) }

// use has each of its tunnels used once more.
func (h *holder) use() (said, error) {
	if _, err := io.WriteString(h.in, "\n"); err != nil {
		return said{}, err
	}
	return h.hear()
}

// close ends it, and its tunnels. It may be called more than once.
func (h *holder) close() {
	h.in.Close()
	h.cmd.Wait()
}

// hold is what a holder does: it opens tunnels, says how many, uses each when it is told to, and ends with its input.
func hold(text string, in io.Reader, out io.Writer) error {
	var w wanted
	if err := json.Unmarshal([]byte(text), &w); err != nil {
		return err
	}
	if _, err := raiseFiles(); err != nil {
		return err
	}
	k := &w.Caller
	k.origin = 3 // of exec.Cmd's ExtraFiles
	if err := k.prepare(); err != nil {
		return err
	}
	type ends struct{ client, server int }
	var open []ends
	s := said{}
	for len(open) < w.Count {
		client, server, err := k.open()
		if err != nil {
			s.Failed = err.Error()
			break
		}
		open = append(open, ends{client, server})
	}
	s.Tunnels = len(open)
	if err := json.NewEncoder(out).Encode(s); err != nil {
		return err
	}
	if n, err := in.Read(make([]byte, 1)); n == 0 {
		if err == io.EOF { // they are to be closed unused
			err = nil
		}
		return err
	}
	s = said{}
	for _, e := range open {
		if err := exchange(e.client, e.server, make([]byte, message), message); err != nil {
			s.Failed = err.Error()
			break
		}
		s.Tunnels++
	}
	if err := json.NewEncoder(out).Encode(s); err != nil {
		return err
	}
	if s.Failed != "" {
		fmt.Fprintln(os.Stderr, "holder:", s.Failed)
	}
	// The servers close first, as in all that is measured.
	for _, e := range open {
		unix.Close(e.server)
	}
	_, err := io.Copy(io.Discard, in)
	return err
}
