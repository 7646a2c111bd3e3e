package backup

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"filippo.io/age"
)

func sample() (*Manifest, map[string]string) {
	content := map[string]string{
		ConfigFile: "[gate]\n", "config/pki/ca.key": "secret", "config/pki/renewable/a": "", StateFile: strings.Repeat("x", 70000),
		"state/audit/00000001-2026-01-02.jsonl": "{}\n",
	}
	m := &Manifest{Format: Format, Program: "1.2", Schema: 2, Made: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), Host: "old", Endpoint: "bastion.example.com:1194"}
	for _, dir := range []string{"config", "config/pki", "config/pki/renewable", "state", "state/audit"} {
		m.Entries = append(m.Entries, Entry{Name: dir, Dir: true, Mode: 0o700})
	}
	for _, name := range slices.Sorted(maps.Keys(content)) {
		m.Entries = append(m.Entries, Entry{Name: name, Size: int64(len(content[name])), Mode: 0o600, UID: 7, Owner: "someone"})
	}
	return m, content
}

func open(content map[string]string) func(Entry) (io.ReadCloser, error) {
	return func(e Entry) (io.ReadCloser, error) { return io.NopCloser(strings.NewReader(content[e.Name])), nil }
}

// collect reads with fn and returns what came.
func collect(fn func(begin func(*Manifest) error, each func(Entry, io.Reader) error) error) (m *Manifest, content map[string]string, err error) {
	content = map[string]string{}
	err = fn(func(got *Manifest) error { m = got; return nil }, func(e Entry, r io.Reader) error {
		b, err := io.ReadAll(r)
		content[e.Name] = string(b)
		return err
	})
	return m, content, err
}

func readRaw(data []byte) (*Manifest, map[string]string, error) {
	return collect(func(begin func(*Manifest) error, each func(Entry, io.Reader) error) error {
		return readTar(bytes.NewReader(data), begin, each)
	})
}

func TestArchiveComesBackAsItWas(t *testing.T) {
	m, content := sample()
	recipient, err := age.NewScryptRecipient("correct horse")
	if err != nil {
		t.Fatal(err)
	}
	recipient.SetWorkFactor(8) // of the default's 18, to be quick
	var file bytes.Buffer
	if err := Write(&file, recipient, m, open(content)); err != nil {
		t.Fatal(err)
	}
	for _, word := range []string{"bastion", "secret", "ca.key"} {
		if bytes.Contains(file.Bytes(), []byte(word)) {
			t.Errorf("%q is readable in it", word)
		}
	}
	read := func(data []byte, passphrase string) (*Manifest, map[string]string, error) {
		a, err := New(bytes.NewReader(data), passphrase)
		if err != nil {
			t.Fatal(err)
		}
		if err := a.Read(func(*Manifest) error { return nil }, func(Entry, io.Reader) error { return nil }); err != nil {
			return nil, nil, err
		}
		return collect(a.Read) // a second time
	}
	got, files, err := read(file.Bytes(), "correct horse")
	if err != nil || !maps.Equal(files, content) || fmt.Sprint(got) != fmt.Sprint(m) {
		t.Fatalf("%v\n%v\n%v", err, got, m)
	}
	if _, _, err := read(file.Bytes(), "battery staple"); !errors.Is(err, ErrPassphrase) {
		t.Errorf("another passphrase: %v", err)
	}
	if _, _, err := read([]byte("state_dir = 1\n"), "correct horse"); err == nil || !strings.HasPrefix(err.Error(), "not a file of `perimeterd backup`, or cut short: ") {
		t.Errorf("another file: %v", err)
	}
	for range 200 {
		cut, flip := rand.IntN(file.Len()), rand.IntN(file.Len())
		if _, _, err := read(file.Bytes()[:cut], "correct horse"); err == nil {
			t.Errorf("cut to %d of %d bytes, and read", cut, file.Len())
		}
		bad := slices.Clone(file.Bytes())
		bad[flip] ^= 1
		if _, _, err := read(bad, "correct horse"); err == nil {
			t.Errorf("a bit of byte %d flipped, and read", flip)
		}
	}
}

func TestShorterContentIsAnError(t *testing.T) {
	m, content := sample()
	content[StateFile] = content[StateFile][1:]
	if err := writeTar(io.Discard, m, open(content)); err == nil || !strings.Contains(err.Error(), "state/state.db: it became shorter meanwhile, try again") {
		t.Fatal(err)
	}
}

