package audit

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"perimeterd/internal/quota"
)

const (
	queueSize = 8192                 // records that wait for the disk
	batchSize = 512                  // records of one write
	batchWait = 5 * time.Millisecond // for more of them: each write asks the file system for room first
	syncEvery = time.Second
	headEvery = time.Hour
)

// What strangers cause is written at this pace: 8,640 records a day, some 2 MB, whatever they send. Sources have limits of their
// own before that, see internal/event.
const (
	strangerEvery = 10 * time.Second
	strangerBurst = 100
)

// Recorder takes records from everywhere and has them written. Its methods but Run wait for nobody.
type Recorder struct {
	*Feed
	dir     string
	options Options
	log     *slog.Logger
	queue   chan Record

	mu        sync.Mutex
	full      loss // what found the queue full
	strangers map[bool]*stranger
	refused   *quota.Quota[known]

	problem atomic.Pointer[string]
	lost    atomic.Uint64
}

// loss is records that are not there.
type loss struct {
	count uint64
	since time.Time
}

func (l *loss) add(n int, at time.Time) {
	if n > 0 && l.count == 0 {
		l.since = at
	}
	l.count += uint64(n)
}

// stranger is what is left out of one sort of what strangers cause.
type stranger struct {
	pace *rate.Limiter
	left loss
}

// known is who is known by a certificate, or by an account on this host.
type known struct{ user, account string }

// NewRecorder makes a Recorder for a directory, which Run makes if need be.
func NewRecorder(dir string, o Options, log *slog.Logger) *Recorder {
	pace := func() *stranger { return &stranger{pace: rate.NewLimiter(rate.Every(strangerEvery), strangerBurst)} }
	return &Recorder{Feed: NewFeed(), dir: dir, options: o, log: log, queue: make(chan Record, queueSize), strangers: map[bool]*stranger{false: pace(), true: pace()},
		refused: quota.New[known](quota.Every, quota.Burst)}
}

// Add takes a record. Its time is now, where it has none.
func (r *Recorder) Add(a Record) {
	if a.Time.IsZero() {
		a.Time = time.Now()
	}
	a.clean()
	r.publish(a)
	select {
	case r.queue <- a:
	default:
		r.mu.Lock()
		r.full.add(1, a.Time)
		r.mu.Unlock()
		r.lost.Add(1)
	}
}

// AddStranger takes a record that somebody caused who has shown no certificate that holds, or leaves it out if there are too
// many; the next one says how many were left out. Openings have a share of their own, so that refusals cannot hide them.
func (r *Recorder) AddStranger(a Record) {
	if a.Time.IsZero() {
		a.Time = time.Now()
	}
	r.mu.Lock()
	s := r.strangers[a.Kind == WindowOpened]
	if !s.pace.AllowN(a.Time, 1) {
		s.left.add(1, a.Time)
		r.mu.Unlock()
		return
	}
	a.Count, a.Since = s.left.count, s.left.since
	s.left = loss{}
	r.mu.Unlock()
	r.Add(a)
}

// AddRefused takes a record of what was refused to its user, or to an account on this host, or leaves it out if there are too many
// of theirs; the next one says how many were left out.
func (r *Recorder) AddRefused(account string, a Record) {
	if a.Time.IsZero() {
		a.Time = time.Now()
	}
	left, ok := r.refused.Take(known{cut(a.User), account}, a.Time)
	if !ok {
		return
	}
	a.Count, a.Since = left.Count, left.Since
	r.Add(a)
}

// tellLeft adds how many records were left out since the last that tells.
func (r *Recorder) tellLeft(now time.Time) {
	for _, s := range r.strangers {
		r.mu.Lock()
		left := s.left
		s.left = loss{}
		r.mu.Unlock()
		if left.count > 0 {
			r.Add(Record{Time: now, Kind: LeftOut, Count: left.count, Since: left.since, Detail: "of what strangers caused: there was too much of it"})
		}
	}
	for who, left := range r.refused.Untold(now) {
		r.Add(Record{Time: now, Kind: LeftOut, User: who.user, By: who.account, Count: left.Count, Since: left.Since, Detail: "of what was refused to one: there was too much of it"})
	}
}

// Problem is why records are lost now, or empty.
func (r *Recorder) Problem() string {
	if p := r.problem.Load(); p != nil {
		return *p
	}
	return ""
}

// Lost counts the records that are not in the files.
func (r *Recorder) Lost() uint64 { return r.lost.Load() }

// Run writes what is added until ctx ends, then what is left. It ends without an error: what cannot be written is counted, and
// the daemon goes on.
func (r *Recorder) Run(ctx context.Context) error {
	p := &pen{recorder: r, log: r.log}
	defer p.close()
	sync := time.NewTicker(syncEvery)
	defer sync.Stop()
	hour := time.NewTicker(headEvery)
	defer hour.Stop()
	p.turn(time.Now())
	p.sayHead()
	defer p.sayHead() // before the files are closed
	for {
		select {
		case a := <-r.queue:
			if !a.urgent() {
				time.Sleep(batchWait)
			}
			p.write(r.batch(a))
		case now := <-sync.C:
			p.tick(now)
		case now := <-hour.C:
			r.tellLeft(now)
			p.turn(now)
			p.sayHead()
		case <-ctx.Done():
			r.tellLeft(time.Now())
			for len(r.queue) > 0 { // nobody else takes from it
				p.write(r.batch(<-r.queue))
			}
			p.tick(time.Now()) // what was lost is told, if it can be
			return nil
		}
	}
}

