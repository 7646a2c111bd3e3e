//go:build linux

// Command soak knocks 100,000 times at the running daemon, half by token and half by sequence, and fails if anything in it
// or in the kernel's table grows. `make soak` runs it as root; it takes about ten minutes.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"perimeterd/internal/lab"
	"perimeterd/internal/lab/roster"
)

func main() {
	knocks := flag.Int("knocks", 100_000, "how many in all")
	rate := flag.Int("rate", 280, "knocks a second")
	users := flag.Int("users", 3000, "users whose tokens are sent")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := soak(ctx, *knocks, *rate, *users)
	if ctx.Err() != nil {
		fmt.Fprintln(os.Stderr, "soak: interrupted: everything is cleaned up")
		os.Exit(130)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "soak:", err)
		os.Exit(1)
	}
}

const (
	metricsAddress = "127.0.0.1:9617"
	// window is shorter than the time in which the crowd's addresses come round, so that every knock finds the door closed.
	window = 10 * time.Second
	// remembered is how long the kernel and the daemon remember a spent token: until then, memory may grow.
	remembered = 3 * time.Minute
	warmUp     = 640 // knocks before the first sample
)

func soak(ctx context.Context, knocks, rate, users int) (err error) {
	if knocks < 4*batch || rate < 1 || users < 1 || rate*int(window.Seconds()) > lab.CrowdSize/2 {
		return fmt.Errorf("%d knocks, %d a second, %d users: want at least %d, and up to %d a second", knocks, rate, users, 4*batch, lab.CrowdSize/2/int(window.Seconds()))
	}
	// Twice what it should take: a loaded machine is no leak.
	ctx, cancel := context.WithTimeout(ctx, 2*time.Duration(knocks/rate)*time.Second+10*time.Minute)
	defer cancel()
	l, err := lab.New(ctx, lab.Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	daemon, err := l.NewDaemon(ctx, lab.Setting{Key: "metrics", Value: fmt.Sprintf("%q", metricsAddress)},
		lab.Setting{Key: "window", Value: fmt.Sprintf("%q", window)})
	if err != nil {
		return err
	}
	all, err := roster.New(daemon, users)
	if err != nil {
		return err
	}
	source, err := l.Crowd(ctx, l.Bastion)
	if err != nil {
		return err
	}
	k, err := l.NewKnocker()
	if err != nil {
		return err
	}
	defer k.Close()
	if err := daemon.Start(ctx); err != nil {
		return err
	}
	fmt.Printf("%d users: %d tokens for each step of %v; %d knocks, %d a second, half by token, half by sequence of %d ports\n",
		users, all.PerStep(), all.Config.Knock.Step, knocks, rate, len(all.Config.Firewall.Sequences[0].Ports))

	c := &crowd{l.Bastion.Addr, all, k, source, rate, tally{}}
	if err := c.knock(ctx, warmUp); err != nil {
		return err
	}
	before := c.tally
	var samples []sample
	took := func(name string) error {
		var want *sample
		if len(samples) > 0 {
			want = &samples[0]
		}
		s, err := takeSample(ctx, daemon, name, want)
		if err == nil {
			samples = append(samples, s)
			fmt.Println(s)
		}
		return err
	}
	fmt.Println(sampleHead)
	if err := took("before"); err != nil {
		return err
	}
	start := time.Now()
	for _, part := range []string{"25 %", "50 %", "75 %", "100 %"} {
		if err := c.knock(ctx, knocks/4); err != nil {
			return err
		}
		if err := took(part); err != nil {
			return err
		}
	}
	load := time.Since(start)
	// Everything that a knock left is gone then.
	if err := drained(ctx, daemon); err != nil {
		return err
	}
	if err := took("after"); err != nil {
		return err
	}
	c.tally.print(before, load)
	metrics, err := daemon.Metrics(ctx, metricsAddress)
	if err != nil {
		return err
	}
	return errors.Join(c.tally.check(before), check(samples, metrics, load))
}
