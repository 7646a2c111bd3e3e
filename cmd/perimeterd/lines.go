package main

import (
	"io"
	"sync"
	"time"
)

const (
	linesWait = 5 * time.Millisecond
	linesMost = 64 << 10 // bytes
)

// lines writes the log. A line that comes within linesWait of another waits for more, that long at most: with thousands of connections a
// second the call that hands a line over would be most of what it costs.
type lines struct {
	to io.Writer

	mu      sync.Mutex
	waiting []byte
	timer   *time.Timer
	soon    bool // the timer runs: the last write is not linesWait ago
}

func newLines(to io.Writer) *lines {
	l := &lines{to: to}
	l.timer = time.AfterFunc(time.Hour, l.due)
	l.timer.Stop()
	return l
}

// Write takes one line. An error is of the lines before.
func (l *lines) Write(line []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.waiting = append(l.waiting, line...)
	if l.soon && len(l.waiting) < linesMost {
		return len(line), nil
	}
	if !l.soon {
		l.soon = true
		l.timer.Reset(linesWait)
	}
	return len(line), l.flushLocked()
}

func (l *lines) due() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.soon = len(l.waiting) > 0; l.soon {
		l.timer.Reset(linesWait)
		l.flushLocked()
	}
}

// Flush writes what waits.
func (l *lines) Flush() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.flushLocked()
}

func (l *lines) flushLocked() error {
	if len(l.waiting) == 0 {
		return nil
	}
	_, err := l.to.Write(l.waiting)
	l.waiting = l.waiting[:0]
	return err
}
