package audit

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"perimeterd/internal/quota"
)

var digits = regexp.MustCompile(`[0-9]+ bytes`)

// paper is what a log is written on.
type paper struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (p *paper) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.text.Write(b)
}

func (p *paper) String() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.text.String()
}

// start runs a Recorder; stop ends it, and returns when all is written.
func start(t *testing.T, dir string, log *slog.Logger) (r *Recorder, stop func()) {
	t.Helper()
	r = NewRecorder(dir, Options{Reserved: 1}, log)
	return r, run(t, r)
}

func run(t *testing.T, r *Recorder) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return stop
}

func all(t *testing.T, dir string, f Filter) (list []Record) {
	t.Helper()
	broken, err := Query(os.DirFS(dir), f, func(r *Record) error { list = append(list, *r); return nil })
	if broken > 0 || err != nil {
		t.Fatalf("%d lines are no records, %v", broken, err)
	}
	return list
}

func eventually(t *testing.T, what string, fn func() bool) {
	t.Helper()
	for range 3000 {
		if fn() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("not in half a minute: %s", what)
}

func TestEverythingAddedIsWrittenWhileItIsRead(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	r, stop := start(t, dir, slog.New(slog.DiscardHandler))
	var wg sync.WaitGroup
	const each = 500
	for i := range 8 {
		wg.Go(func() {
			for j := range each {
				r.Add(Record{Kind: Connection, User: fmt.Sprint("u", i), Up: int64(j)})
				if j%50 == 0 {
					time.Sleep(time.Millisecond)
				}
			}
		})
	}
	eventually(t, "a file", func() bool { _, err := os.Stat(dir); return err == nil })
	reading := make(chan struct{})
	wg.Go(func() {
		for {
			report, err := Verify(os.DirFS(dir), nil)
			if err != nil || len(report.Problems) > 0 {
				t.Errorf("%v %+v", err, report)
			}
			if _, err := Query(os.DirFS(dir), Filter{}, func(*Record) error { return nil }); err != nil {
				t.Error(err)
			}
			select {
			case <-reading:
				return
			default:
			}
		}
	})
	eventually(t, "all are in the file", func() bool { return len(all(t, dir, Filter{})) == 1+8*each })
	close(reading)
	wg.Wait()
	stop()
	for i := range 8 {
		list := all(t, dir, Filter{User: fmt.Sprint("u", i)})
		for j, record := range list {
			if record.Up != int64(j) || len(list) != each {
				t.Fatalf("user %d: record %d of %d says %d", i, j, len(list), record.Up)
			}
		}
	}
}

func TestFullQueueIsToldInTheChain(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	r := NewRecorder(dir, Options{Reserved: 1}, slog.New(slog.DiscardHandler))
	for i := range queueSize + 7 { // nobody writes yet
		r.Add(Record{Time: began0.Add(time.Duration(i) * time.Second), Kind: Connection})
	}
	run(t, r)()
	lost := all(t, dir, Filter{Kinds: []Kind{RecordsLost}})
	if len(lost) != 1 || lost[0].Count != 7 || !lost[0].Since.Equal(began0.Add(queueSize*time.Second)) || lost[0].Detail != "the disk was too slow" {
		t.Errorf("%+v", lost)
	}
	if n := len(all(t, dir, Filter{Kinds: []Kind{Connection}})); n != queueSize {
		t.Errorf("%d were written", n)
	}
	if rep := examine(t, os.DirFS(dir)); len(rep.Problems) > 0 || len(rep.Notes) != 1 {
		t.Errorf("%+v", rep)
	}
}

// The file system is a small one in a mount namespace of another process.
func TestFullDiskIsSaidOnceCountedAndTold(t *testing.T) {
	const inside = "PERIMETERD_TEST_FULL_DISK"
	disk := os.Getenv(inside)
	if disk == "" {
		disk := t.TempDir()
		c := exec.Command("unshare", "--mount", "--propagation", "private", os.Args[0], "-test.run", "^"+t.Name()+"$", "-test.v", "-test.timeout", "2m")
		c.Env = append(os.Environ(), inside+"="+disk)
		out, err := c.CombinedOutput()
		if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	if err := unix.Mount("full", disk, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	filler := filepath.Join(disk, "filler")
	fill := func() {
		f, err := os.Create(filler)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := io.Copy(f, zero{}); err == nil {
			t.Fatal("the disk has no end")
		}
	}
	var p paper
	dir := filepath.Join(disk, "audit")
	r, stop := start(t, dir, slog.New(slog.NewTextHandler(&p, nil)))
	r.Add(Record{Kind: Connection, User: "before"})
	eventually(t, "the first record", func() bool {
		_, err := os.Stat(dir)
		return err == nil && len(all(t, dir, Filter{User: "before"})) == 1
	})
	const lost = 3000 // more than what is left of the last page
	for range 2 {
		fill()
		for range lost {
			r.Add(Record{Kind: Connection, User: "lost", Detail: strings.Repeat("x", 100)})
		}
		eventually(t, "a problem", func() bool { return strings.Contains(r.Problem(), "no space left on device") && len(r.queue) == 0 })
		time.Sleep(3 * syncEvery) // it tries, and fails, and does not say so again
		if err := os.Remove(filler); err != nil {
			t.Fatal(err)
		}
		eventually(t, "no problem", func() bool { return r.Problem() == "" })
	}
	r.Add(Record{Kind: Connection, User: "after"})
	stop()
	there, gone := len(all(t, dir, Filter{User: "lost"})), uint64(0)
	told := all(t, dir, Filter{Kinds: []Kind{RecordsLost}})
	for _, record := range told {
		gone += record.Count
	}
	if len(told) != 2 || r.Lost() != gone || uint64(there)+gone != 2*lost || len(all(t, dir, Filter{User: "after"})) != 1 {
		t.Errorf("%d are there, %d told to be lost: %+v", there, gone, told)
	}
	if rep, err := Verify(os.DirFS(dir), nil); err != nil || len(rep.Problems) > 0 {
		t.Errorf("%v %+v", err, rep)
	}
	if text := p.String(); strings.Count(text, "the audit cannot be written") != 2 || strings.Count(text, "the audit is written again") != 2 {
		t.Errorf("the log:\n%s", text)
	}
}

func TestFileThatIsTakenAwayIsNoticedAndMissing(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	var p paper
	r, stop := start(t, dir, slog.New(slog.NewTextHandler(&p, nil)))
	r.Add(Record{Kind: DaemonStarted})
	eventually(t, "the first record", func() bool { _, err := os.Stat(dir); return err == nil && len(all(t, dir, Filter{})) == 2 })
	if err := os.Remove(filepath.Join(dir, names(t, dir)[0])); err != nil {
		t.Fatal(err)
	}
	n := 0
	eventually(t, "a line", func() bool {
		n++
		r.Add(Record{Kind: Operator, User: fmt.Sprint(n)}) // each is brought to the disk
		return strings.Contains(p.String(), "somebody removed or replaced it")
	})
	eventually(t, "no problem", func() bool { return r.Problem() == "" })
	r.Add(Record{Kind: DaemonStopped})
	stop()
	lost, last := all(t, dir, Filter{Kinds: []Kind{RecordsLost}}), all(t, dir, Filter{Kinds: []Kind{DaemonStopped}})
	if len(lost) != 1 || len(last) != 1 || last[0].Seq <= 2+uint64(n)-lost[0].Count {
		t.Errorf("%+v %+v, %d added", lost, last, n)
	}
	if rep := examine(t, os.DirFS(dir)); len(rep.Problems) != 1 || !strings.Contains(texts(rep.Problems), "are missing: no files-expired record tells that they went") {
		t.Errorf("%s", texts(rep.Problems))
	}
}

type zero struct{}

func (zero) Read(b []byte) (int, error) { clear(b); return len(b), nil }

func TestHeadsInTheLogShowWhatWasCutOff(t *testing.T) {
	for name, handler := range map[string]func(io.Writer, *slog.HandlerOptions) slog.Handler{
		"json": func(w io.Writer, o *slog.HandlerOptions) slog.Handler { return slog.NewJSONHandler(w, o) },
		"text": func(w io.Writer, o *slog.HandlerOptions) slog.Handler { return slog.NewTextHandler(w, o) },
	} {
		dir := filepath.Join(t.TempDir(), "the audit")
		var p paper
		log := slog.New(handler(&p, &slog.HandlerOptions{Level: slog.LevelError})) // heads are logged all the same
		for range 2 {
			r, stop := start(t, dir, log)
			r.Add(Record{Kind: DaemonStarted})
			stop()
		}
		known, err := LoggedHeads(strings.NewReader("noise\n{\"msg\":\"audit head\"}\n"+p.String()), dir)
		if err != nil || len(known) != 4 || known[3].Seq != 3 || !strings.HasPrefix(known[3].From, "the log of 20") {
			t.Fatalf("%s: %v %+v\n%s", name, err, known, p.String())
		}
		if other, err := LoggedHeads(strings.NewReader(p.String()), dir+"2"); err != nil || len(other) > 0 {
			t.Errorf("%s: heads of another directory: %+v %v", name, other, err)
		}
		if rep := examine(t, os.DirFS(dir), known...); len(rep.Problems) > 0 || rep.Heads != 4 {
			t.Errorf("%s: %+v", name, rep)
		}
		file := filepath.Join(dir, names(t, dir)[0])
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		text = text[:bytes.LastIndexByte(text[:len(text)-1], '\n')+1]
		if err := os.WriteFile(file, text, 0o600); err != nil {
			t.Fatal(err)
		}
		if rep := examine(t, os.DirFS(dir), known...); len(rep.Problems) != 1 || !strings.HasPrefix(rep.Problems[0].Text, "the end is cut off: ") {
			t.Errorf("%s: %+v", name, rep)
		}
	}
}

// A week with a record every half day, of which two days are kept.
func TestDaysBeginFilesOldOnesGoAndEveryHourHasItsHead(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	var p paper
	synctest.Test(t, func(t *testing.T) {
		r := NewRecorder(dir, Options{Reserved: 1, Keep: 2 * 24 * time.Hour}, slog.New(slog.NewJSONHandler(&p, nil)))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- r.Run(ctx) }()
		for range 14 {
			r.Add(Record{Kind: Connection})
			time.Sleep(12 * time.Hour)
		}
		time.Sleep(time.Minute)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	files := names(t, dir)
	if len(files) != 4 || files[0] != "00000005-2000-01-05.jsonl" {
		t.Errorf("%v", files)
	}
	heads, err := LoggedHeads(strings.NewReader(p.String()), dir)
	if n := 1 + 7*24; err != nil || len(heads) < n || len(heads) > n+1 {
		t.Errorf("%d heads in a week, want one at the start and one an hour; %v", len(heads), err)
	}
	rep := examine(t, os.DirFS(dir), heads...)
	if len(rep.Problems)+len(rep.Notes) > 0 || rep.Heads == 0 || rep.Begins == 1 {
		t.Errorf("%+v", rep)
	}
	if list := all(t, dir, Filter{Kinds: []Kind{Connection}}); len(list) != 6 {
		t.Errorf("%d records of the last days", len(list))
	}
}

func TestStrangersFillNoDisk(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	r := NewRecorder(dir, Options{Reserved: 1}, slog.New(slog.DiscardHandler))
	day := 12 * time.Hour
	for i := range 100_000 {
		r.AddStranger(Record{Time: began0.Add(time.Duration(i) * day / 100_000), Kind: TokenRefused})
	}
	if n := len(r.queue); n > int(day/strangerEvery)+strangerBurst+1 || n < int(day/strangerEvery) {
		t.Errorf("%d records in half a day", n)
	}
	at := began0.Add(day)
	r.AddStranger(Record{Time: at, Kind: WindowOpened, Sequence: true})
	if last := r.Recent()[len(r.Recent())-1]; last.Kind != WindowOpened {
		t.Errorf("refusals hide an opening: %+v", last)
	}
	for len(r.queue) > 10 { // as if they were written
		<-r.queue
	}
	run(t, r)()
	var left uint64
	for _, record := range all(t, dir, Filter{}) {
		left += record.Count
	}
	if last := all(t, dir, Filter{Kinds: []Kind{LeftOut}}); len(last) != 1 || left == 0 {
		t.Errorf("%d left out, %+v", left, last)
	}
}

func TestWhatIsRefusedToOneFillsNoDiskAndHidesNothing(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	r := NewRecorder(dir, Options{Reserved: 1}, slog.New(slog.DiscardHandler))
	for range 1000 {
		r.AddRefused("", Record{Time: began0, Kind: ProxyRefused, User: "mallory"})
		r.AddRefused("joe (1000)", Record{Time: began0, Kind: Operator, Action: "POST /"})
	}
	r.AddRefused("", Record{Time: began0, Kind: RequestRefused, User: "alice"})
	r.AddRefused("", Record{Time: began0.Add(time.Minute), Kind: ProxyRefused, User: "mallory"})
	r.AddRefused("", Record{Time: began0, Kind: ProxyRefused, User: "mallory"})
	run(t, r)()
	told := map[string]uint64{}
	for _, a := range all(t, dir, Filter{}) {
		told[a.User+a.By+" "+string(a.Kind)] += a.Count
	}
	if n := len(all(t, dir, Filter{Kinds: []Kind{ProxyRefused}, User: "mallory"})); n < quota.Burst+1 || n > quota.Burst+2 {
		t.Errorf("%d refusals of mallory", n)
	}
	if told["mallory proxy-refused"] != 1000-quota.Burst || told["joe (1000) left-out"] != 1000-quota.Burst {
		t.Errorf("%v", told)
	}
	if n := len(all(t, dir, Filter{Kinds: []Kind{RequestRefused}, User: "alice"})); n != 1 {
		t.Errorf("%d of another's are there", n)
	}
}

func TestTextsOfOutsidersAreOneLineAndShowWhatTheyAre(t *testing.T) {
	for in, want := range map[string]string{
		"alice":                  "alice",
		"Zoë":                    "Zoë",
		`a"b\c`:                  `a"b\c`,
		"a\nb":                   `"a\nb"`,
		"\x1b[2J":                `"\x1b[2J"`,
		"\u009b2J":               `"\u009b2J"`,
		"\u202eecila":            `"\u202eecila"`,
		"\xff\xfe":               `"\xff\xfe"`,
		"a\u2028b":               `"a\u2028b"`,
		strings.Repeat("x", 600): strings.Repeat("x", 509) + "…",
		strings.Repeat("ä", 300): strings.Repeat("ä", 254) + "…",
	} {
		if got := clean(in); got != want {
			t.Errorf("%q: got %q, want %q", in, got, want)
		}
	}
	worst := Record{Time: began0, Kind: SessionBegan}
	for _, s := range []*string{&worst.ID, &worst.User, &worst.Device, &worst.Session, &worst.Source, &worst.Address, &worst.Method, &worst.Destination,
		&worst.Decision, &worst.Reason, &worst.Dialed, &worst.End, &worst.Action, &worst.By, &worst.Detail} {
		*s = strings.Repeat("\"\n\x00\u2028", 500)
	}
	worst.clean()
	text, _, err := Head{}.append(nil, &worst)
	if err != nil || len(text) > maxLine/2 || bytes.Count(text, []byte("\n")) != 1 {
		t.Errorf("%d bytes, %v", len(text), err)
	}
	if strings.ContainsAny(worst.Text(), "\n\x1b") {
		t.Errorf("%q", worst.Text())
	}
}

func TestReaderWhoFallsBehindIsDroppedAndKeepsNobodyWaiting(t *testing.T) {
	f := NewFeed()
	for i := range 5000 {
		f.publish(Record{Seq: uint64(i)})
	}
	old, slow := f.Follow()
	_, quick := f.Follow()
	if len(old) != recent || old[0].Seq != 5000-recent || old[recent-1].Seq != 4999 {
		t.Fatalf("%d remembered, %d to %d", len(old), old[0].Seq, old[len(old)-1].Seq)
	}
	for i := range backlog + 1 {
		f.publish(Record{Seq: uint64(i)})
		if r := <-quick.C; r.Seq != uint64(i) {
			t.Fatalf("%d after %d", r.Seq, i)
		}
	}
	n := 0
	for range slow.C {
		n++
	}
	if n != backlog || !slow.Late() || quick.Late() {
		t.Errorf("%d came; late: %v, %v", n, slow.Late(), quick.Late())
	}
	slow.Close()
	f.End()
	if _, more := <-quick.C; more || quick.Late() {
		t.Error("the feed has no end")
	}
	quick.Close()
	if _, r := f.Follow(); r != nil {
		t.Error("followed after the end")
	}
	f = NewFeed()
	for range maxFeeds {
		f.Follow()
	}
	if _, r := f.Follow(); r != nil {
		t.Error("no bound")
	}
}

func TestQueryFindsByEachField(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	w := openWriter(t, dir, Options{})
	for d := range 10 {
		at := began0.Add(time.Duration(d) * 24 * time.Hour)
		for i, r := range []Record{{Kind: SessionBegan, User: "alice", Session: "s" + fmt.Sprint(d)}, {Kind: ProxyRefused, User: "bob", Session: "alice", ID: "ABC"}, {Kind: SessionEnded, User: `a"b<`}} {
			r.Time = at.Add(time.Duration(i) * time.Hour)
			if err := w.Append(at, r); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, test := range []struct {
		f    Filter
		want int
	}{
		{Filter{}, 40}, {Filter{User: "alice"}, 10}, {Filter{User: "alic"}, 0}, {Filter{User: `a"b<`}, 10}, {Filter{Session: "alice"}, 10}, {Filter{Session: "s3"}, 1},
		{Filter{ID: "ABC"}, 10}, {Filter{Kinds: []Kind{SessionBegan, SessionEnded}}, 20}, {Filter{Since: began0.Add(8 * 24 * time.Hour)}, 8},
		{Filter{Until: began0.Add(24 * time.Hour)}, 4}, {Filter{Until: began0}, 0}, {Filter{Since: began0.Add(24 * time.Hour), Until: began0.Add(25 * time.Hour), User: "alice"}, 1},
	} {
		if got := len(all(t, dir, test.f)); got != test.want {
			t.Errorf("%+v: %d, want %d", test.f, got, test.want)
		}
		n := 0
		if err := Backward(os.DirFS(dir), test.f, func(*Record) { n++ }, func() bool { return false }); err != nil || n != test.want {
			t.Errorf("%+v backward: %d, want %d; %v", test.f, n, test.want, err)
		}
	}
	var last string
	if err := Backward(os.DirFS(dir), Filter{User: "alice"}, func(r *Record) { last = r.Session }, func() bool { return last != "" }); err != nil || last != "s9" {
		t.Errorf("the newest is %q, %v", last, err)
	}
}

func FuzzLoggedHeads(f *testing.F) {
	f.Add(`{"time":"2026-01-02T03:04:05Z","level":"INFO","msg":"audit head","dir":"/d","head":"1:00"}`)
	f.Add(`time=x level=INFO msg="audit head" dir="/d\"" head=1:` + Hash{}.String())
	f.Fuzz(func(t *testing.T, text string) {
		known, err := LoggedHeads(strings.NewReader(text), "/d")
		for _, k := range known {
			if back, e := ParseHead(k.Head.String()); e != nil || back != k.Head || err != nil {
				t.Errorf("%v %v %v", k, e, err)
			}
		}
	})
}

func BenchmarkAdd(b *testing.B) {
	r := NewRecorder(b.TempDir(), Options{}, slog.New(slog.DiscardHandler))
	record := Record{Kind: Connection, ID: "ABCDEFGHIJ", User: "alice", Device: "mac", Session: strings.Repeat("0", 32), Source: "10.77.0.5:40000", Method: "CONNECT",
		Destination: "s3.us-east-1.amazonaws.com:443", Decision: "allow", Reason: "allowed", Rule: 2, Status: 200, Dialed: "52.1.2.3:443", Up: 1, Down: 1, DurationMS: 1, End: "closed"}
	b.ReportAllocs()
	for b.Loop() {
		r.Add(record)
	}
}

func BenchmarkAppend(b *testing.B) {
	w, err := OpenWriter(filepath.Join(b.TempDir(), "audit"), Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer w.Close()
	record := Record{Time: began0, Kind: Connection, ID: "ABCDEFGHIJ", User: "alice", Device: "mac", Session: strings.Repeat("0", 32), Source: "10.77.0.5:40000", Method: "CONNECT",
		Destination: "s3.us-east-1.amazonaws.com:443", Decision: "allow", Reason: "allowed", Rule: 2, Status: 200, Dialed: "52.1.2.3:443", Up: 1, Down: 1, DurationMS: 1, End: "closed"}
	b.ReportAllocs()
	for b.Loop() {
		if err := w.Append(began0, record); err != nil {
			b.Fatal(err)
		}
	}
}
