package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"runtime/debug"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"perimeterd/vpn/client"
)

const defaultTimeout = 20 * time.Second

func upCommand(profile *string) *cobra.Command {
	foreground, timeout := false, defaultTimeout
	c := &cobra.Command{
		Use: "up", Short: "Knock, and bring the tunnel up", Args: noArguments,
		Long: "Knocks, asks the gate for a session and returns when the tunnel has keys. A process in the background then keeps it\n" +
			"until `vpn down`, and finds out whether data pass: `vpn status` says so. Where it runs already, this waits until they may.\n\n" +
			"With CAP_NET_ADMIN the tunnel is a device; without it, TCP/IP inside that process. In both cases a proxy on 127.0.0.1, for you\n" +
			"alone, leads through it.",
		RunE: func(*cobra.Command, []string) error {
			report := newReporter(os.Stderr)
			p, err := client.LoadProfile(*profile)
			if err != nil {
				return err
			}
			ctx, stop := interrupted()
			defer stop()
			if foreground {
				return serve(ctx, p, timeout, false, slog.New(slog.NewTextHandler(os.Stderr, nil)), report.step,
					func(s client.Status) { report.up(s) })
			}
			s, err := raise(ctx, p, *profile, timeout, false, report.step)
			if err == nil {
				report.up(s)
			}
			return err
		},
	}
	c.Flags().BoolVar(&foreground, "foreground", false, "stay in the foreground, until interrupted")
	c.Flags().DurationVar(&timeout, "timeout", timeout, "give up after so long")
	return c
}

func serve(ctx context.Context, p *client.Profile, timeout time.Duration, held bool, log *slog.Logger, step func(string), ready func(client.Status)) error {
	tokens, err := client.NewTokens(p)
	if err != nil {
		return err
	}
	s := client.Server{
		Keeper: &client.Keeper{
			Options: client.Options{Profile: p, Tokens: tokens, NewLink: client.NewLink, Progress: step, Log: log},
			Timeout: timeout,
			Now:     time.Now,
		},
		Held: held,
	}
	return s.Serve(ctx, ready)
}

// raise returns when the profile's tunnel is up: that of a process that keeps it already, or else of a new one in the
// background.
func raise(ctx context.Context, p *client.Profile, profile string, timeout time.Duration, held bool, step func(string)) (client.Status, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout+5*time.Second)
	defer cancel()
	for {
		// Only what wants it to stay asks a running process for that.
		s, err := client.AskStatus(ctx, p)
		switch {
		case err == nil && s.State == client.Refused:
			// It has given up; the profile may be another now.
			if err := client.AskDown(ctx, p); err != nil && !errors.Is(err, client.ErrDown) {
				return s, err
			}
		case err == nil && !held:
			if s, err = client.AskUp(ctx, p, timeout); !errors.Is(err, client.ErrDown) {
				return s, err
			}
		case !errors.Is(err, client.ErrDown):
			return s, err
		}
		s, err = background(ctx, p, profile, timeout, held, step)
		if !errors.Is(err, client.ErrRunning) {
			return s, err
		}
		// Another was faster by a moment, or is just ending.
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return s, err
		}
	}
}

// news is a line from the process in the background to the one that started it.
type news struct {
	Step    string         `json:"step,omitempty"`
	Running bool           `json:"running,omitempty"` // another process keeps the tunnel
	Error   string         `json:"error,omitempty"`
	Up      *client.Status `json:"up,omitempty"`
}

// background runs this program again, in a session of its own, to keep the tunnel.
func background(ctx context.Context, p *client.Profile, profile string, timeout time.Duration, held bool, step func(string)) (s client.Status, err error) {
	self, err := os.Executable()
	if err != nil {
		return s, err
	}
	logName, err := client.LogFile(p)
	if err != nil {
		return s, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return s, err
	}
	defer r.Close()
	cmd := exec.Command(self, "--profile="+profile, "keep", "--timeout="+timeout.String(), fmt.Sprintf("--held=%t", held), "--log="+logName)
	cmd.Args[0] = "vpn"
	passNews(cmd, w)
	detach(cmd)
	err = cmd.Start()
	w.Close()
	if err != nil {
		return s, fmt.Errorf("background process: %w", err)
	}
	go cmd.Wait()
	// An interrupt here is meant for the whole undertaking.
	stop := context.AfterFunc(ctx, func() { cmd.Process.Signal(os.Interrupt); r.Close() })
	defer stop()
	for lines := bufio.NewScanner(r); lines.Scan(); {
		var n news
		if err := json.Unmarshal(lines.Bytes(), &n); err != nil {
			return s, fmt.Errorf("background process: %w", err)
		}
		switch {
		case n.Step != "":
			step(n.Step)
		case n.Running:
			return s, client.ErrRunning
		case n.Error != "":
			return s, errors.New(n.Error)
		case n.Up != nil:
			return *n.Up, nil
		}
	}
	if err := context.Cause(ctx); err != nil {
		return s, fmt.Errorf("interrupted: %w", err)
	}
	return s, fmt.Errorf("the background process ended without a word: see %s", logName)
}

func keepCommand(profile *string) *cobra.Command {
	held, timeout, logName := false, defaultTimeout, ""
	c := &cobra.Command{
		Use: "keep", Hidden: true, Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			// The device's buffers grow the heap from nothing to 30 MB; collecting on the way costs milliseconds of the
			// few that `vpn up` takes.
			collect := debug.SetGCPercent(-1)
			pipe := openNews()
			out := json.NewEncoder(pipe)
			log, err := client.OpenLog(logName)
			if err != nil {
				out.Encode(news{Error: err.Error()})
				return err
			}
			ctx, stop := interrupted()
			defer stop()
			logger := slog.New(slog.NewTextHandler(log, nil))
			p, err := client.LoadProfile(*profile)
			if err == nil {
				err = serve(ctx, p, timeout, held, logger,
					func(step string) { out.Encode(news{Step: step}) },
					func(s client.Status) { out.Encode(news{Up: &s}); pipe.Close(); debug.SetGCPercent(collect) })
			}
			if errors.Is(err, client.ErrRunning) {
				out.Encode(news{Running: true})
			} else if err != nil {
				logger.Error("ended", "error", err)
				out.Encode(news{Error: err.Error()})
			}
			return err
		},
	}
	c.Flags().BoolVar(&held, "held", false, "")
	c.Flags().DurationVar(&timeout, "timeout", timeout, "")
	c.Flags().StringVar(&logName, "log", os.DevNull, "")
	return c
}

// reporter tells what has happened, and when since the command began.
type reporter struct {
	out      *os.File
	start    time.Time
	terminal bool
}

func newReporter(out *os.File) *reporter {
	return &reporter{out, time.Now(), term.IsTerminal(int(out.Fd()))}
}

func (r *reporter) step(s string) {
	took := float64(time.Since(r.start).Microseconds()) / 1000
	if r.terminal {
		fmt.Fprintf(r.out, "%8.1f ms  %s\n", took, s)
	} else {
		fmt.Fprintf(r.out, "%s %.1f ms\n", s, took)
	}
}

func (r *reporter) up(s client.Status) {
	r.step("tunnel up")
	rootless := ""
	if s.Mode == client.ModeRootless {
		rootless = " (rootless)"
	}
	fmt.Fprintf(r.out, "proxy http://%v%s, session until %s\n", s.Listen, rootless, s.Expires.Local().Format("Jan 2 15:04"))
}
