package audit

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"
	"time"
)

// written is the files of a few records of three days, as bytes.
func written(t *testing.T) (fstest.MapFS, Head) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "audit")
	var head Head
	for d := range 3 {
		head = write(t, dir, Options{}, began0.Add(time.Duration(d)*24*time.Hour), "a", "b", "c")
	}
	all := fstest.MapFS{}
	for _, name := range names(t, dir) {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		all[name] = &fstest.MapFile{Data: data}
	}
	return all, head
}

// with is the files with one of them changed.
func with(all fstest.MapFS, name string, data []byte) fstest.MapFS {
	other := fstest.MapFS{}
	for n, f := range all {
		other[n] = f
	}
	other[name] = &fstest.MapFile{Data: data}
	return other
}

func TestEveryChangedByteIsFound(t *testing.T) {
	all, _ := written(t)
	if r := examine(t, all); len(r.Problems)+len(r.Notes) > 0 || r.Records != 12 {
		t.Fatalf("%+v", r)
	}
	for name, f := range all {
		for i := range f.Data {
			for _, bit := range []byte{1, 0x20} {
				data := bytes.Clone(f.Data)
				data[i] ^= bit
				if r := examine(t, with(all, name, data)); len(r.Problems) == 0 {
					t.Fatalf("%s, byte %d of line %q", name, i, data)
				}
			}
		}
	}
}

func TestVerifyNamesWhatWasDone(t *testing.T) {
	all, head := written(t)
	const first, second, third = "00000001-2026-01-02.jsonl", "00000002-2026-01-03.jsonl", "00000003-2026-01-04.jsonl"
	lines := func(name string) [][]byte {
		return bytes.SplitAfter(bytes.TrimSuffix(all[name].Data, []byte("\n")), []byte("\n"))
	}
	join := func(lines ...[]byte) []byte {
		var b []byte
		for _, l := range lines {
			b = append(append(b, bytes.TrimSuffix(l, []byte("\n"))...), '\n')
		}
		return b
	}
	l := lines(second)
	known := Known{head, "the log"}
	at := func(seq uint64) Known {
		_, says, err := split(lines([]string{first, second, third}[(seq-1)/4])[(seq-1)%4])
		if err != nil {
			t.Fatal(err)
		}
		return Known{says, fmt.Sprintf("log %d", seq)}
	}
	without := func(names ...string) fstest.MapFS {
		other := with(all, second, all[second].Data)
		for _, n := range names {
			delete(other, n)
		}
		return other
	}
	// The chain from record 6 on, as who can write the files can make it.
	forged := fstest.MapFS{first: all[first]}
	h := at(4).Head
	for i, name := range []string{second, third} {
		var text []byte
		for j, line := range lines(name) {
			r, _, _, err := parse(line)
			if err != nil {
				t.Fatal(err)
			}
			if i == 0 && j == 1 {
				r.User = "somebody else"
			}
			if j == 0 {
				r.Prev = h.Hash.String()
			}
			if text, h, err = h.append(text, &r); err != nil {
				t.Fatal(err)
			}
		}
		forged[name] = &fstest.MapFile{Data: text}
	}
	for _, test := range []struct {
		name  string
		files fstest.MapFS
		known []Known
		want  string
	}{
		{"changed", with(all, second, bytes.Replace(all[second].Data, []byte(`"user":"b"`), []byte(`"user":"x"`), 1)), nil,
			second + ":3: record 7: its hash does not fit: this record or the one before was changed\n"},
		{"a line that is none", with(all, second, join(l[0], l[1], []byte("x"), l[3])), nil,
			second + ":3: this is no record, and one follows: it was changed\n" +
				second + ":4: record 8: record 7 is missing before it\n"},
		{"removed", with(all, second, join(l[0], l[1], l[3])), nil, second + ":3: record 8: record 7 is missing before it\n"},
		{"two removed", with(all, second, join(l[0], l[3])), nil, second + ":2: record 8: records 6 to 7 are missing before it\n"},
		{"moved", with(all, second, join(l[0], l[2], l[1], l[3])), nil,
			second + ":2: record 7: record 6 is missing before it\n" +
				second + ":3: record 6: it stands behind record 7: records were moved, or this one's number changed\n" +
				second + ":4: record 8: record 7 is missing before it\n"},
		{"twice", with(all, second, join(l[0], l[1], l[1], l[2], l[3])), nil, second + ":3: record 6: it stands here twice\n"},
		{"the first of a file", with(all, second, join(l[1], l[2], l[3])), nil,
			second + ":1: record 6: a file's first record is file-began, this is session-began: what stood before it was removed\n" +
				second + ":1: record 6: record 5 is missing before it\n"},
		{"the end of a file that is not the last", with(all, second, join(l[0], l[1], l[2])), nil, third + ":1: record 9: record 8 is missing before it\n"},
		{"a file", without(second), nil, third + ":1: record 9: records 5 to 8 are missing before it\n"},
		{"the first file", without(first), nil, second + ": records 1 to 4 are missing: no files-expired record tells that they went\n"},
		{"the last file", without(third), []Known{at(3), known, at(5)}, "the end is cut off: the log names record 12, and the last one there is 8, of 2026-01-03T03:04:05Z\n"},
		{"the last file, and nobody knows", without(third), nil, ""},
		{"all files", fstest.MapFS{}, []Known{known}, "the end is cut off: the log names record 12, and there is none\n"},
		{"the end", with(all, third, join(lines(third)[:3]...)), []Known{known}, "the end is cut off: the log names record 12, and the last one there is 11, of 2026-01-04T03:04:05Z\n"},
		{"the end, in a line", with(all, third, all[third].Data[:len(all[third].Data)-9]), []Known{known},
			third + ":4: 242 bytes are no record: cut short by hand, or by a crash, which the daemon's next start would tell of\n" +
				"the end is cut off: the log names record 12, and the last one there is 11, of 2026-01-04T03:04:05Z\n"},
		{"the end of an older file, in a line", with(all, second, all[second].Data[:len(all[second].Data)-9]), nil,
			third + ":1: record 9: record 8 is missing before it\n" +
				second + ":4: 239 bytes are no record: cut short by hand, or by a crash, which the daemon's next start would tell of\n"},
		{"a chain that was computed anew", forged, nil, ""},
		{"a chain that was computed anew, and heads from before", forged, []Known{at(2), at(6), at(10)},
			second + ":2: record 6: its hash is not the one that log 6 has: the files were written anew\n" +
				third + ":2: record 10: its hash is not the one that log 10 has: the files were written anew\n"},
		{"a beginning that follows something", fstest.MapFS{first: {Data: func() []byte {
			r := Record{Time: began0, Kind: FileBegan, Prev: at(3).Hash.String()}
			text, _, err := Head{Hash: at(3).Hash}.append(nil, &r)
			if err != nil {
				t.Fatal(err)
			}
			return text
		}()}}, nil, first + ":1: record 1: it follows a record that is not there: the files were written anew\n"},
	} {
		r := examine(t, test.files, test.known...)
		got := texts(r.Problems)
		if strings.Contains(test.want, " bytes are no record") { // their number is no matter
			got = digits.ReplaceAllString(got, "N bytes")
			test.want = digits.ReplaceAllString(test.want, "N bytes")
		}
		if got != test.want {
			t.Errorf("%s:\n%swant\n%s", test.name, got, test.want)
		}
	}
}

