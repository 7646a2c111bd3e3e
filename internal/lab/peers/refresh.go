//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"perimeterd/firewall"
	"perimeterd/internal/console"
	"perimeterd/internal/lab"
	"perimeterd/internal/lab/roster"
	"perimeterd/knock"
)

const (
	manyUsers   = 10_000
	someUsers   = 1_000
	wholeSteps  = 2 // of the daemon, measured
	quickSteps  = 4 // of the table alone
	flushGoal   = 15 * time.Millisecond
	refreshTick = 500 * time.Millisecond // as Tokens.Run does
)

// refresh is what many users cost.
type refresh struct {
	Users    int       `json:"users"`
	Start    float64   `json:"start_seconds"` // of the daemon, three steps of all users loaded
	RSS      int       `json:"daemon_rss_bytes"`
	Step     float64   `json:"step_seconds"`
	Steps    []step    `json:"steps"`
	FirstTry []int     `json:"opened_at_first_try"` // of Some users, with their first and their second token of a step
	Some     int       `json:"knocking_users"`
	Flushes  []float64 `json:"flush_microseconds"` // of the table alone, every commit of four steps
}

// step is what the daemon did in one.
type step struct {
	Tokens  int     `json:"tokens"`
	Flushes int     `json:"flushes"`
	Seconds float64 `json:"flush_seconds"`  // all of them together
	CPU     float64 `json:"cpu_seconds"`    // of the daemon
	Within  float64 `json:"within_seconds"` // the metric's bucket in which the longest lies
}

