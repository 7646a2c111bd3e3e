package audit

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"slices"
	"time"
)

// Place is where something was found. Line is 0 for a whole file, Seq where no record is meant.
type Place struct {
	File string `json:"file,omitempty"`
	Line int    `json:"line,omitempty"`
	Seq  uint64 `json:"seq,omitempty"`
	Text string `json:"text"`
}

func (p Place) String() string {
	s := p.File
	if p.Line > 0 {
		s += fmt.Sprintf(":%d", p.Line)
	}
	if p.Seq > 0 {
		if s += ": "; p.File == "" {
			s = ""
		}
		s += fmt.Sprintf("record %d", p.Seq)
	}
	if s == "" {
		return p.Text
	}
	return s + ": " + p.Text
}

// Known is a head that somebody else kept.
type Known struct {
	Head
	From string // who, for people: "the journal of 2026-01-02 03:04:05"
}

// Report is what Verify found. No problems: every record is as it was written, but for those after the newest known head,
// which the chain alone vouches for.
type Report struct {
	Files    int       `json:"files"`
	Records  uint64    `json:"records"`
	First    time.Time `json:"first,omitzero"`
	Last     time.Time `json:"last,omitzero"`
	Begins   uint64    `json:"begins,omitempty"` // the first record's number
	Head     string    `json:"head,omitempty"`
	Heads    int       `json:"heads"` // known ones that were found in the chain
	Problems []Place   `json:"problems"`
	More     int       `json:"more,omitempty"` // problems that are not listed
	Notes    []Place   `json:"notes"`          // what crashes and full disks left
}

// maxProblems bounds what a report lists.
const maxProblems = 100

// Verify reads every file of a directory. The daemon may be writing meanwhile. An error is one of reading.
func Verify(dir fs.FS, known []Known) (*Report, error) { return verify(dir, known, time.Sleep) }

func verify(dir fs.FS, known []Known, pause func(time.Duration)) (*Report, error) {
	v := &verifier{dir: dir, pause: pause, known: map[uint64][]Known{}, noted: map[Torn]time.Time{}, report: &Report{Problems: []Place{}, Notes: []Place{}}}
	for _, k := range known {
		v.known[k.Seq] = append(v.known[k.Seq], k)
	}
	files, err := list(dir)
	if err != nil {
		return nil, err
	}
	for i, f := range files {
		if err := v.file(f, i == len(files)-1); err != nil {
			return nil, err
		}
	}
	v.finish()
	return v.report, nil
}

type verifier struct {
	dir    fs.FS
	pause  func(time.Duration)
	known  map[uint64][]Known
	report *Report

	begun bool
	first string // file
	start Head   // before the first record there is
	head  Head   // of the record read last
	gone  []Head // up to where files-expired records vouch
	tears []Torn
	lines []int // of tears
	noted map[Torn]time.Time
}

func (v *verifier) problem(file string, line int, seq uint64, format string, a ...any) {
	if len(v.report.Problems) == maxProblems {
		v.report.More++
		return
	}
	v.report.Problems = append(v.report.Problems, Place{file, line, seq, fmt.Sprintf(format, a...)})
}

func (v *verifier) note(file string, line int, seq uint64, format string, a ...any) {
	if len(v.report.Notes) < maxProblems {
		v.report.Notes = append(v.report.Notes, Place{file, line, seq, fmt.Sprintf(format, a...)})
	}
}

// settle is how often, and after which pause, the end of the newest file is read again where a line is not whole: the daemon
// may be writing it.
const (
	settleTries = 10
	settlePause = 100 * time.Millisecond
)

func (v *verifier) file(f file, newest bool) error {
	read, lines := int64(0), 0 // up to the last whole record
	for try := 0; ; try++ {
		in, err := open(v.dir, f)
		if in == nil || err != nil {
			return err
		}
		torn := tear{sum: sha256.New()}
		if _, err = io.CopyN(io.Discard, in, read); err == nil {
			begun := lines
			err = eachLine(in, func(l line) bool {
				l.number += begun
				r, body, says, err := parse(l.text)
				if err != nil || !l.whole {
					torn.add(l)
					return true
				}
				if torn.bytes > 0 {
					v.problem(f.name, torn.line, 0, "this is no record, and one follows: it was changed")
				}
				if lines == 0 && r.Kind != FileBegan {
					v.problem(f.name, l.number, r.Seq, "a file's first record is %s, this is %s: what stood before it was removed", FileBegan, r.Kind)
				}
				v.record(f.name, l.number, &r, body, says)
				read, lines = read+torn.bytes+int64(len(l.text)), l.number
				torn.reset()
				return true
			})
		}
		if err := errors.Join(err, in.Close()); err != nil {
			return fmt.Errorf("%s: %w", f.name, err)
		}
		if torn.bytes == 0 {
			break
		}
		if !newest || try == settleTries {
			v.tears, v.lines = append(v.tears, torn.in(f)), append(v.lines, torn.line)
			break
		}
		v.pause(settlePause)
	}
	v.report.Files++
	return nil
}

