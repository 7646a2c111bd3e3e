//go:build linux

// Command attacks attacks the door of the built daemon in the lab, with stock tools and with packets of its own making, and
// prints what each attack gained. `make test-attacks` runs it as root. What is accepted is measured too, and says so.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

// limit is for all attacks together.
const limit = 8 * time.Minute

func main() {
	quick := flag.Bool("quick", false, "only those that take a few seconds")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Stdout, *quick); err != nil {
		fmt.Fprintln(os.Stderr, "attacks:", err)
		os.Exit(1)
	}
}

// attack is a line of the table.
type attack struct {
	name  string
	quick bool
	run   func(*stage) (result, error)
}

// result is what an attack gained: nothing, if it is held.
type result struct {
	count int // what was tried
	of    string
	text  string // what came of it
	held  bool
}

// all attacks, in the order of the table.
func all() []attack { return append(append(append(scans(), tokens()...), sequences()...), floods()...) }

// run fails when an attack gained something, or could not be made.
func run(ctx context.Context, out io.Writer, quick bool) (err error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	start := time.Now()
	s, err := newStage(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	line := func(name, count, text, held string) {
		fmt.Fprintf(out, "%-64s %22s  %-4s  %s\n", name, count, held, text)
	}
	fmt.Fprintf(out, "%d friends are ready after %v\n", len(s.friends), time.Since(start).Round(time.Second))
	line("attack", "count", "result", "held")
	var errs []error
	for _, a := range all() {
		if quick && !a.quick {
			continue
		}
		began := time.Now()
		r, err := a.run(s)
		switch {
		case ctx.Err() != nil:
			return fmt.Errorf("%s: %w: all attacks have %v", a.name, ctx.Err(), limit)
		case err != nil:
			err = fmt.Errorf("%s: %w", a.name, err)
		case !r.held:
			err = fmt.Errorf("%s: %s", a.name, r.text)
		}
		held := "yes"
		if err != nil {
			held, errs = "NO", append(errs, err)
			r.text += fmt.Sprintf(" [%v]", err)
		}
		line(a.name, fmt.Sprintf("%d %s", r.count, r.of), fmt.Sprintf("%s (%v)", r.text, time.Since(began).Round(100*time.Millisecond)), held)
	}
	fmt.Fprintf(out, "in %v\n", time.Since(start).Round(time.Second))
	if len(errs) > 0 {
		log := strings.SplitAfter(s.daemon.Log(), "\n")
		errs = append(errs, fmt.Errorf("the end of the daemon's log:\n%s", strings.Join(log[max(0, len(log)-20):], "")))
	}
	return errors.Join(errs...)
}