func TestManyProblemsAreCounted(t *testing.T) {
	var data []byte
	for i := range 300 {
		r := Record{Time: began0, Kind: SessionBegan}
		text, _, err := Head{Seq: uint64(2 * i)}.append(nil, &r)
		if err != nil {
			t.Fatal(err)
		}
		data = append(data, text...)
	}
	r := examine(t, fstest.MapFS{"00000001-2026-01-02.jsonl": {Data: data}})
	if len(r.Problems) != maxProblems || r.More != 200 {
		t.Errorf("%d listed, %d more", len(r.Problems), r.More)
	}
}

func TestLineWithoutEndTakesNoMemory(t *testing.T) {
	all, _ := written(t)
	const second = "00000002-2026-01-03.jsonl"
	long := bytes.Repeat([]byte("x"), 5*maxLine)
	r := examine(t, with(all, second, append(append(bytes.Clone(long), '\n'), all[second].Data...)))
	if want := second + ":1: this is no record, and one follows: it was changed\n"; texts(r.Problems) != want || r.Records != 12 {
		t.Errorf("%d records, %s", r.Records, texts(r.Problems))
	}
	r = examine(t, with(all, second, append(bytes.Clone(all[second].Data), long...)))
	if want := fmt.Sprintf("%s:5: %d bytes are no record", second, len(long)); !strings.HasPrefix(texts(r.Problems), want) {
		t.Errorf("%s", texts(r.Problems))
	}
}

// What a file may hold is whatever its disk made of it.
func FuzzFiles(f *testing.F) {
	r := Record{Time: began0, Kind: FileBegan, Prev: Hash{}.String(), Torn: []Torn{{"00000001-2026-01-02.jsonl", 3, "x"}}}
	text, head, err := Head{}.append(nil, &r)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text, []byte{})
	r = Record{Time: began0, Kind: FilesExpired, Prev: Hash{}.String(), Through: 1 << 63}
	more, _, err := head.append(nil, &r)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(append(text, more...), more)
	f.Add([]byte("{\"seq\":18446744073709551615\n"), append(text, 0, 0, '\n'))
	f.Add([]byte("xxx"), []byte("\n\n\n"))
	f.Fuzz(func(t *testing.T, a, b []byte) {
		dir, err := os.MkdirTemp("/dev/shm", "audit") // a disk would make it a hundred times slower
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(dir)
		for i, data := range [][]byte{a, b} {
			if err := os.WriteFile(filepath.Join(dir, makeName(uint64(i+1), began0).name), data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		whole := 0
		broken, err := Query(os.DirFS(dir), Filter{}, func(*Record) error { whole++; return nil })
		if err != nil {
			t.Fatal(err)
		}
		before := examine(t, os.DirFS(dir))
		if before.Records != uint64(whole) {
			t.Fatalf("Query sees %d records, Verify %d", whole, before.Records)
		}
		if broken > 0 && len(before.Problems) == 0 {
			t.Fatalf("%d lines are no records, and that is no problem", broken)
		}
		w := openWriter(t, dir, Options{Keep: time.Hour})
		if err := w.Append(began0, Record{Time: began0, Kind: SessionBegan, User: "last"}); err != nil {
			t.Fatal(err)
		}
		w.Close()
		if _, err := Query(os.DirFS(dir), Filter{User: "last"}, func(*Record) error { whole = -1; return nil }); err != nil || whole != -1 {
			t.Fatalf("what was written after is not found: %v", err)
		}
		after := examine(t, os.DirFS(dir))
		if after.Head != w.Head().String() {
			t.Fatalf("head %s, and %v was written", after.Head, w.Head())
		}
	})
}
