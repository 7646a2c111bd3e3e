package firewall

import "time"

// Counter is told what happens at the table, by whoever keeps figures. It must not block.
type Counter interface {
	Missed()                                           // the kernel's log outran the daemon, and openings were lost
	Repaired(took time.Duration)                       // the table, after another tool changed it
	Loaded(tokens int, step int64, took time.Duration) // into the kernel
}

// Count makes c the counter. It must be called before anything else is.
func (f *Firewall) Count(c Counter) { f.counter = c }

type uncounted struct{}

func (uncounted) Missed()                          {}
func (uncounted) Repaired(time.Duration)           {}
func (uncounted) Loaded(int, int64, time.Duration) {}
