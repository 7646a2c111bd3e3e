package main

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"
)

// heard is what was written, and in how many pieces.
type heard struct {
	mu     sync.Mutex
	text   string
	pieces int
}

func (h *heard) Write(b []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.text += string(b)
	h.pieces++
	return len(b), nil
}

func (h *heard) all() (string, int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.text, h.pieces
}

func TestLinesComeTogetherInOrderAndByThemselves(t *testing.T) {
	const count = 1000
	h := &heard{}
	l := newLines(h)
	want := ""
	for i := range count {
		line := fmt.Sprintf("line %d\n", i)
		want += line
		if n, err := l.Write([]byte(line)); n != len(line) || err != nil {
			t.Fatal(n, err)
		}
		if text, _ := h.all(); i == 0 && text != line {
			t.Fatalf("a line with none before it waits: %q", text)
		}
	}
	text, pieces := h.all()
	for until := time.Now().Add(20 * time.Second); text != want; text, pieces = h.all() {
		if !strings.HasPrefix(want, text) || time.Now().After(until) {
			t.Fatalf("%d bytes of %d, in order: %v", len(text), len(want), strings.HasPrefix(want, text))
		}
		time.Sleep(time.Millisecond)
	}
	if pieces > count/2 {
		t.Errorf("%d lines in %d pieces", count, pieces)
	}
}

func TestLinesThatWaitAreBoundedAndFlushed(t *testing.T) {
	h := &heard{}
	l := newLines(h)
	long := strings.Repeat("x", linesMost-1) + "\n"
	l.Write([]byte("first\n"))
	l.Write([]byte(long))
	if text, _ := h.all(); text != "first\n"+long {
		t.Errorf("%d bytes wait", len("first\n"+long)-len(text))
	}
	l.Write([]byte("last\n"))
	if err := l.Flush(); err != nil {
		t.Fatal(err)
	}
	if text, _ := h.all(); !strings.HasSuffix(text, "\nlast\n") {
		t.Error("the last line is not written")
	}
}
