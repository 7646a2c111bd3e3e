package audit

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"regexp"
	"slices"
	"strconv"
	"time"
)

// file is one file of the audit, by its name.
type file struct {
	name   string
	number uint64
	day    time.Time // midnight, UTC
}

var fileName = regexp.MustCompile(`^([0-9]{8,})-([0-9]{4}-[0-9]{2}-[0-9]{2})\.jsonl$`)

// IsFile tells whether a name is one of the audit's files.
func IsFile(name string) bool { _, ok := parseName(name); return ok }

func parseName(name string) (f file, ok bool) {
	m := fileName.FindStringSubmatch(name)
	if m == nil {
		return file{}, false
	}
	n, err := strconv.ParseUint(m[1], 10, 63)
	day, err2 := time.Parse(time.DateOnly, m[2])
	return file{name, n, day}, err == nil && err2 == nil
}

func makeName(number uint64, day time.Time) file {
	return file{fmt.Sprintf("%08d-%s.jsonl", number, day.Format(time.DateOnly)), number, day}
}

func dayOf(t time.Time) time.Time { return t.UTC().Truncate(24 * time.Hour) }

// list is the files in the order of the chain.
func list(dir fs.FS) (files []file, err error) {
	entries, err := fs.ReadDir(dir, ".")
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if f, ok := parseName(e.Name()); ok {
			files = append(files, f)
		}
	}
	slices.SortFunc(files, func(a, b file) int { return cmp.Or(cmp.Compare(a.number, b.number), cmp.Compare(a.name, b.name)) })
	return files, nil
}

// expired is how many of the first files are to go: those of which every record is older than keep. Age is told by the days in
// the names alone, counted from the second newest file or the newest, whichever day is earlier: a clock that jumps ahead expires
// nothing before it has stayed there for a day, and a day that lies ahead or far behind between others says nothing.
func expired(files []file, keep time.Duration) (n int) {
	if len(files) < 3 {
		return 0
	}
	last := files[len(files)-2:]
	now := last[0].day
	if last[1].day.Before(now) {
		now = last[1].day
	}
	// The newest or the second newest is one of them.
	day := files[slices.IndexFunc(files, func(f file) bool { return !f.day.After(now) })].day
	for ; n < len(files)-2; n++ {
		if d := files[n].day; d.After(day) && !d.After(now) {
			day = d
		}
		if day.Add(keep + 24*time.Hour).After(now) {
			break
		}
	}
	return n
}

// line is a line of a file, with its newline if it has one, or a piece of a line that is longer than a record can be. It holds
// until the next.
type line struct {
	number int // from 1
	text   []byte
	whole  bool // not a piece, and ends in a newline
}

// eachLine calls fn for every line, until it says stop.
func eachLine(r io.Reader, fn func(line) (more bool)) error {
	in := bufio.NewReaderSize(r, maxLine+1)
	l, piece := line{number: 1}, false
	for {
		var err error
		l.text, err = in.ReadSlice('\n')
		if err != nil && err != io.EOF && !errors.Is(err, bufio.ErrBufferFull) {
			return err
		}
		l.whole = err == nil && !piece
		if len(l.text) == 0 || !fn(l) || err == io.EOF {
			return nil
		}
		if piece = err != nil; !piece {
			l.number++
		}
	}
}

// open is fs.FS's, for a file that may have expired meanwhile: then it is nil.
func open(dir fs.FS, f file) (fs.File, error) {
	in, err := dir.Open(f.name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return in, err
}
