// Package event writes what happened at the door: each opening, and of what was refused as much as is worth a line. What
// strangers send must not fill a disk, nor hide the openings: tokens' openings are always written, since each costs a
// token that was handed to a user; everything that a packet of a stranger can cause passes a Limiter, which counts what it
// suppresses.
package event

import (
	"context"
	"log/slog"
	"net/netip"
	"sync"
	"time"
)

// Kind is what happened. Kinds are stable: logs, metrics and the audit show them.
type Kind string

// Kinds of events at the door. All but Opened are the prefixes that the firewall's table logs by.
const (
	Opened        Kind = "window-opened"
	TokenRefused  Kind = "token-refused"  // no token of now: a guess, or a clock that is wrong
	TokenReplayed Kind = "token-replayed" // it has been spent
	SequenceReset Kind = "sequence-reset" // a sequence had begun, and another packet came
	WindowsFull   Kind = "windows-full"   // a knock was right, and the set of windows had no room
)

// Event is one packet's effect. A source is a claim.
type Event struct {
	Kind     Kind
	Source   netip.Addr
	Port     uint16        // the source's; 0: not known
	User     string        // of an opening, empty for a shared sequence
	Sequence bool          // knocked by a sequence, not by a token
	For      time.Duration // how long an opened window stays
	At       time.Time
}

// reportEvery is how often the sums of suppressed events are written.
const reportEvery = time.Minute

// Log writes events. Add may be called from several goroutines.
type Log struct {
	log *slog.Logger

	mu       sync.Mutex
	refused  *Limiter
	sequence *Limiter // of openings by sequence: refusals must not crowd them out
}

// NewLog makes a Log whose suppressed events Run reports.
func NewLog(log *slog.Logger, l Limits) *Log {
	return &Log{log: log, refused: NewLimiter(l), sequence: NewLimiter(l)}
}

// Add writes an event, or counts it where its source has had enough. It tells which.
func (l *Log) Add(e Event) (written bool) {
	if !l.allow(e) {
		return false
	}
	level, message := slog.LevelInfo, e.Kind.sentence()
	if e.Kind == WindowsFull {
		level = slog.LevelWarn
	}
	r := slog.NewRecord(e.At, level, message, 0)
	r.AddAttrs(slog.String("event", string(e.Kind)), slog.String("source", e.Source.String()), slog.Int("port", int(e.Port)))
	switch e.Kind {
	case Opened:
		r.AddAttrs(slog.String("user", e.User), slog.Bool("sequence", e.Sequence), slog.String("for", e.For.String()))
	case WindowsFull:
		r.AddAttrs(slog.Bool("sequence", e.Sequence))
	}
	if l.log.Enabled(context.Background(), level) {
		_ = l.log.Handler().Handle(context.Background(), r) // as slog does: a log that fails has nowhere to say so
	}
	return true
}

func (l *Log) allow(e Event) bool {
	if e.Kind == Opened && !e.Sequence {
		return true
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if e.Kind == Opened {
		return l.sequence.Allow(e.Source, e.At)
	}
	return l.refused.Allow(e.Source, e.At)
}

func (k Kind) sentence() string {
	switch k {
	case Opened:
		return "window opened"
	case TokenRefused:
		return "token refused: a guess, or a clock that is wrong"
	case TokenReplayed:
		return "token refused: it was spent before"
	case SequenceReset:
		return "sequence put back to its start: another packet came in between"
	case WindowsFull:
		return "window not opened: there is no room for more"
	}
	return string(k)
}

// Run writes once a minute how many events were suppressed, until ctx ends; then once more.
func (l *Log) Run(ctx context.Context) error {
	tick := time.NewTicker(reportEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			l.report()
			return nil
		case <-tick.C:
			l.report()
		}
	}
}

func (l *Log) report() {
	l.mu.Lock()
	refused, openings := l.refused.Report(), l.sequence.Report()
	l.mu.Unlock()
	l.tell("refusals", refused)
	l.tell("openings by sequence", openings)
}

func (l *Log) tell(what string, list []Suppressed) {
	for _, s := range list {
		l.log.Warn("suppressed events", "what", what, "source", s.who(), "count", s.Count)
	}
}

func (s Suppressed) who() string {
	switch {
	case !s.Source.IsValid():
		return "others"
	case s.Source.IsSingleIP():
		return s.Source.Addr().String()
	}
	return s.Source.String()
}
