//go:build linux

// Command connect measures what a person waits for: from `vpn up` to a tunnel and to the first byte of an HTTPS page, with nothing
// kept and with a session that stands, on links of several lengths, beside the stack that this replaces; the same with each packet
// of the exchange lost once; how long a download stands still when UDP dies; and how fast the tunnel is beside wireguard-go's own
// program and OpenVPN. `make bench-connect` runs it as root, and `make bench-loss` for the losses; it ends by itself and leaves nothing
// but its results.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"slices"
	"strings"
	"time"

	"perimeterd/internal/lab"
	"perimeterd/internal/lab/bench"
)

// limit is the longest that it may take.
const limit = 21 * time.Minute

// cloudName is a name that the default rules allow.
const cloudName = "s3.us-east-1.amazonaws.com"

func main() {
	runs := flag.Int("runs", 3, "how often each way to connect is taken on each link")
	rounds := flag.Int("rounds", 4, "how often each transfer is measured, in turn")
	losses := flag.Int("losses", 1, "how often each packet is lost")
	span := flag.Duration("span", 1500*time.Millisecond, "how long each transfer is measured once it flows")
	only := flag.String("only", "time,trips,death,speed", "`PARTS` to measure; written are all of these, and \"loss\", which is apart")
	clients := flag.String("clients", "", "vpn `PROGRAMS` to set side by side in part trips, apart by commas; default: the one that is built")
	trip := flag.Duration("trip", -1, "only this round trip in parts trips and loss; default: those of part time")
	results := flag.String("results", "", "`FILE` for the raw numbers; default: bench/connect.json, or bench/loss.json")
	doc := flag.String("doc", "docs/benchmarks.md", "`FILE` whose sections \"From a cold laptop\" and \"Connecting\", or \"Lost packets\", are written")
	flag.Parse()
	name := "bench-connect"
	if *only == "loss" {
		name = "bench-loss"
	}
	if *results == "" {
		*results = strings.Replace(name, "-", "/", 1) + ".json"
	}
	bench.Main(name, limit, func(ctx context.Context) error {
		return measure(ctx, *runs, *rounds, *losses, *span, strings.Split(*only, ","), *clients, *trip, *results, *doc)
	})
}

func measure(ctx context.Context, runs, rounds, losses int, span time.Duration, parts []string, clients string, trip time.Duration, results, doc string) error {
	all := map[string]func(context.Context, *report) error{
		"time":  func(ctx context.Context, r *report) error { return r.times(ctx, runs) },
		"trips": func(ctx context.Context, r *report) error { return r.trips(ctx, max(runs-1, 1), clients, trip) },
		"loss":  func(ctx context.Context, r *report) error { return r.losses(ctx, losses, trip) },
		"death": func(ctx context.Context, r *report) error { return r.deaths(ctx) },
		"speed": func(ctx context.Context, r *report) error { return r.speeds(ctx, rounds, span) },
	}
	for _, part := range parts {
		if all[part] == nil {
			return fmt.Errorf("-only %q: want time, trips, loss, death, speed", part)
		}
	}
	what := "make bench-connect"
	if len(parts) == 1 && parts[0] == "loss" {
		what = "make bench-loss"
	}
	run, err := bench.Begin(ctx, what, "openvpn", "squid", "iptables", "ipset", "knockd", "curl")
	if err != nil {
		return err
	}
	r := &report{Run: run}
	fmt.Println(r.Machine())
	for _, part := range []string{"time", "trips", "speed", "death", "loss"} {
		if !slices.Contains(parts, part) {
			continue
		}
		before := len(r.Figures)
		if err := all[part](ctx, r); err != nil {
			return fmt.Errorf("%s: %w", part, err)
		}
		for _, f := range r.Figures[before:] {
			fmt.Printf("%s, %s, at %g: median %.4g %s of %d\n", f.What, f.Who, f.At, bench.Quantile(f.Values, 0.5), f.Unit, len(f.Values))
		}
	}
	r.End()
	var sections []string
	switch {
	case what == "make bench-loss" && trip < 0:
		sections = []string{r.section("Lost packets", "What losses cost: each packet of `vpn up` lost once, cold and warm, as in \"From a cold laptop\".")}
	case len(parts) == len(all)-1:
		sections = []string{r.laptop(), r.section("Connecting", "UDP that dies under a download, and comes back.")}
	default:
		return nil
	}
	fmt.Printf("\n%s", strings.Join(sections, "\n"))
	err = bench.Write(results, r.Run)
	for _, text := range sections {
		err = errors.Join(err, bench.WriteSection(doc, text))
	}
	return err
}

