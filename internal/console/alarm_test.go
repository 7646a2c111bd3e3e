package console

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
)

func TestAlarmSpeaksOnceUpAndOnceDown(t *testing.T) {
	var b bytes.Buffer
	sets := &table{}
	a := NewAlarm(sets, slog.New(slog.NewTextHandler(&b, nil)))
	for i, step := range []struct {
		elements int
		err      error
		want     string // in the one line that is written; empty: none
	}{
		{elements: 0}, {elements: 799},
		{elements: 800, want: "level=WARN msg=\"a set of the nftables table is filling: full, it refuses knocks\" set=open4 elements=800 size=1000"},
		{elements: 1000}, {elements: 750}, {elements: 801}, {elements: 700},
		{elements: 699, want: "level=INFO msg=\"a set of the nftables table has room again\" set=open4 elements=699 size=1000"},
		{elements: 100},
		{err: errors.New("no table"), want: "err=\"no table\""}, {err: errors.New("no table")},
		{elements: 900, want: "level=WARN"},
		{err: errors.New("no table"), want: "err=\"no table\""},
		{elements: 900},
		{elements: 0, want: "level=INFO"},
	} {
		sets.fill, sets.err = map[string]Fill{"open4": {step.elements, 1000}, "reach": {1 << 20, 0}}, step.err
		b.Reset()
		a.look()
		lines := strings.Count(b.String(), "\n")
		if step.want == "" && lines != 0 || step.want != "" && (lines != 1 || !strings.Contains(b.String(), step.want)) {
			t.Errorf("step %d: %q, want %q", i, b.String(), step.want)
		}
	}
}

// asked counts how often it was.
type asked struct{ times chan struct{} }

func (a asked) Fill() (map[string]Fill, error) { a.times <- struct{}{}; return nil, nil }

func TestAlarmLooksEveryTenSecondsUntilItsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 6*alarmEvery-1)
		defer cancel()
		sets := asked{make(chan struct{}, 100)}
		if err := NewAlarm(sets, slog.New(slog.DiscardHandler)).Run(ctx); err != nil {
			t.Error(err)
		}
		if n := len(sets.times); n != 6 {
			t.Errorf("looked %d times in a minute, want 6", n)
		}
	})
}
