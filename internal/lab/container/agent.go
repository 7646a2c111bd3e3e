//go:build linux

package container

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// agent is agent.sh in a virtual machine, at the end of a port that is no part of its network. Asked by a line and bytes,
//
//	run SIZE          the script of SIZE bytes that follows
//	put SIZE PATH     a file of SIZE bytes that follows
//
// it answers `STATUS SIZE` and SIZE bytes of output. It greets when it begins, `hello BOOT`, which is a name for each boot.
type agent struct {
	mu   sync.Mutex // one after the other
	conn net.Conn
	in   *bufio.Reader
	boot string
	err  error // of an exchange that was cut, after which nobody knows what the bytes are
}

func newAgent(conn net.Conn) *agent { return &agent{conn: conn, in: bufio.NewReaderSize(conn, 1<<16)} }

// hello waits for the greeting of another boot than the last one. A command that began it has no answer, or one without output.
func (a *agent) hello(ctx context.Context) error {
	return a.bounded(ctx, func() error {
		for {
			line, err := a.in.ReadString('\n')
			if err != nil {
				return err
			}
			if boot, ok := strings.CutPrefix(strings.TrimSpace(line), "hello "); ok && boot != a.boot {
				a.boot = boot
				return nil
			}
		}
	})
}

// bounded does one exchange, and ends what it waits for when ctx ends.
func (a *agent) bounded(ctx context.Context, fn func() error) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.err != nil {
		return a.err
	}
	stop := context.AfterFunc(ctx, func() { a.conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if a.err = fn(); a.err != nil {
		a.err = fmt.Errorf("agent: %w", errors.Join(a.err, ctx.Err()))
	}
	return a.err
}

// errStatus is of a command that failed.
type errStatus int

func (e errStatus) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

func (a *agent) say(question string, size int64, body io.Reader) error {
	_, err := fmt.Fprintln(a.conn, question)
	if err == nil {
		_, err = io.CopyN(a.conn, body, size)
	}
	return err
}

func (a *agent) ask(ctx context.Context, question string, size int64, body io.Reader) (out []byte, err error) {
	var status errStatus
	err = a.bounded(ctx, func() error {
		if err := a.say(question, size, body); err != nil {
			return err
		}
		line, err := a.in.ReadString('\n')
		if err != nil {
			return err
		}
		var n int
		if _, err := fmt.Sscanf(line, "%d %d", &status, &n); err != nil {
			return fmt.Errorf("answer %q: %w", line, err)
		}
		out = make([]byte, n)
		_, err = io.ReadFull(a.in, out)
		return err
	})
	if err == nil && status != 0 {
		err = status
	}
	return out, err
}

func (a *agent) run(ctx context.Context, name string, args ...string) ([]byte, error) {
	question, script := scriptOf(name, args...)
	return a.ask(ctx, question, int64(script.Len()), script)
}

// start does not wait for the end.
func (a *agent) start(ctx context.Context, name string, args ...string) error {
	question, script := scriptOf(name, args...)
	return a.bounded(ctx, func() error { return a.say(question, int64(script.Len()), script) })
}

func scriptOf(name string, args ...string) (question string, script *bytes.Buffer) {
	script = new(bytes.Buffer)
	fmt.Fprintln(script, "cd /root")
	for _, v := range environment {
		fmt.Fprintln(script, "export", quoted(v))
	}
	fmt.Fprint(script, "exec env ", quoted(name)) // env: what is not there says so, and ends with 127
	for _, arg := range args {
		fmt.Fprint(script, " ", quoted(arg))
	}
	return fmt.Sprint("run ", script.Len()), script
}

func quoted(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

func (a *agent) put(ctx context.Context, path string) error {
	from, err := os.Open(path)
	if err != nil {
		return err
	}
	defer from.Close()
	st, err := from.Stat()
	if err != nil {
		return err
	}
	_, err = a.ask(ctx, fmt.Sprintf("put %d /root/%s", st.Size(), filepath.Base(path)), st.Size(), from)
	return err
}
