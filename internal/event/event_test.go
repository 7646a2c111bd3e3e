package event

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// paper is what the log is written on, by several goroutines.
type paper struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (p *paper) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.text.Write(b)
}

// take returns what was written since the last time.
func (p *paper) take() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	defer p.text.Reset()
	return p.text.String()
}

func textLog(b io.Writer) *slog.Logger {
	return slog.New(slog.NewTextHandler(b, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			a.Value = slog.StringValue(a.Value.Time().UTC().Format("15:04:05"))
		}
		return a
	}}))
}

func TestEventIsOneLineWithItsOwnTime(t *testing.T) {
	source := netip.MustParseAddr("198.51.100.7")
	for _, test := range []struct {
		event Event
		want  string
	}{
		{Event{Kind: Opened, Source: source, Port: 5, User: "alice", For: time.Minute, At: began},
			`level=INFO msg="window opened" event=window-opened source=198.51.100.7 port=5 user=alice sequence=false for=1m0s`},
		{Event{Kind: TokenRefused, Source: source, At: began},
			`level=INFO msg="token refused: a guess, or a clock that is wrong" event=token-refused source=198.51.100.7 port=0`},
		{Event{Kind: TokenReplayed, Source: source, At: began},
			`level=INFO msg="token refused: it was spent before" event=token-replayed source=198.51.100.7 port=0`},
		{Event{Kind: SequenceReset, Source: source, At: began},
			`level=INFO msg="sequence put back to its start: another packet came in between" event=sequence-reset source=198.51.100.7 port=0`},
		{Event{Kind: WindowsFull, Source: source, Sequence: true, At: began},
			`level=WARN msg="window not opened: there is no room for more" event=windows-full source=198.51.100.7 port=0 sequence=true`},
	} {
		var b paper
		if !NewLog(textLog(&b), StrangerLimits()).Add(test.event) {
			t.Errorf("%s: not written", test.event.Kind)
		}
		if got, want := b.take(), "time=03:04:05 "+test.want+"\n"; got != want {
			t.Errorf("got  %swant %s", got, want)
		}
	}
}

func TestRefusalsHideNoOpening(t *testing.T) {
	var b paper
	l := NewLog(textLog(&b), StrangerLimits())
	for i := range 100_000 {
		l.Add(Event{Kind: TokenRefused, Source: stranger(i), At: began})
	}
	if !l.Add(Event{Kind: Opened, Sequence: true, Source: stranger(1), At: began}) {
		t.Error("an opening by sequence was suppressed by refusals")
	}
	for i := range 100_000 { // whoever knows the sequence can knock from any address he invents
		l.Add(Event{Kind: Opened, Sequence: true, Source: stranger(i), At: began})
	}
	for range 1000 {
		if !l.Add(Event{Kind: Opened, Source: stranger(1), At: began}) {
			t.Fatal("an opening by token was suppressed")
		}
	}
	if n := strings.Count(b.take(), "\n"); n != 100+100+1000 {
		t.Errorf("%d lines, want 100 refusals, 100 openings by sequence, 1000 by token", n)
	}
}

func TestSuppressedEventsAreSummedEachMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b paper
		l := NewLog(textLog(&b), StrangerLimits())
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- l.Run(ctx) }()
		for range 822 {
			l.Add(Event{Kind: TokenRefused, Source: netip.MustParseAddr("198.51.100.7"), At: time.Now()})
		}
		for range 15 {
			l.Add(Event{Kind: SequenceReset, Source: netip.MustParseAddr("2001:db8::7"), At: time.Now()})
		}
		b.take()
		time.Sleep(reportEvery + time.Second)
		synctest.Wait()
		text := b.take()
		lines := strings.Split(strings.TrimSpace(text), "\n")
		for i, want := range []string{
			`msg="suppressed events" what=refusals source=198.51.100.7 count=812`,
			`msg="suppressed events" what=refusals source=2001:db8::/64 count=5`,
		} {
			if len(lines) != 2 || !strings.HasSuffix(lines[i], want) {
				t.Fatalf("after a minute:\n%s", text)
			}
		}
		time.Sleep(10 * reportEvery)
		synctest.Wait()
		if text := b.take(); text != "" {
			t.Errorf("quiet minutes are reported:\n%s", text)
		}
		for range 20 {
			l.Add(Event{Kind: TokenReplayed, Source: netip.MustParseAddr("192.0.2.9"), At: time.Now()})
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if text := b.take(); !strings.HasSuffix(text, "source=192.0.2.9 count=10\n") {
			t.Errorf("what was suppressed last is lost at the end:\n%s", text)
		}
	})
}