// report is what was measured, and in rows.
type report struct {
	*bench.Run
	rows      []row
	overheads string // a table of part trips
}

type row struct{ what, value string }

func (r *report) row(what, format string, a ...any) {
	r.rows = append(r.rows, row{what, fmt.Sprintf(format, a...)})
	fmt.Printf("%s: %s\n", what, r.rows[len(r.rows)-1].value)
}

func (r *report) section(title, about string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "## %s\n\n%s\n\n%s\n\n| | |\n|---|---|\n", title, r.Origin(), about)
	for _, row := range r.rows {
		fmt.Fprintf(&b, "| %s | %s |\n", row.what, row.value)
	}
	return b.String()
}

// stage is a lab with a running daemon, a cloud host and users, of whom one is at work: each has few tokens in half a minute.
type stage struct {
	*lab.Lab
	daemon *lab.Daemon
	cloud  *lab.CloudHost
	users  []*lab.User
	alice  *lab.User // whose turn it is
}

const users = 16

// window is so short that a knock is needed each time.
const window = time.Second

// next gives the turn to the next user, when the window of the one before has closed.
func (s *stage) next(ctx context.Context) error {
	s.users = append(s.users[1:], s.users[0])
	s.alice = s.users[0]
	return s.shut(ctx)
}

// shut waits until the window has closed.
func (s *stage) shut(ctx context.Context) error {
	select {
	case <-time.After(window + 100*time.Millisecond):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func open(ctx context.Context, o lab.Options, settings ...lab.Setting) (s *stage, err error) {
	s = &stage{}
	if s.Lab, err = lab.New(ctx, o); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if s.cloud, err = s.StartCloud(lab.CloudOptions{Names: []string{cloudName}}); err != nil {
		return nil, err
	}
	if s.daemon, err = s.NewDaemon(ctx, append(settings, lab.Setting{Key: "window", Value: fmt.Sprintf("%q", window)})...); err != nil {
		return nil, err
	}
	for i := range users {
		profile, err := s.daemon.AddUser(ctx, fmt.Sprintf("alice%d", i), "--group", "operators")
		if err != nil {
			return nil, err
		}
		u, err := s.NewUser(ctx, s.Client, profile)
		if err != nil {
			return nil, err
		}
		s.users = append(s.users, u)
	}
	s.alice = s.users[0]
	if _, err := output(s.Bastion.Command(ctx, "sysctl", "-q", "-w", "net.ipv4.tcp_fastopen=3")); err != nil { // as the package does
		return nil, err
	}
	return s, s.daemon.Start(ctx)
}

func output(c *lab.Cmd) (string, error) {
	out, err := c.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s: %w\n%s", strings.Join(c.Args, " "), err, out)
	}
	return string(out), nil
}

// ourProxy is the daemon's.
const ourProxy = "http://10.77.0.1:3128"

// curl prepares stock curl through a proxy.
func (s *stage) curl(ctx context.Context, proxy string, args ...string) *lab.Cmd {
	return s.alice.Command(ctx, "curl", append([]string{"-sS", "--max-time", "60", "--cacert", s.cloud.CAFile, "--proxy", proxy}, args...)...)
}