// A tar that is cut short or followed by something is not one that was written.
func TestTarMustBeWholeToTheByte(t *testing.T) {
	m, content := sample()
	var file bytes.Buffer
	if err := writeTar(&file, m, open(content)); err != nil {
		t.Fatal(err)
	}
	whole := file.Bytes()
	if _, got, err := readRaw(whole); err != nil || !maps.Equal(got, content) {
		t.Fatal(err)
	}
	for range 300 {
		cut := rand.IntN(len(whole) - 1024 - 512) // archive/tar needs neither the two empty blocks at the end nor what fills up the last
		if _, _, err := readRaw(whole[:cut]); err == nil {
			t.Fatalf("cut to %d of %d bytes, and read", cut, len(whole))
		}
	}
	if _, _, err := readRaw(append(slices.Clone(whole), make([]byte, 1<<17)...)); err == nil {
		t.Error("more than there should be after the end")
	}
}

func TestHostileArchivesAreRefused(t *testing.T) {
	for name, test := range map[string]struct {
		manifest func(*Manifest)
		header   func(*tar.Header)
		want     string
	}{
		"a name that leads out": {func(m *Manifest) { m.Entries[8].Name = "config/../../etc/passwd" }, nil, `entry "config/../../etc/passwd": not a name that a backup has`},
		"an absolute name":      {func(m *Manifest) { m.Entries[8].Name = "/etc/passwd" }, nil, "not a name that a backup has"},
		"a name elsewhere":      {func(m *Manifest) { m.Entries[8].Name = "etc/passwd" }, nil, "not a name that a backup has"},
		"another state file":    {func(m *Manifest) { m.Entries[8].Name = "state/other.db" }, nil, "not a name that a backup has"},
		"below the audit":       {func(m *Manifest) { m.Entries[8].Name = "state/audit/a/b" }, nil, "not a name that a backup has"},
		"the state a directory": {func(m *Manifest) { m.Entries[4].Name = StateFile }, nil, "not a name that a backup has"},
		"a backslash":           {func(m *Manifest) { m.Entries[8].Name = `config/pki/..\a` }, nil, "not a name that a backup has"},
		"a line break":          {func(m *Manifest) { m.Entries[8].Name = "config/pki/a\nb" }, nil, "not a name that a backup has"},
		"no UTF-8":              {func(m *Manifest) { m.Entries[8].Name = "config/pki/\xff" }, nil, "not a name that a backup has"},
		"a long name":           {func(m *Manifest) { m.Entries[8].Name = "config/pki/" + strings.Repeat("a", 2000) }, nil, "not a name that a backup has"},
		"a deep name":           {func(m *Manifest) { m.Entries[8].Name = "config/pki" + strings.Repeat("/a", 20) }, nil, "not a name that a backup has"},
		"twice the same":        {func(m *Manifest) { m.Entries[8].Name = m.Entries[7].Name }, nil, "stands there twice, or in no directory"},
		"in a file":             {func(m *Manifest) { m.Entries[7].Name = m.Entries[6].Name + "/x" }, nil, "stands there twice, or in no directory"},
		"in no directory":       {func(m *Manifest) { m.Entries[7].Name = "config/certs/x" }, nil, "stands there twice, or in no directory"},
		"setuid":                {func(m *Manifest) { m.Entries[7].Mode |= fs.ModeSetuid }, nil, "not what a backup has"},
		"a device's mode":       {func(m *Manifest) { m.Entries[7].Mode |= fs.ModeDevice }, nil, "not what a backup has"},
		"nobody's":              {func(m *Manifest) { m.Entries[7].UID = -1 }, nil, "not what a backup has"},
		"a negative size":       {func(m *Manifest) { m.Entries[7].Size = -1 }, nil, "not what a backup has"},
		"a large key":           {func(m *Manifest) { m.Entries[7].Size = 1 << 40 }, nil, "1099511627776 bytes, at most 67108864"},
		"a large state":         {func(m *Manifest) { m.Entries[9].Size = 1 << 31 }, nil, "2147483648 bytes, at most 1073741824"},
		"no configuration":      {func(m *Manifest) { m.Entries[5].Name = "config/other.toml" }, nil, "config/perimeterd.toml is not in it"},
		"many entries":          {func(m *Manifest) { m.Entries = make([]Entry, maxEntries+1) }, nil, "its manifest is none: format 1, 65537 entries"},
		"a newer format":        {func(m *Manifest) { m.Format = 2 }, nil, `format 2 was written by a newer perimeterd ("1.2"), this one knows up to 1: install that one`},
		"no format":             {func(m *Manifest) { m.Format = 0 }, nil, "its manifest is none"},
		"a symbolic link":       {nil, func(h *tar.Header) { h.Typeflag, h.Linkname, h.Size = tar.TypeSymlink, "/etc/shadow", 0 }, "not what the manifest says"},
		"a hard link":           {nil, func(h *tar.Header) { h.Typeflag, h.Linkname, h.Size = tar.TypeLink, "/etc/shadow", 0 }, "not what the manifest says"},
		"a device":              {nil, func(h *tar.Header) { h.Typeflag, h.Devmajor, h.Size = tar.TypeBlock, 8, 0 }, "not what the manifest says"},
		"a pipe":                {nil, func(h *tar.Header) { h.Typeflag, h.Size = tar.TypeFifo, 0 }, "not what the manifest says"},
		"another name":          {nil, func(h *tar.Header) { h.Name = "../../etc/passwd" }, "not what the manifest says"},
		"another size":          {nil, func(h *tar.Header) { h.Size++ }, "not what the manifest says"},
	} {
		t.Run(name, func(t *testing.T) {
			m, content := sample()
			if test.manifest != nil {
				test.manifest(m)
			}
			_, _, err := readRaw(rawTar(t, m, content, test.header))
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%v, want %q", err, test.want)
			}
		})
	}
}

