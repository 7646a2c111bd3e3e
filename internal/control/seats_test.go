package control

import (
	"bufio"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"perimeterd/internal/audit"
	"perimeterd/vpn"
)

// open sends a request and leaves its answer unread.
func open(t *testing.T, path, request string) net.Conn {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_, _ = io.WriteString(c, request+" HTTP/1.1\r\nHost: x\r\n\r\n") // one too many is closed meanwhile
	return c
}

func status(t *testing.T, c net.Conn) int {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(time.Minute))
	res, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return 0
	}
	return res.StatusCode
}

func TestReadersOfEventsAreFewAndShutNoOperatorOut(t *testing.T) {
	f := start(t)
	r := f.feed()
	for range 4096 { // more than a socket holds
		r.Add(audit.Record{Kind: audit.Operator, Detail: strings.Repeat("x", 500)})
	}
	c := f.reader(t)
	for i := range readerSeatsEach { // who follow, and who only read
		if got := status(t, open(t, ReadersSocket(f.path), "GET /v1/events?follow="+[]string{"0", "1"}[i%2])); got != 200 {
			t.Fatalf("%d: %d", i, got)
		}
	}
	for _, follow := range []bool{false, true} {
		var e *vpn.APIError
		if err := c.Events(t.Context(), follow, audit.Filter{}, nil); !errors.As(err, &e) || e.Code != codeBusy {
			t.Errorf("one too many, follow %v: %v", follow, err)
		}
	}
	n := 0
	if err := f.Events(t.Context(), false, audit.Filter{}, func(*audit.Record) error { n++; return nil }); err != nil || n != 4096 {
		t.Errorf("an operator: %d events, %v", n, err)
	}
}

func TestSeatsAreOfEachAndOfAll(t *testing.T) {
	s := newSeats(3, 2)
	for i, want := range []bool{true, true, false, true, false} {
		if uid := []uint32{1, 1, 1, 2, 3}[i]; s.take(uid) != want {
			t.Errorf("%d, for %d: want %v", i, uid, want)
		}
	}
	if s.leave(1); !s.take(3) || s.take(1) {
		t.Error("a seat that was left is not to be had, or twice")
	}
}

func TestConnectionsOfASocketAreBounded(t *testing.T) {
	f := start(t)
	f.reader(t)
	for path, most := range map[string]int{f.path: connections, ReadersSocket(f.path): readerConnections} {
		var all []net.Conn
		for range most {
			c := open(t, path, "GET /v1/status")
			if got := status(t, c); got != 200 {
				t.Fatal(got)
			}
			all = append(all, c)
		}
		if got := status(t, open(t, path, "GET /v1/status")); got != 0 {
			t.Errorf("%s: one too many got %d", path, got)
		}
		all[0].Close()
		for end := time.Now().Add(time.Minute); status(t, open(t, path, "GET /v1/status")) != 200; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%s: a place that was left is not to be had", path)
			}
		}
	}
}

func TestRefusedReadersFloodNothing(t *testing.T) {
	f := start(t)
	r := audit.NewRecorder("/nonexistent", audit.Options{}, slog.New(slog.DiscardHandler))
	f.ops.Audit, f.ops.Refused = r.Add, r.AddRefused
	c := f.reader(t)
	for range 1000 {
		if err := c.do(context.Background(), "DELETE", "/v1/users", nil, nil); err == nil {
			t.Fatal("allowed")
		}
	}
	if n := len(r.Recent()); n < 200 || n > 500 {
		t.Errorf("%d of 1000 are recorded", n)
	}
	con := open(t, ReadersSocket(f.path), "DELETE /v1/users HTTP/1.1\r\nHost: x\r\n\r\nDELETE /v1/users")
	con.SetReadDeadline(time.Now().Add(time.Minute))
	if text, err := io.ReadAll(con); err != nil && !errors.Is(err, net.ErrClosed) && !strings.Contains(err.Error(), "reset") || strings.Count(string(text), "403 Forbidden") != 1 {
		t.Errorf("%q %v", text, err)
	}
}
