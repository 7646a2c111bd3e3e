package identity

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"syscall"
	"time"
)

const (
	// lookEvery is how often files are looked at. A change counts once two looks in a row find the file the same, so it acts
	// after twice that time, and what is being written is not read.
	lookEvery = 250 * time.Millisecond
	// retryEvery is how often a bad file that did not change is read again: a clock or a disk may have been at fault.
	retryEvery = 10 * time.Second
	// maxFile bounds a file, bytes: a CRL of a million certificates has about 40 MB.
	maxFile = 64 << 20
)

var errNotFile = errors.New("not a file")

// stamp tells one content of a file from another. The zero value is of a file that cannot be looked at.
type stamp struct {
	dev, ino     uint64
	size         int64
	mtime, ctime syscall.Timespec
}

func stampOf(info os.FileInfo) stamp {
	st := info.Sys().(*syscall.Stat_t)
	return stamp{st.Dev, st.Ino, st.Size, st.Mtim, st.Ctim}
}

// watched is a file that may change under us: replaced, as it should be, or written in place. Events of the kernel are no
// help with the second, nor with symbolic links and network file systems; looking is.
type watched struct {
	path   string // empty: none
	seen   stamp  // at the last look
	read   stamp  // of what was read last
	tried  time.Time
	failed bool // what was read last was bad
}

// changed reads the file where it is another than the one read last.
func (w *watched) changed(now time.Time, atOnce bool) (data []byte, err error, changed bool) {
	if w.path == "" {
		return nil, nil, false
	}
	var is stamp
	info, err := os.Stat(w.path)
	if err == nil {
		is = stampOf(info)
		if !info.Mode().IsRegular() { // a pipe would be waited for
			err = errNotFile
		}
	}
	rests := is == w.seen
	w.seen = is
	again := w.failed && now.Sub(w.tried).Abs() >= retryEvery
	if !atOnce && (!rests || is == w.read && !again) {
		return nil, nil, false
	}
	if err == nil {
		var after stamp
		if data, after, err = readFile(w.path); err == nil && after != is && !atOnce {
			return nil, nil, false // it changed meanwhile: the next look sees to it
		}
	}
	w.read, w.tried = is, now
	return data, err, true
}

func readFile(path string) (data []byte, after stamp, err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a pipe may have taken its place since it was looked at
	if err != nil {
		return nil, after, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, after, err
	}
	if !info.Mode().IsRegular() {
		return nil, after, errNotFile
	}
	if data, err = io.ReadAll(io.LimitReader(f, maxFile+1)); err != nil {
		return nil, after, err
	}
	if len(data) > maxFile {
		return nil, after, fmt.Errorf("longer than %d bytes", maxFile)
	}
	if info, err = f.Stat(); err != nil {
		return nil, after, err
	}
	return data, stampOf(info), nil
}

// Follow takes up changes of an external authority's files, logs them and what is wrong with them, and calls changed after
// whatever may have put somebody out, until ctx ends. It calls it once at its beginning.
func (v *Verifier) Follow(ctx context.Context, log *slog.Logger, changed func()) error {
	x := v.external
	if x == nil {
		return nil
	}
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	var f follower
	for {
		f.step(v, log, changed)
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		x.look(v.now(), false)
	}
}

// follower is what Follow has told.
type follower struct {
	trust    *trust
	current  int // CRLs
	problems map[string]bool
}

func (f *follower) step(v *Verifier, log *slog.Logger, changed func()) {
	x, now := v.external, v.now()
	t, current := x.trust.Load(), 0
	for _, c := range t.crls {
		if c.current(now) {
			current++
		}
	}
	if t != f.trust {
		x.describe(log, f.trust, t)
	}
	if t != f.trust || current != f.current {
		f.trust, f.current = t, current
		changed()
	}
	problems := map[string]bool{}
	for _, p := range v.Problems() {
		problems[p.Text] = true
		if f.problems[p.Text] {
			continue
		}
		level := slog.LevelError
		if p.Soon {
			level = slog.LevelWarn
		}
		log.Log(context.Background(), level, "problem of an identity file", "err", p.Text)
	}
	if len(problems) == 0 && len(f.problems) > 0 {
		log.Info("identity files are in order again")
	}
	f.problems = problems
}
