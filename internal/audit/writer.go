package audit

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Options of a Writer. The zero value of a field is its default.
type Options struct {
	Keep     time.Duration // how long records are kept; 0: for ever
	MaxFile  int64         // bytes after which a new file begins; 0: 32 MiB
	Reserved int64         // bytes of the file system that are left alone; 0: 32 MiB
}

// Writer appends to the files of a directory. One process at a time may have one, which the lock on the state file sees to. Its
// methods are for one goroutine.
type Writer struct {
	dir     string
	options Options

	head Head
	torn []Torn

	f    *os.File // nil: the next record begins a file
	file file     // the newest there is
	size int64
	// dirty is whether something was written since the last Sync.
	dirty bool
}

// OpenWriter goes on where the files of dir end, or begins with none. Dir is made 0700 where it is missing, and belongs to the
// owner of its parent, who is the daemon's user, whoever begins.
func OpenWriter(dir string, o Options) (*Writer, error) {
	if o.MaxFile == 0 {
		o.MaxFile = 32 << 20
	}
	if o.Reserved == 0 {
		o.Reserved = 32 << 20
	}
	w := &Writer{dir: dir, options: o}
	switch err := os.Mkdir(dir, 0o700); {
	case err == nil:
		if err := own(dir, filepath.Dir(dir)); err != nil {
			return nil, err
		}
	case !errors.Is(err, fs.ErrExist):
		return nil, err
	}
	// Root may come to a directory of the daemon's user.
	if st, err := os.Lstat(dir); err != nil || !st.IsDir() {
		return nil, errors.Join(err, fmt.Errorf("audit %s: not a directory: links are not followed", dir))
	}
	if err := w.find(); err != nil {
		return nil, fmt.Errorf("audit %s: %w", dir, err)
	}
	return w, nil
}

// own gives path to the owner of like, where this is root's process.
func own(path, like string) error {
	st, err := os.Stat(like)
	if err != nil || os.Geteuid() != 0 {
		return err
	}
	s := st.Sys().(*syscall.Stat_t)
	return os.Lchown(path, int(s.Uid), int(s.Gid))
}

// find looks for the last whole record, and opens its file for more if nothing follows there.
func (w *Writer) find() error {
	files, err := list(os.DirFS(w.dir))
	if err != nil {
		return err
	}
	if len(files) > 0 {
		w.file = files[len(files)-1]
	}
	for i := len(files) - 1; i >= 0; i-- {
		found, end, err := w.tail(files[i])
		if err != nil {
			return err
		}
		if !found {
			continue // a file that was begun, and no more
		}
		if i == len(files)-1 && len(w.torn) == 0 {
			w.f, err = os.OpenFile(filepath.Join(w.dir, files[i].name), os.O_WRONLY|os.O_APPEND|syscall.O_NOFOLLOW, 0)
			w.size = end
		}
		return err
	}
	return nil
}

// tail notes the head at a file's end, and what is torn there. End is the file's length.
func (w *Writer) tail(of file) (found bool, end int64, err error) {
	in, err := os.Open(filepath.Join(w.dir, of.name))
	if err != nil {
		return false, 0, err
	}
	defer in.Close()
	torn := tear{sum: sha256.New()}
	err = eachLine(in, func(l line) bool {
		end += int64(len(l.text))
		if _, says, err := split(l.text); err == nil && l.whole {
			w.head, found = says, true
			torn.reset()
		} else {
			torn.add(l)
		}
		return true
	})
	if torn.bytes > 0 {
		w.torn = append(w.torn, torn.in(of))
	}
	return found, end, err
}

// Head is the newest record.
func (w *Writer) Head() Head { return w.head }

// After makes the chain go on after h where the files end before it: then somebody took records away, which must show.
func (w *Writer) After(h Head) {
	if h.Seq > w.head.Seq {
		w.Close()
		w.head = h
	}
}

// Append writes records in their order, all of them or, with an error, none. After an error the Writer is of no more use.
func (w *Writer) Append(now time.Time, records ...Record) error {
	if err := w.append(now, records); err != nil {
		w.Close()
		return fmt.Errorf("audit %s: %w", w.dir, err)
	}
	return nil
}

