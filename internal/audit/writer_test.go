package audit

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"
)

var began0 = time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)

func openWriter(t *testing.T, dir string, o Options) *Writer {
	t.Helper()
	o.Reserved = 1
	w, err := OpenWriter(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Close() })
	return w
}

// write appends one record for each user, and closes.
func write(t *testing.T, dir string, o Options, at time.Time, users ...string) Head {
	t.Helper()
	w := openWriter(t, dir, o)
	for _, u := range users {
		if err := w.Append(at, Record{Time: at, Kind: SessionBegan, User: u}); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Turn(at); err != nil {
		t.Fatal(err)
	}
	if err := w.Sync(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	return w.Head()
}

// examine is Verify where nobody writes, so that there is nothing to wait for.
func examine(t *testing.T, dir fs.FS, known ...Known) *Report {
	t.Helper()
	r, err := verify(dir, known, func(time.Duration) {})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func texts(list []Place) string {
	var b strings.Builder
	for _, p := range list {
		fmt.Fprintln(&b, p)
	}
	return b.String()
}

func names(t *testing.T, dir string) (list []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		list = append(list, e.Name())
	}
	return list
}

func TestChainGoesOnOverStartsDaysAndSizes(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	write(t, dir, Options{}, began0, "a", "b")
	write(t, dir, Options{}, began0.Add(time.Hour), "c")
	write(t, dir, Options{}, began0.Add(24*time.Hour), "d")
	head := write(t, dir, Options{MaxFile: 600}, began0.Add(25*time.Hour), "e", "f", "g", "h", "i", "j")
	if got, want := names(t, dir), []string{"00000001-2026-01-02.jsonl", "00000002-2026-01-03.jsonl", "00000003-2026-01-03.jsonl", "00000004-2026-01-03.jsonl"}; !slices.Equal(got, want) {
		t.Errorf("files %v, want %v", got, want)
	}
	r := examine(t, os.DirFS(dir), Known{head, "the test"})
	if len(r.Problems)+len(r.Notes) > 0 || r.Records != 14 || r.Files != 4 || r.Head != head.String() || r.Heads != 1 || !r.First.Equal(began0) || !r.Last.Equal(began0.Add(25*time.Hour)) {
		t.Errorf("%+v", r)
	}
	var users string
	if broken, err := Query(os.DirFS(dir), Filter{Kinds: []Kind{SessionBegan}}, func(r *Record) error { users += r.User; return nil }); broken != 0 || err != nil || users != "abcdefghij" {
		t.Errorf("%q, %d broken, %v", users, broken, err)
	}
}

func TestFilesAreTheOwnersAlone(t *testing.T) {
	state := t.TempDir()
	if err := os.Chown(state, 4711, 4712); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(state, "audit")
	write(t, dir, Options{}, began0, "a")
	out, err := exec.Command("stat", "-c", "%a %u %g", dir, filepath.Join(dir, "00000001-2026-01-02.jsonl")).Output()
	if want := "700 4711 4712\n600 4711 4712\n"; err != nil || string(out) != want {
		t.Errorf("%q, want %q; %v", out, want, err)
	}
}

// The package's comment says how a shell follows the chain.
func TestShellCanFollowTheChain(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	head := write(t, dir, Options{MaxFile: 700}, began0, "a", `"quoted" \ <b>&`, "c", "d", "e", "f")
	script := exec.Command("bash", "-euc", `
		previous=$(printf %064d 0)
		while IFS= read -r line; do
			previous=$(printf %s%s "$previous" "${line%,\"hash\":*}" | sha256sum | cut -c -64)
			[[ $line == *",\"hash\":\"$previous\"}" ]] || { echo "does not fit: $line"; exit 1; }
		done < <(cat *.jsonl)
		echo $previous`)
	script.Dir = dir
	out, err := script.CombinedOutput()
	if err != nil || strings.TrimSpace(string(out)) != head.Hash.String() {
		t.Errorf("%v: %s, want %v", err, out, head.Hash)
	}
}

// A crash may leave any beginning of what was written last, and zeros where it had no time for more.
func TestTornEndIsFoundAndToldFromTampering(t *testing.T) {
	from := filepath.Join(t.TempDir(), "audit")
	synced := write(t, from, Options{}, began0, "a", "b")
	whole, err := os.ReadFile(filepath.Join(from, "00000001-2026-01-02.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	write(t, from, Options{}, began0, "c")
	text, err := os.ReadFile(filepath.Join(from, "00000001-2026-01-02.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	for cut := len(whole); cut < len(text); cut++ {
		for _, zeros := range []int{0, 5000} {
			dir := filepath.Join(t.TempDir(), "audit")
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			name := filepath.Join(dir, "00000001-2026-01-02.jsonl")
			torn := append(bytes.Clone(text[:cut]), make([]byte, zeros)...)
			if err := os.WriteFile(name, torn, 0o600); err != nil {
				t.Fatal(err)
			}
			tail := len(torn) - len(whole)
			if r := examine(t, os.DirFS(dir)); (len(r.Problems) == 0) != (tail == 0) {
				t.Fatalf("cut at %d, %d zeros, before the next start:\n%s", cut, zeros, texts(r.Problems))
			}
			write(t, dir, Options{}, began0.Add(time.Hour), "d")
			write(t, dir, Options{}, began0.Add(2*time.Hour), "e")
			r := examine(t, os.DirFS(dir), Known{synced, "the log"})
			if len(r.Problems) > 0 || r.Heads != 1 || (len(r.Notes) == 0) != (tail == 0) {
				t.Fatalf("cut at %d, %d zeros:\n%s%s", cut, zeros, texts(r.Problems), texts(r.Notes))
			}
			if tail > 0 {
				if want := fmt.Sprintf("00000001-2026-01-02.jsonl:4: %d bytes that a crash tore, found by the start at 2026-01-02T04:04:05Z\n", tail); texts(r.Notes) != want {
					t.Fatalf("%s, want %s", texts(r.Notes), want)
				}
				// What is torn is evidence: nobody changes it later.
				changed := bytes.Clone(torn)
				changed[len(whole)] ^= 1
				if err := os.WriteFile(name, changed, 0o600); err != nil {
					t.Fatal(err)
				}
				if r := examine(t, os.DirFS(dir)); len(r.Problems) != 1 {
					t.Fatalf("cut at %d, %d zeros: a tear was changed:\n%s", cut, zeros, texts(r.Problems))
				}
			}
		}
	}
}

// A file that was begun, and no more, or not even that.
func TestTornFirstRecordOfAFile(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	write(t, dir, Options{}, began0, "a")
	for i, torn := range []string{"", `{"seq":4,"ti`, "\x00\x00\n"} {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("0000000%d-2026-01-03.jsonl", 2+i)), []byte(torn), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(t, dir, Options{}, began0.Add(24*time.Hour), "b")
	r := examine(t, os.DirFS(dir))
	if len(r.Problems) > 0 || len(r.Notes) != 2 || r.Records != 4 {
		t.Errorf("%+v", r)
	}
	if list := names(t, dir); len(list) != 5 || list[4] != "00000005-2026-01-03.jsonl" {
		t.Errorf("%v", list)
	}
}

func TestOldFilesExpireAndTheChainSaysSo(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	keep := Options{Keep: 3 * 24 * time.Hour}
	for d := range 10 {
		write(t, dir, keep, began0.Add(time.Duration(d)*24*time.Hour), "a", "b")
	}
	list := names(t, dir)
	if list[0] != "00000006-2026-01-07.jsonl" || len(list) != 5 {
		t.Fatalf("%v", list)
	}
	r := examine(t, os.DirFS(dir))
	if len(r.Problems)+len(r.Notes) > 0 || r.Begins == 1 || r.Files != 5 {
		t.Errorf("%+v", r)
	}
	// One more than the chain tells of.
	if err := os.Remove(filepath.Join(dir, list[0])); err != nil {
		t.Fatal(err)
	}
	if r := examine(t, os.DirFS(dir)); len(r.Problems) != 1 || !strings.Contains(texts(r.Problems), " are missing: no files-expired record tells that they went") {
		t.Errorf("%s", texts(r.Problems))
	}
}

func TestClocksThatJumpExpireNothing(t *testing.T) {
	day := func(s string) file {
		d, err := time.Parse(time.DateOnly, s)
		if err != nil {
			t.Fatal(err)
		}
		return file{day: d}
	}
	for _, test := range []struct {
		name, days string
		want       int
	}{
		{"none", "", 0},
		{"one", "2020-01-01", 0},
		{"two", "2020-01-01 2026-01-01", 0},
		{"three days are kept, and the one before them ends in them", "2026-01-01 2026-01-02 2026-01-03 2026-01-04 2026-01-05 2026-01-06", 1},
		{"the daemon was away for years", "2020-01-01 2020-01-02 2026-01-05 2026-01-06", 2},
		{"a clock that jumped ahead just now", "2026-01-01 2026-01-02 2026-01-03 2040-01-01", 0},
		{"it is right again", "2026-01-01 2026-01-02 2026-01-03 2040-01-01 2026-01-03 2026-01-04", 0},
		{"and files go on to expire", "2026-01-01 2026-01-02 2026-01-03 2040-01-01 2026-01-03 2026-01-08 2026-01-09", 5},
		{"a machine that began in 1970", "2026-01-01 2026-01-02 2026-01-03 1970-01-01 2026-01-03 2026-01-04", 0},
		{"of which files expire in their turn", "2026-01-01 2026-01-02 2026-01-03 1970-01-01 2026-01-03 2026-01-08 2026-01-09", 5},
		{"now it is 1970", "2026-01-01 2026-01-02 2026-01-03 1970-01-01", 0},
		{"the first files lie ahead", "2040-01-01 2026-01-01 2026-01-02 2026-01-08 2026-01-09", 3},
	} {
		var files []file
		for _, d := range strings.Fields(test.days) {
			files = append(files, day(d))
		}
		if got := expired(files, 3*24*time.Hour); got != test.want {
			t.Errorf("%s: %d go, want %d", test.name, got, test.want)
		}
	}
}

func TestWriterKeepsWhatItWroteWhenTheDiskRefuses(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	w := openWriter(t, dir, Options{})
	if err := w.Append(began0, Record{Time: began0, Kind: SessionBegan, User: "a"}); err != nil {
		t.Fatal(err)
	}
	w.options.Reserved = 1 << 60
	if err := w.Append(began0, Record{Time: began0, Kind: SessionBegan, User: "b"}); err == nil || !strings.Contains(err.Error(), "MiB are the state's: no space left on device") {
		t.Errorf("%v", err)
	}
	if head := write(t, dir, Options{}, began0, "c"); head.Seq != 3 {
		t.Errorf("head %v", head)
	}
	if r := examine(t, os.DirFS(dir)); len(r.Problems)+len(r.Notes) > 0 {
		t.Errorf("%+v", r)
	}
}

func TestFilesOfOthersAreLeftAlone(t *testing.T) {
	dir := fstest.MapFS{"notes.txt": {}, "00000001-2026-01-02.jsonl.gz": {}, "1-2026-01-02.jsonl": {}, "00000001-2026-13-02.jsonl": {}, "x00000001-2026-01-02.jsonl": {}}
	if files, err := list(dir); len(files) > 0 || err != nil {
		t.Errorf("%v %v", files, err)
	}
	if IsFile("../00000001-2026-01-02.jsonl") || !IsFile("00000001-2026-01-02.jsonl") || !IsFile("123456789-2026-01-02.jsonl") {
		t.Error("IsFile")
	}
}
