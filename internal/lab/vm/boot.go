//go:build linux

package main

import (
	"bufio"
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"
)

//go:embed init.sh
var initScript []byte

// report is what a machine said.
type report struct {
	suite, kernel, nft string
	order              []string          // of tests as they began
	results            map[string]string // PASS, FAIL or SKIP, and how long it took
	ended              bool              // the payload came to its end
	err                error
}

func (r *report) fail(err error) { r.err = errors.Join(r.err, err) }

// A test's own line, not those of its parts, which are indented. What init.sh does itself has no time.
var resultLine = regexp.MustCompile(`^--- ([A-Z]+): (.+?)( \(.+\))?$`)

func (r *report) line(line string) {
	if name, ok := strings.CutPrefix(line, "=== RUN   "); ok && !strings.Contains(name, "/") {
		r.order = append(r.order, name)
		r.results[name] = "no result"
		return
	}
	if m := resultLine.FindStringSubmatch(line); m != nil {
		r.results[m[2]] = m[1] + m[3]
		return
	}
	rest, ok := strings.CutPrefix(line, "test-vm ")
	if !ok {
		return
	}
	what, value, _ := strings.Cut(rest, " ")
	switch what {
	case "kernel":
		r.kernel = value
	case "nft":
		r.nft = value
	case "firewall", "e2e":
		if value != "0" {
			r.fail(fmt.Errorf("%s.test: exit status %s", what, value))
		}
	case "end":
		r.ended = true
	}
}

// boot starts a machine with the payload, copies what it says to out, and waits until it turns itself off. The report
// is never nil.
func (m machine) boot(ctx context.Context, payload []file, out io.Writer) (*report, error) {
	r := &report{results: map[string]string{}}
	dir, err := os.MkdirTemp("", "perimeterd-vm-")
	if err != nil {
		return r, err
	}
	defer os.RemoveAll(dir)
	initrd := filepath.Join(dir, "initrd")
	if err := m.join(initrd, payload); err != nil {
		return r, err
	}
	console := filepath.Join(dir, "console")
	var complaint bytes.Buffer
	// The kernel talks on the first serial port, the tests on the second, so that neither cuts the other's lines.
	qemu := exec.CommandContext(ctx, "qemu-system-x86_64", "-accel", "tcg,thread=multi",
		"-cpu", "max,la57=off", "-smp", "2", "-m", "768", "-nodefaults", "-display", "none", "-no-reboot",
		"-kernel", m.kernel, "-initrd", initrd, "-append", "console=ttyS0 loglevel=4 panic=-1 mitigations=off",
		"-serial", "file:"+console, "-serial", "stdio")
	qemu.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	qemu.WaitDelay = 5 * time.Second
	qemu.Stderr = &complaint
	serial, err := qemu.StdoutPipe()
	if err != nil {
		return r, err
	}
	if err := qemu.Start(); err != nil {
		return r, err
	}
	lines := bufio.NewScanner(serial)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		line := strings.TrimRight(lines.Text(), "\r")
		fmt.Fprintln(out, line)
		r.line(line)
	}
	err = errors.Join(lines.Err(), qemu.Wait())
	switch {
	case ctx.Err() != nil:
		err = fmt.Errorf("the machine was stopped: %w", ctx.Err())
	case err == nil && !r.ended:
		err = errors.New("the machine ended before its payload did")
	}
	if err != nil {
		said, _ := os.ReadFile(console)
		err = fmt.Errorf("%w\n%s%s", err, complaint.Bytes(), said[max(0, len(said)-8<<10):])
	}
	return r, err
}