// rawTar writes what writeTar would not: header changes that of the last file.
func rawTar(t testing.TB, m *Manifest, content map[string]string, header func(*tar.Header)) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	put := func(h *tar.Header, text string) {
		t.Helper()
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := w.Write(append([]byte(text), make([]byte, max(0, int(h.Size)-len(text)))...)); err != nil {
				t.Fatal(err)
			}
		}
	}
	text, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	put(&tar.Header{Typeflag: tar.TypeReg, Name: manifestName, Size: int64(len(text))}, string(text))
	if err := m.check(); err != nil { // nothing more is read
		return b.Bytes()
	}
	for i, e := range m.Entries {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: e.Name, Size: e.Size}
		if e.Dir {
			h.Typeflag, h.Name = tar.TypeDir, e.Name+"/"
		}
		if i == len(m.Entries)-1 && header != nil {
			header(h)
		}
		put(h, content[e.Name])
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestManifestIsTheFirstAndTheWholeList(t *testing.T) {
	m, content := sample()
	less := *m
	less.Entries = less.Entries[:len(less.Entries)-1]
	whole, short := rawTar(t, m, content, nil), rawTar(t, &less, content, nil)
	manifest := 512 + (int(m.size())+511)/512*512
	lessManifest := 512 + (int(less.size())+511)/512*512
	more := append(slices.Clone(short[:lessManifest]), whole[manifest:]...)
	if _, _, err := readRaw(more); err == nil || !strings.Contains(err.Error(), "is not in the manifest") {
		t.Errorf("one entry more: %v", err)
	}
	fewer := append(slices.Clone(whole[:manifest]), short[lessManifest:]...)
	if _, _, err := readRaw(fewer); err == nil || !strings.Contains(err.Error(), "damaged or cut short, at state/state.db") {
		t.Errorf("one entry less: %v", err)
	}
	if _, _, err := readRaw(whole[manifest:]); err == nil || !strings.Contains(err.Error(), "not a file of `perimeterd backup`: it begins with \"config/\"") {
		t.Errorf("no manifest: %v", err)
	}
}

// size is that of the manifest as rawTar writes it.
func (m *Manifest) size() int64 {
	text, _ := json.Marshal(m)
	return int64(len(text))
}

func FuzzRead(f *testing.F) {
	m, content := sample()
	content[StateFile], m.Entries[9].Size = "state", 5
	f.Add(rawTar(f, m, content, nil))
	m.Entries[8].Name = "config/../x"
	f.Add(rawTar(f, m, content, nil))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		m, files, err := readRaw(data)
		if err != nil {
			return
		}
		for name, text := range files {
			if !m.Has(name) || !filepath.IsLocal(name) || len(text) > len(data) {
				t.Fatalf("%q with %d bytes, of %d", name, len(text), len(data))
			}
		}
	})
}