func measureRefresh(ctx context.Context) (r *refresh, err error) {
	l, err := lab.New(ctx, lab.Options{})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	daemon, err := l.NewDaemon(ctx, lab.Setting{Key: "metrics", Value: fmt.Sprintf("%q", metricsAddress)})
	if err != nil {
		return nil, err
	}
	users, err := roster.New(daemon, manyUsers)
	if err != nil {
		return nil, err
	}
	source, err := l.Crowd(ctx, l.Bastion)
	if err != nil {
		return nil, err
	}
	k, err := l.NewKnocker()
	if err != nil {
		return nil, err
	}
	defer k.Close()
	length := users.Config.Knock.Step
	r = &refresh{Users: manyUsers, Some: someUsers, Step: length.Seconds()}
	began := time.Now()
	if err := daemon.Start(ctx); err != nil {
		return nil, err
	}
	r.Start = time.Since(began).Seconds()

	var at []sample
	for n := range wholeSteps + 1 {
		now := knock.StepAt(time.Now(), length) + 1
		select {
		case <-time.After(time.Until(knock.Start(now, length))):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		s, err := take(ctx, daemon)
		if err != nil {
			return nil, err
		}
		if at = append(at, s); n > 0 {
			r.Steps = append(r.Steps, s.since(at[n-1]))
			continue
		}
		chosen := rand.Perm(manyUsers)[:someUsers]
		for index := range uint8(2) {
			opened, err := firstTries(ctx, l, k, users, chosen, now, index, source)
			if err != nil {
				return nil, err
			}
			r.FirstTry = append(r.FirstTry, opened)
		}
		if knock.StepAt(time.Now(), length) != now {
			return nil, fmt.Errorf("the knocks of %d users took longer than a step", someUsers)
		}
	}
	u, err := daemon.Usage()
	if err != nil {
		return nil, err
	}
	r.RSS = u.RSS
	r.Flushes, err = flushes(ctx, l, users)
	return r, err
}

// firstTries has each user send his token of the step once, with a SYN right behind, and counts whose is answered.
func firstTries(ctx context.Context, l *lab.Lab, k *lab.Knocker, users *roster.Roster, chosen []int, now int64, index uint8, source func() netip.Addr) (opened int, err error) {
	for _, u := range chosen {
		from := source()
		// One SYN each millisecond for a second: whether a token opens, not how soon.
		o, err := k.Open(ctx, from, netip.AddrPortFrom(l.Bastion.Addr, gatePort),
			users.TokenKnock(from, l.Bastion.Addr, users.Token(u, now, index)), time.Millisecond, time.Second)
		if err != nil {
			return 0, err
		}
		if o.Opened {
			opened++
		}
	}
	return opened, nil
}

// sample is the daemon's counters at a moment.
type sample struct {
	tokens, sum float64
	count       uint64
	buckets     []bucket
	cpu         time.Duration
}

type bucket struct {
	upTo  float64 // seconds
	count uint64  // cumulative
}

func take(ctx context.Context, d *lab.Daemon) (s sample, err error) {
	m, err := d.Metrics(ctx, metricsAddress)
	if err != nil {
		return s, err
	}
	if s.tokens, err = m.Value(console.TokensLoaded); err != nil {
		return s, err
	}
	h, err := m.Histogram(console.TokenLoadTime)
	if err != nil {
		return s, err
	}
	s.sum, s.count = h.GetSampleSum(), h.GetSampleCount()
	for _, b := range h.GetBucket() {
		s.buckets = append(s.buckets, bucket{b.GetUpperBound(), b.GetCumulativeCount()})
	}
	u, err := d.Usage()
	s.cpu = u.CPU
	return s, err
}

func (s sample) since(before sample) step {
	r := step{Tokens: int(s.tokens - before.tokens), Flushes: int(s.count - before.count), Seconds: s.sum - before.sum, CPU: (s.cpu - before.cpu).Seconds()}
	for i, b := range s.buckets {
		if b.count-before.buckets[i].count == s.count-before.count {
			r.Within = b.upTo
			break
		}
	}
	return r
}

// flushTimes is a firewall.Counter.
type flushTimes struct{ microseconds []float64 }

func (f *flushTimes) Missed()                {}
func (f *flushTimes) Repaired(time.Duration) {}
func (f *flushTimes) Loaded(_ int, _ int64, took time.Duration) {
	f.microseconds = append(f.microseconds, float64(took.Nanoseconds())/1000)
}

// steps is a firewall.StepStore that forgets.
type steps struct{}

func (steps) TokenStep() (uint64, error)  { return 0, nil }
func (steps) TokenSteps() ([]byte, error) { return nil, nil }
func (steps) SetTokenSteps([]byte) error  { return nil }

// flushes times each commit of the daemon's refresh by itself: the same table in a host of its own, a step's ticks without
// the waiting in between.
func flushes(ctx context.Context, l *lab.Lab, users *roster.Roster) ([]float64, error) {
	h, err := l.AddHost(ctx, "table")
	if err != nil {
		return nil, err
	}
	ns, err := os.Open(filepath.Join("/run/netns", h.Name))
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	quiet := slog.New(slog.DiscardHandler)
	fw := firewall.New(quiet, int(ns.Fd()))
	times := &flushTimes{}
	fw.Count(times)
	cfg := users.Config.Firewall
	cfg.GID = 60194
	for i := range cfg.Sequences {
		cfg.Sequences[i].Credential = uint32(i + 1)
	}
	fresh, err := fw.Apply(cfg)
	if err != nil {
		return nil, err
	}
	tokens, err := firewall.NewTokens(fw, fresh, knock.ServerID{}, cfg.Step, steps{}, quiet)
	if err != nil {
		return nil, err
	}
	now := knock.Start(knock.StepAt(time.Now(), cfg.Step), cfg.Step)
	if err := errors.Join(tokens.Set(users.Credentials, now), tokens.Refresh(now)); err != nil {
		return nil, err
	}
	times.microseconds = nil // the first load, of all at once, is not a refresh
	for t := time.Duration(0); t < quickSteps*cfg.Step; t += refreshTick {
		if err := tokens.Refresh(now.Add(t)); err != nil {
			return nil, err
		}
	}
	return times.microseconds, ctx.Err()
}
