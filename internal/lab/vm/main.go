//go:build linux

// Command vm runs the firewall's tests, `perimeterd check`, and the path end to end with the kernel's WireGuard on the kernels of Debian 12 and 13, each with the nft of its
// release, in virtual machines without network. `make test-vm` runs it as root, after building what it carries in. The
// machines are emulated, some ten times slower than a real one, so that they run anywhere, inside other machines too.
//
// They are packages of Debian, unpacked and never installed, kept in .cache/vm: remove that for newer ones.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
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

// limit is for one machine, from power-on to power-off.
const limit = 15 * time.Minute

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
	tests := flag.String("run", ".", "only tests of the firewall that match `REGEXP`")
	kernel := flag.String("kernel", kernelTests, "only tests of the path that match `REGEXP`")
	flag.Parse()

	load, err := payload(*tests, *kernel)
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
		bounded, cancel := context.WithTimeout(ctx, limit)
		rep, err := m.boot(bounded, load, os.Stdout)
		cancel()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		rep.suite = r.suite
		if err == nil && !strings.HasPrefix(rep.kernel, r.kernel) {
			err = fmt.Errorf("its kernel is %q: want %s*", rep.kernel, r.kernel)
		}
		if err != nil {
			rep.fail(err)
		}
		reports = append(reports, rep)
	}
	if len(reports) == 0 {
		return fmt.Errorf("-suite %q: there are bookworm and trixie", *suite)
	}
	return summarize(os.Stdout, reports)
}

// kernelTests are of what the kernel's WireGuard does in the place of ours.
const kernelTests = "^TestKnockUpCurl$|^TestKilledDaemonComesBack|^TestRevocationOutlives|^TestRevokedUserIsOutAtOnce$|^TestServiceIsForItsGroups$|^TestKernel"

// payload is what every machine gets besides its packages: the tests, the daemon, and the program that runs them.
func payload(tests, kernel string) ([]file, error) {
	files := []file{{"init", 0o755, initScript}, {"payload/run", 0o644, []byte(tests)}, {"payload/kernel", 0o644, []byte(kernel)}}
	for _, name := range []string{"perimeterd", "knock", "vpn", "firewall.test", "e2e.test"} {
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

// summarize prints what became of each test on each kernel, and fails unless all of them passed everywhere.
func summarize(out io.Writer, reports []*report) error {
	var errs []error
	names := []string{"Debian", "kernel", "nftables"}
	for _, r := range reports {
		r.results["Debian"], r.results["kernel"], r.results["nftables"] = r.suite, r.kernel, r.nft
		for _, name := range r.order {
			if !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
		if r.err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", r.suite, r.err))
		}
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	for i, name := range names {
		fmt.Fprint(w, name)
		for _, r := range reports {
			result := cmp.Or(r.results[name], "did not run")
			fmt.Fprint(w, "\t", result)
			if i >= 3 && !strings.HasPrefix(result, "PASS") {
				errs = append(errs, fmt.Errorf("%s: %s: %s", r.suite, name, result))
			}
		}
		fmt.Fprintln(w)
	}
	return errors.Join(append(errs, w.Flush())...)
}
