//go:build linux

// Command vm runs the firewall's tests and `perimeterd check` on the kernels of Debian 12 and 13, each with the nft of its
// release, in virtual machines without network. `make test-vm` runs it as root, after building what it carries in. Without
// KVM a machine is emulated, some ten times slower; nothing here asserts a time.
//
// The machines are packages of Debian, unpacked and never installed, kept in .cache/vm: remove that for newer ones.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"perimeterd/internal/lab"
)

// release is a Debian and the line of kernels that perimeterd promises to work on there.
type release struct{ suite, kernel string }

var releases = [...]release{{"bookworm", "6.1."}, {"trixie", "6.12."}}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "test-vm:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	suite := flag.String("suite", "", "only this `RELEASE`: bookworm or trixie")
	tests := flag.String("run", ".", "only tests that match `REGEXP`")
	limit := flag.Duration("limit", 10*time.Minute, "for one machine, from power-on to power-off")
	flag.Parse()

	load, err := payload(*tests)
	if err != nil {
		return err
	}
	var reports []*report
	for _, r := range releases {
		if *suite != "" && *suite != r.suite {
			continue
		}
		m, err := prepare(ctx, filepath.Join(".cache", "vm"), r.suite)
		if err != nil {
			return fmt.Errorf("%s: %w", r.suite, err)
		}
		fmt.Printf("\n== Debian %s\n", r.suite)
		bounded, cancel := context.WithTimeout(ctx, *limit)
		rep, err := m.boot(bounded, load, os.Stdout)
		cancel()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err == nil && !strings.HasPrefix(rep.kernel, r.kernel) {
			err = fmt.Errorf("its kernel is %q: want %s*", rep.kernel, r.kernel)
		}
		if err != nil {
			rep.fail(fmt.Errorf("%s: %w", r.suite, err))
		}
		reports = append(reports, rep)
	}
	if len(reports) == 0 {
		return fmt.Errorf("-suite %q: there are bookworm and trixie", *suite)
	}
	return summarize(reports)
}

// payload is what every machine gets besides its packages: the tests, the daemon, and the program that runs them.
func payload(tests string) ([]file, error) {
	files := []file{{"init", 0o755, initScript}, {"payload/run", 0o644, []byte(tests)}}
	for _, name := range []string{"perimeterd", "firewall.test"} {
		path, err := lab.Bin(name)
		if err != nil {
			return nil, err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		files = append(files, file{"payload/" + name, 0o755, b})
	}
	// One test loads the table that is written in this file.
	doc, err := os.ReadFile("firewall/doc.go")
	if err != nil {
		return nil, err
	}
	return append(files, file{"payload/doc.go", 0o644, doc}), nil
}

// summarize prints what became of each test on each kernel, and fails if one did not pass.
func summarize(reports []*report) error {
	var names []string
	var errs []error
	for _, r := range reports {
		errs = append(errs, r.err)
		for _, name := range r.order {
			if !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
	}
	fmt.Println()
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprint(w, "kernel")
	for _, r := range reports {
		fmt.Fprint(w, "\t", r.kernel)
	}
	fmt.Fprint(w, "\nnftables")
	for _, r := range reports {
		fmt.Fprint(w, "\t", r.nft)
	}
	fmt.Fprintln(w)
	for _, name := range names {
		fmt.Fprint(w, name)
		for _, r := range reports {
			result, ok := r.results[name]
			if !ok {
				result = "did not run"
			}
			fmt.Fprint(w, "\t", result)
			if !strings.HasPrefix(result, "PASS") {
				errs = append(errs, fmt.Errorf("%s on %s: %s", name, r.kernel, result))
			}
		}
		fmt.Fprintln(w)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	return errors.Join(errs...)
}