func (w *Writer) append(now time.Time, records []Record) (err error) {
	begin := w.f == nil || w.size >= w.options.MaxFile || !w.file.day.Equal(dayOf(now))
	var text []byte
	head := w.head
	if begin {
		prev := Record{Time: now, Kind: FileBegan, Prev: head.Hash.String(), Torn: w.torn}
		if text, head, err = head.append(text, &prev); err != nil {
			return err
		}
	}
	for i := range records {
		if text, head, err = head.append(text, &records[i]); err != nil {
			return err
		}
	}
	if len(text) == 0 {
		return nil
	}
	if err := w.room(int64(len(text))); err != nil {
		return err
	}
	if begin {
		if err := w.begin(now); err != nil {
			return err
		}
	}
	if _, err := w.f.Write(text); err != nil {
		// What was written of it is taken back: a line would be torn.
		if w.size == 0 {
			return errors.Join(err, os.Remove(filepath.Join(w.dir, w.file.name)))
		}
		return errors.Join(err, w.f.Truncate(w.size))
	}
	w.head, w.size, w.dirty = head, w.size+int64(len(text)), true
	if begin {
		w.torn = nil
	}
	return nil
}

// room is an error where the file system would be left with too little.
func (w *Writer) room(n int64) error {
	var st unix.Statfs_t
	if err := unix.Statfs(w.dir, &st); err != nil {
		return os.NewSyscallError("statfs", err)
	}
	if free := int64(st.Bavail) * st.Bsize; free < w.options.Reserved+n {
		return fmt.Errorf("%d MiB are left on its file system, and the last %d MiB are the state's: %w", free>>20, w.options.Reserved>>20, unix.ENOSPC)
	}
	return nil
}

// begin makes the next file.
func (w *Writer) begin(now time.Time) error {
	if w.f != nil {
		if err := errors.Join(w.Sync(), w.f.Close()); err != nil {
			return err
		}
	}
	w.file, w.size = makeName(w.file.number+1, dayOf(now)), 0
	path := filepath.Join(w.dir, w.file.name)
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	w.f = f
	dir, err := os.Open(w.dir)
	if err != nil {
		return err
	}
	defer dir.Close()
	return errors.Join(own(path, w.dir), dir.Sync())
}

// Turn begins a new file where the day has changed, and removes files that are old enough after the chain says so durably.
// An error that is not ErrKept is one of Append.
func (w *Writer) Turn(now time.Time) error {
	if err := w.Append(now); err != nil || w.options.Keep <= 0 {
		return err
	}
	dir := os.DirFS(w.dir)
	files, err := list(dir)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrKept, err)
	}
	for n := expired(files, w.options.Keep); n > 0; n-- {
		first, err := began(dir, files[n])
		if err != nil {
			continue // nobody could tell which records go
		}
		if err := w.Append(now, Record{Time: now, Kind: FilesExpired, Count: uint64(n), Through: first.Seq - 1, Prev: first.Prev}); err != nil {
			return err
		}
		if err := w.Sync(); err != nil {
			return err
		}
		for _, f := range files[:n] {
			if err := os.Remove(filepath.Join(w.dir, f.name)); err != nil {
				return fmt.Errorf("%w: %w", ErrKept, err)
			}
		}
		break
	}
	return nil
}

// ErrKept is wrapped where files stay although they are older than they should be kept.
var ErrKept = errors.New("audit files that are old enough are still there")

// began is the first record of a file.
func began(dir fs.FS, f file) (r Record, err error) {
	in, err := dir.Open(f.name)
	if err != nil {
		return r, err
	}
	defer in.Close()
	first := errNoRecord
	err = eachLine(in, func(l line) bool {
		if r, _, _, first = parse(l.text); first == nil && r.Kind != FileBegan {
			first = errNoRecord
		}
		return false
	})
	return r, errors.Join(err, first)
}

// Sync returns when everything written is on the disk.
func (w *Writer) Sync() error {
	if !w.dirty {
		return nil
	}
	path := filepath.Join(w.dir, w.file.name)
	there, err := os.Lstat(path)
	ours, err2 := w.f.Stat()
	if err := errors.Join(err2, w.f.Sync()); err != nil {
		return fmt.Errorf("audit %s: %w", w.dir, err)
	}
	if err != nil || !os.SameFile(there, ours) {
		return fmt.Errorf("audit %s: somebody removed or replaced it", path)
	}
	w.dirty = false
	return nil
}

// Close closes the file. What was written last may not be on the disk yet.
func (w *Writer) Close() error {
	if w.f == nil {
		return nil
	}
	err := w.f.Close()
	w.f = nil
	return err
}
