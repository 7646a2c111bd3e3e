package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"

	"perimeterd/internal/audit"
	"perimeterd/vpn"
)

// feed gives the daemon a recorder that nobody writes for.
func (f *fixture) feed() *audit.Recorder {
	r := audit.NewRecorder("/nonexistent", audit.Options{}, slog.New(slog.DiscardHandler))
	f.ops.Feed = r.Feed
	return r
}

func TestEventsAreThoseRememberedThatMatch(t *testing.T) {
	f := start(t)
	r := f.feed()
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for i := range 10 {
		r.Add(audit.Record{Time: at.Add(time.Duration(i) * time.Second), Kind: audit.Kinds()[i%2], User: fmt.Sprint("u", i%5), Session: fmt.Sprint("s", i)})
	}
	for _, test := range []struct {
		filter audit.Filter
		want   string
	}{
		{audit.Filter{}, "s0 s1 s2 s3 s4 s5 s6 s7 s8 s9"},
		{audit.Filter{User: "u3"}, "s3 s8"},
		{audit.Filter{Session: "s4"}, "s4"},
		{audit.Filter{Kinds: []audit.Kind{audit.Kinds()[1]}, Since: at.Add(5 * time.Second)}, "s5 s7 s9"},
		{audit.Filter{User: "nobody"}, ""},
	} {
		var got []string
		if err := f.Events(context.Background(), false, test.filter, func(r *audit.Record) error { got = append(got, r.Session); return nil }); err != nil || strings.Join(got, " ") != test.want {
			t.Errorf("%+v: %v, %v", test.filter, got, err)
		}
	}
	var e *vpn.APIError
	if err := f.Events(context.Background(), false, audit.Filter{Kinds: []audit.Kind{"else"}}, nil); !errors.As(err, &e) || !strings.Contains(e.Message, `kind="else": want one of [window-opened `) {
		t.Error(err)
	}
	if err := f.do(context.Background(), "GET", "/v1/events?foo=1", nil, nil); !errors.As(err, &e) || e.Status != 400 {
		t.Error(err)
	}
	own := errors.New("own")
	if err := f.Events(context.Background(), false, audit.Filter{}, func(*audit.Record) error { return own }); err != own {
		t.Error(err)
	}
}

// follow follows until ctx ends; what comes, and at the end the error, is in the channels.
func (f *fixture) follow(ctx context.Context, filter audit.Filter) (came chan audit.Record, done chan error) {
	came, done = make(chan audit.Record, 100), make(chan error, 1)
	go func() {
		done <- f.Events(ctx, true, filter, func(r *audit.Record) error { came <- *r; return nil })
	}()
	return came, done
}

func next(t *testing.T, came chan audit.Record) audit.Record {
	t.Helper()
	select {
	case r := <-came:
		return r
	case <-time.After(30 * time.Second):
		t.Fatal("nothing came in half a minute")
	}
	return audit.Record{}
}

func TestFollowedEventsComeAsTheyHappenForAsLongAsOneListens(t *testing.T) {
	t.Parallel()
	f := start(t)
	r := f.feed()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	r.Add(audit.Record{Kind: audit.Operator, User: "before"})
	came, done := f.follow(ctx, audit.Filter{Kinds: []audit.Kind{audit.Operator}})
	if got := next(t, came); got.User != "before" {
		t.Fatalf("%+v", got)
	}
	_, ended := f.follow(context.Background(), audit.Filter{User: "nobody"})
	time.Sleep(11 * time.Second) // longer than a request may take to be read, and a piece to be sent
	r.Add(audit.Record{Kind: audit.Connection})
	r.Add(audit.Record{Kind: audit.Operator, User: "after"})
	if got := next(t, came); got.User != "after" {
		t.Fatalf("%+v", got)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	f.ops.Feed.End()
	if err := <-ended; err != io.EOF {
		t.Errorf("the end: %v", err)
	}
}

func TestReaderOfEventsWhoSleepsIsCutOffAndKeepsNobodyWaiting(t *testing.T) {
	f := start(t)
	r := f.feed()
	c, err := net.Dial("unix", f.path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, "GET /v1/events?follow=1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	came, _ := f.follow(t.Context(), audit.Filter{})
	r.Add(audit.Record{Kind: audit.Operator, User: "first"})
	next(t, came)
	// More than the socket and the reader's backlog hold, while another one reads.
	for range 20 {
		for range 100 {
			r.Add(audit.Record{Kind: audit.Operator, Detail: strings.Repeat("x", 500)})
		}
		for range 100 {
			next(t, came)
		}
	}
	if _, err := f.Status(t.Context()); err != nil {
		t.Error(err)
	}
	c.SetReadDeadline(time.Now().Add(time.Minute))
	text, err := io.ReadAll(c)
	if n := strings.Count(string(text), `"kind":"operator"`); err != nil && !errors.Is(err, io.ErrUnexpectedEOF) || n >= 2001 {
		t.Errorf("%d of 2001 events came, %v", n, err)
	}
	if !strings.Contains(string(text), `{"error":{"code":"late","message":"the events came faster than they were read: ask for less, by --user or --kind"}}`) {
		t.Errorf("it ends with %.300q", text[max(0, len(text)-300):])
	}
}
