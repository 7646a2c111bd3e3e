package audit

import "sync"

const (
	recent   = 4096 // records that a Feed remembers
	backlog  = 256  // records that a reader may be behind
	maxFeeds = 32   // readers
)

// Feed tells what happens as it happens. Its records have no number, and no reader keeps anybody waiting: one that falls behind
// is dropped.
type Feed struct {
	mu      sync.Mutex
	ring    []Record
	next    int
	readers map[*Reader]struct{}
	ended   bool
}

// Reader is one who listens.
type Reader struct {
	C    <-chan Record // closed at the end, or when the reader fell behind
	c    chan Record
	feed *Feed
	late bool
}

// NewFeed makes an empty one.
func NewFeed() *Feed { return &Feed{readers: map[*Reader]struct{}{}} }

func (f *Feed) publish(r Record) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.ring) < recent {
		f.ring = append(f.ring, r)
	} else {
		f.ring[f.next] = r
		f.next = (f.next + 1) % recent
	}
	for reader := range f.readers {
		select {
		case reader.c <- r:
		default:
			reader.late = true
			f.dropLocked(reader)
		}
	}
}

// Recent is what it remembers, oldest first.
func (f *Feed) Recent() []Record {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.recentLocked()
}

func (f *Feed) recentLocked() []Record {
	return append(append(make([]Record, 0, len(f.ring)), f.ring[f.next:]...), f.ring[:f.next]...)
}

// Follow is what it remembers, and a Reader of what comes next, with nothing lost in between. The Reader is nil where there are
// too many, or the feed has ended. It must be closed.
func (f *Feed) Follow() ([]Record, *Reader) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ended || len(f.readers) == maxFeeds {
		return nil, nil
	}
	c := make(chan Record, backlog)
	r := &Reader{C: c, c: c, feed: f}
	f.readers[r] = struct{}{}
	return f.recentLocked(), r
}

// End ends all readers, and takes no more. What is published is still remembered.
func (f *Feed) End() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ended = true
	for r := range f.readers {
		f.dropLocked(r)
	}
}

func (f *Feed) dropLocked(r *Reader) {
	if _, ok := f.readers[r]; ok {
		delete(f.readers, r)
		close(r.c)
	}
}

// Close ends the Reader.
func (r *Reader) Close() {
	r.feed.mu.Lock()
	defer r.feed.mu.Unlock()
	r.feed.dropLocked(r)
}

// Late tells whether it ended because it fell behind.
func (r *Reader) Late() bool {
	r.feed.mu.Lock()
	defer r.feed.mu.Unlock()
	return r.late
}