func put(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// tree is every file below a directory with its content.
func tree(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		text, err := os.ReadFile(path)
		rel, _ := filepath.Rel(dir, path)
		all[rel] = string(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestSwapMovesAsideAndFills(t *testing.T) {
	dir := t.TempDir()
	put(t, filepath.Join(dir, "c.toml"), "old")
	put(t, filepath.Join(dir, "pki/key"), "old key")
	put(t, filepath.Join(dir, "pki/more"), "old more")
	put(t, filepath.Join(dir, "ready/c.toml"), "new")
	put(t, filepath.Join(dir, "ready/pki/key"), "new key")
	put(t, filepath.Join(dir, "ready/state.db"), "new state")
	if err := os.MkdirAll(filepath.Join(dir, "ready/empty"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "empty"), 0o700); err != nil {
		t.Fatal(err)
	}
	var places []Place
	for _, name := range []string{"c.toml", "pki", "state.db", "empty"} {
		places = append(places, Place{filepath.Join(dir, "ready", name), filepath.Join(dir, name)})
	}
	if err := Swap(places, "aside"); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"c.toml": "new", "pki/key": "new key", "state.db": "new state",
		"aside/c.toml": "old", "aside/pki/key": "old key", "aside/pki/more": "old more"}
	if got := tree(t, dir); !maps.Equal(got, want) {
		t.Fatalf("%v", got)
	}
}

func TestSwapThatFailsLeavesAllAsItWas(t *testing.T) {
	for _, missing := range []string{"c.toml", "pki", "state.db"} {
		dir := t.TempDir()
		var places []Place
		for _, name := range []string{"c.toml", "pki", "state.db"} {
			places = append(places, Place{filepath.Join(dir, "ready", name), filepath.Join(dir, name)})
			if name != missing {
				put(t, filepath.Join(dir, "ready", name), "new")
			}
		}
		put(t, filepath.Join(dir, "c.toml"), "old")
		put(t, filepath.Join(dir, "pki/key"), "old key")
		before := tree(t, dir)
		if err := Swap(places, "aside"); !errors.Is(err, fs.ErrNotExist) {
			t.Fatalf("%s is missing: %v", missing, err)
		}
		if got := tree(t, dir); !maps.Equal(got, before) {
			t.Errorf("%s is missing: %v, want %v", missing, got, before)
		}
		if _, err := os.Lstat(filepath.Join(dir, "aside")); err == nil {
			t.Errorf("%s is missing: an empty directory stays", missing)
		}
		// One that is there is of an earlier time.
		put(t, filepath.Join(dir, "aside/c.toml"), "older")
		put(t, filepath.Join(dir, "ready", missing), "new")
		if err := Swap(places, "aside"); !errors.Is(err, fs.ErrExist) {
			t.Errorf("into what is there: %v", err)
		}
	}
}

func TestFilesGetModeAndOwner(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	e := Entry{Name: "config/pki/f", Size: 3, Mode: 0o640, UID: 12345, GID: 0, Group: "no such group"}
	if err := e.WriteFile(path, strings.NewReader("abc")); err != nil {
		t.Fatal(err)
	}
	got, err := NewEntry(e.Name, path)
	if err != nil {
		t.Fatal(err)
	}
	got.Owner, got.Group, e.Group = "", "", ""
	if got != e {
		t.Errorf("%+v, want %+v", got, e)
	}
	if err := e.WriteFile(path, strings.NewReader("abc")); !errors.Is(err, fs.ErrExist) {
		t.Errorf("over a file: %v", err)
	}
	e.Size = 4
	if err := e.WriteFile(path+"2", strings.NewReader("abc")); err == nil {
		t.Error("shorter than it should be")
	}
	m := Manifest{Entries: []Entry{{Owner: "root"}, {Owner: "no such user"}, {Owner: "no such user"}}}
	if u := m.Unknown(); !slices.Equal(u, []string{"no such user"}) {
		t.Errorf("unknown: %v", u)
	}
	if uid, _ := m.Entries[1].owner(); uid != 0 {
		t.Errorf("what was no such user's is %d's", uid)
	}
}
