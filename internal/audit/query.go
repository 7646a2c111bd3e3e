package audit

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io/fs"
	"slices"
	"time"
)

// Filter says which records are meant. Empty fields do not restrict.
type Filter struct {
	User    string
	Session string
	ID      string
	Kinds   []Kind
	Since   time.Time
	Until   time.Time // exclusive
}

// Match tells whether a record is meant.
func (f *Filter) Match(r *Record) bool {
	return (f.User == "" || r.User == f.User) && (f.Session == "" || r.Session == f.Session) && (f.ID == "" || r.ID == f.ID) &&
		(len(f.Kinds) == 0 || slices.Contains(f.Kinds, r.Kind)) &&
		(f.Since.IsZero() || !r.Time.Before(f.Since)) && (f.Until.IsZero() || r.Time.Before(f.Until))
}

// needs are bytes that every line has which matches: to look for them is much cheaper than to read the line.
func (f *Filter) needs() (all [][]byte) {
	for _, s := range []string{f.User, f.Session, f.ID} {
		if s != "" {
			var b bytes.Buffer
			e := json.NewEncoder(&b)
			e.SetEscapeHTML(false)
			_ = e.Encode(s) // a string
			all = append(all, bytes.TrimSpace(b.Bytes()))
		}
	}
	return all
}

// near is how far a record's time may be from the day in its file's name: a clock that is set right moves it by less.
const near = 2 * 24 * time.Hour

// skips tells whether nothing in a file can match, by its day and the next one's.
func (f *Filter) skips(files []file, i int) bool {
	return !f.Until.IsZero() && files[i].day.After(f.Until.Add(near)) ||
		!f.Since.IsZero() && i+1 < len(files) && files[i].day.Before(f.Since.Add(-near)) && files[i+1].day.Before(f.Since.Add(-near))
}

// Query calls fn for every record that matches, oldest first. Lines that are no records are passed over and counted: they are
// Verify's. The daemon may be writing meanwhile.
func Query(dir fs.FS, f Filter, fn func(*Record) error) (broken int, err error) {
	files, err := list(dir)
	if err != nil {
		return 0, err
	}
	for i := range files {
		if f.skips(files, i) {
			continue
		}
		n, err := queryFile(dir, files[i], &f, fn)
		if broken += n; err != nil {
			return broken, err
		}
	}
	return broken, nil
}

// Backward is Query from the newest file to the oldest, until enough says so after one of them. Within a file the oldest record
// comes first.
func Backward(dir fs.FS, f Filter, fn func(*Record), enough func() bool) error {
	files, err := list(dir)
	if err != nil {
		return err
	}
	for i := len(files) - 1; i >= 0 && !enough(); i-- {
		if f.skips(files, i) {
			continue
		}
		if _, err := queryFile(dir, files[i], &f, func(r *Record) error { fn(r); return nil }); err != nil {
			return err
		}
	}
	return nil
}

func queryFile(dir fs.FS, of file, f *Filter, fn func(*Record) error) (broken int, err error) {
	in, err := open(dir, of)
	if in == nil || err != nil {
		return 0, err
	}
	defer in.Close()
	needs, last := f.needs(), 0
	var stop error
	if err := eachLine(in, func(l line) bool {
		if _, _, err := split(l.text); err != nil || !l.whole {
			if l.number != last {
				broken, last = broken+1, l.number
			}
			return true
		}
		for _, n := range needs {
			if !bytes.Contains(l.text, n) {
				return true
			}
		}
		r, _, _, err := parse(l.text)
		switch {
		case err != nil:
			broken++
		case f.Match(&r):
			stop = fn(&r)
		}
		return stop == nil
	}); err != nil {
		return broken, fmt.Errorf("%s: %w", of.name, err)
	}
	return broken, stop
}