// batch is a and what waits behind it.
func (r *Recorder) batch(a Record) []Record {
	list := append(make([]Record, 0, 16), a)
	for len(list) < batchSize {
		select {
		case a := <-r.queue:
			list = append(list, a)
		default:
			return list
		}
	}
	return list
}

// pen is Run's side of the files.
type pen struct {
	recorder *Recorder
	log      *slog.Logger
	w        *Writer // nil: to be opened
	last     Head    // of what was written
	failed   error   // why nothing is written now; tried again every second
	kept     bool    // files stay that should be gone, which was said
	lost     loss
	unsynced int // records since the last Sync
}

// write writes records, or counts them. While nothing can be written only tick tries again.
func (p *pen) write(list []Record) {
	err := p.failed
	if err == nil {
		if err = p.append(time.Now(), list); err != nil {
			p.fail(err)
		}
	}
	if err != nil {
		p.lose(len(list), list[0].Time)
		return
	}
	for i := range list {
		if list[i].urgent() {
			p.sync()
			return
		}
	}
}

// append writes records, and before them how many are missing there.
func (p *pen) append(now time.Time, list []Record) (err error) {
	if p.w == nil {
		if p.w, err = OpenWriter(p.recorder.dir, p.recorder.options); err != nil {
			return err
		}
		p.w.After(p.last)
	}
	r := p.recorder
	r.mu.Lock()
	full := r.full
	r.full = loss{}
	r.mu.Unlock()
	missing := loss{p.lost.count, p.lost.since}
	missing.add(int(full.count), full.since)
	if missing.count > 0 {
		why := "the disk was too slow"
		if p.failed != nil {
			why = p.failed.Error()
		}
		list = append([]Record{{Time: now, Kind: RecordsLost, Count: missing.count, Since: missing.since.UTC(), Detail: clean(why)}}, list...)
	}
	if len(list) == 0 {
		return nil
	}
	err = p.w.Append(now, list...)
	if err != nil {
		p.lost = missing
		return err
	}
	p.last = p.w.Head()
	if missing.count > 0 {
		p.log.Warn("audit records were lost", "count", missing.count, "since", missing.since)
	}
	p.lost = loss{}
	p.unsynced += len(list)
	return nil
}

// tick tries again after an error, and brings everything to the disk.
func (p *pen) tick(now time.Time) {
	if err := p.append(now, nil); err != nil {
		p.fail(err)
		return
	}
	if p.sync() && p.failed != nil {
		p.failed = nil
		p.recorder.problem.Store(nil)
		p.log.Info("the audit is written again")
	}
}

func (p *pen) sync() bool {
	if p.w == nil {
		return false
	}
	if err := p.w.Sync(); err != nil {
		p.lose(p.unsynced, time.Now())
		p.fail(fmt.Errorf("%w: the records before may not be on the disk", err))
		return false
	}
	p.unsynced = 0
	return true
}

func (p *pen) lose(n int, since time.Time) {
	p.lost.add(n, since)
	p.recorder.lost.Add(uint64(n))
}

// fail says once that nothing is written.
func (p *pen) fail(err error) {
	p.close()
	p.unsynced = 0
	text := err.Error()
	p.recorder.problem.Store(&text)
	if p.failed == nil {
		p.log.Error("the audit cannot be written: its records are counted until it can", "err", err)
	}
	p.failed = err
}

// turn is what an hour brings: a new day's file, and the end of old ones.
func (p *pen) turn(now time.Time) {
	if p.append(now, nil) != nil || p.failed != nil {
		return // tick's to tell
	}
	err := p.w.Turn(now)
	switch {
	case err == nil:
		p.kept = false
	case !errors.Is(err, ErrKept):
		p.fail(err)
	case !p.kept:
		p.kept = true
		p.log.Error("audit files are kept longer than log.audit_keep", "err", err)
	}
}

// sayHead logs the newest record's number and hash when it is on the disk, whatever the log's level: it is what shows
// elsewhere that the files were cut off or written anew.
func (p *pen) sayHead() {
	if !p.sync() || p.w.Head() == (Head{}) {
		return
	}
	h := p.w.Head()
	line := slog.NewRecord(time.Now(), slog.LevelInfo, HeadMessage, 0)
	line.AddAttrs(slog.String("dir", p.recorder.dir), slog.String("head", h.String()))
	_ = p.log.Handler().Handle(context.Background(), line) // a log that fails has nowhere to say so
}

// HeadMessage is the message of the log's lines that hold heads. Their attributes are dir and head.
const HeadMessage = "audit head"

func (p *pen) close() {
	if p.w != nil {
		p.w.Close()
		p.w = nil
	}
}