// record holds one against the one before.
func (v *verifier) record(file string, line int, r *Record, body []byte, says Head) {
	prev, _ := hex.DecodeString(r.Prev)
	named := len(prev) == len(Hash{})
	if !v.begun {
		v.begun, v.first, v.report.First, v.report.Begins = true, file, r.Time, r.Seq
		if v.start.Seq = r.Seq - 1; named {
			v.start.Hash = Hash(prev)
		}
		v.head = v.start
	}
	switch was := v.head.Seq; {
	case r.Seq == was:
		v.problem(file, line, r.Seq, "it stands here twice")
	case r.Seq < was:
		v.problem(file, line, r.Seq, "it stands behind record %d: records were moved, or this one's number changed", was)
	case r.Seq == was+2:
		v.problem(file, line, r.Seq, "record %d is missing before it", was+1)
	case r.Seq > was+1:
		v.problem(file, line, r.Seq, "records %d to %d are missing before it", was+1, r.Seq-1)
	case v.head.Hash.next(body) != says.Hash:
		v.problem(file, line, r.Seq, "its hash does not fit: this record or the one before was changed")
	}
	for _, k := range v.known[r.Seq] {
		if k.Hash == says.Hash {
			v.report.Heads++
		} else {
			v.problem(file, line, r.Seq, "its hash is not the one that %s has: the files were written anew", k.From)
		}
	}
	switch r.Kind {
	case FilesExpired:
		if named {
			v.gone = append(v.gone, Head{r.Through, Hash(prev)})
		}
	case FileBegan:
		for _, t := range r.Torn {
			v.noted[t] = r.Time
		}
	case RecordsLost:
		v.note(file, line, r.Seq, "%d records since %s are not there: %s", r.Count, r.Since.UTC().Format(time.RFC3339), r.Detail)
	}
	v.head, v.report.Last = says, r.Time
	v.report.Records++
}

// finish judges what takes all files to know.
func (v *verifier) finish() {
	for i, t := range v.tears {
		if at, ok := v.noted[t]; ok {
			v.note(t.File, v.lines[i], 0, "%d bytes that a crash tore, found by the start at %s", t.Bytes, at.UTC().Format(time.RFC3339))
			continue
		}
		v.problem(t.File, v.lines[i], 0, "%d bytes are no record: cut short by hand, or by a crash, which the daemon's next start would tell of", t.Bytes)
	}
	if v.begun && v.start != (Head{}) && !slices.Contains(v.gone, v.start) {
		text := "no files-expired record tells that they went"
		if v.start.Seq == 0 {
			v.problem(v.first, 1, 1, "it follows a record that is not there: the files were written anew")
		} else {
			v.problem(v.first, 0, 0, "records 1 to %d are missing: %s", v.start.Seq, text)
		}
	}
	var newest Known
	for seq, list := range v.known {
		if seq > newest.Seq {
			newest = list[0]
		}
	}
	if newest.Seq > v.head.Seq {
		end := "there is none"
		if v.begun {
			end = fmt.Sprintf("the last one there is %d, of %s", v.head.Seq, v.report.Last.UTC().Format(time.RFC3339))
		}
		v.problem("", 0, 0, "the end is cut off: %s names record %d, and %s", newest.From, newest.Seq, end)
	}
	if v.begun {
		v.report.Head = v.head.String()
	}
}

// tear collects what stands at the end of a file and is no record.
type tear struct {
	sum   hash.Hash
	bytes int64
	line  int // the first of it
}

func (t *tear) add(l line) {
	if t.bytes == 0 {
		t.line = l.number
	}
	t.sum.Write(l.text)
	t.bytes += int64(len(l.text))
}

func (t *tear) reset() {
	if t.bytes > 0 {
		t.sum.Reset()
		t.bytes = 0
	}
}

func (t *tear) in(f file) Torn {
	return Torn{File: f.name, Bytes: t.bytes, SHA256: hex.EncodeToString(t.sum.Sum(nil))}
}
