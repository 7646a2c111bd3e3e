package proxy

import "sync/atomic"

// crewIdle is how many goroutines wait for work.
const crewIdle = 64

// crew is goroutines that have worked before. A new one begins with a small stack, and copies it time after time on its way through a
// dial or a log line.
type crew struct {
	jobs chan func()
	over chan struct{}
	idle atomic.Int32
}

func newCrew() *crew { return &crew{jobs: make(chan func()), over: make(chan struct{})} }

// do is go.
func (c *crew) do(job func()) {
	select {
	case c.jobs <- job:
	default:
		go c.work(job)
	}
}

func (c *crew) work(job func()) {
	for {
		job()
		job = nil // and what it holds
		if c.idle.Add(1) > crewIdle {
			c.idle.Add(-1)
			return
		}
		select {
		case job = <-c.jobs:
			c.idle.Add(-1)
		case <-c.over:
			return
		}
	}
}

// dismiss ends those who wait, and those to come.
func (c *crew) dismiss() { close(c.over) }
