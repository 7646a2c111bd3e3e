package proxy

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"time"

	"perimeterd/internal/quota"
)

func TestRefusalsOfOneUserFillNoLogAndConnectionsAreAllThere(t *testing.T) {
	var text bytes.Buffer
	watched := 0
	s := &Server{log: slog.New(slog.NewTextHandler(&text, nil)), lines: quota.New[string](time.Minute, 20)}
	s.Watch(func(Access) { watched++ })
	began := time.Now()
	for range 1000 {
		s.done(&Access{Began: began, User: "mallory", Decision: Decision{Reason: NoRule}})
		s.done(&Access{Began: began, User: "mallory", Decision: Decision{Allow: true}})
		s.done(&Access{Began: began, User: "mallory", Decision: Decision{Observed: true}})
	}
	s.done(&Access{Began: began, User: "alice", Decision: Decision{Reason: NoRule}})
	for line, want := range map[string]int{"decision=deny": 21, "decision=allow": 1000, "decision=observe": 1000, "user=alice": 1} {
		if n := strings.Count(text.String(), line); n != want {
			t.Errorf("%s: %d lines, want %d", line, n, want)
		}
	}
	if watched != 3001 {
		t.Errorf("%d watched", watched)
	}
	s.write(&Access{}, 980)
	if !strings.HasSuffix(text.String(), " left_out=980\n") {
		t.Errorf("%q", text.String()[text.Len()-200:])
	}
}
