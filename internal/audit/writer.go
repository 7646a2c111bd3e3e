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
	root    *os.Root // dir as it was found: who owns its parent may swap it for a link
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
	made := os.Mkdir(dir, 0o700)
	if made != nil && !errors.Is(made, fs.ErrExist) {
		return nil, made
	}
	root, err := openDir(dir, made == nil)
	if err != nil {
		return nil, fmt.Errorf("audit %s: %w", dir, err)
	}
	w := &Writer{dir: dir, root: root, options: o}
	if err := w.find(); err != nil {
		w.Close()
		return nil, fmt.Errorf("audit %s: %w", dir, err)
	}
	return w, nil
}

// openDir takes hold of a directory that is root's or its parent's owner's, and no link: root may come to one of the daemon's
// user, who must not lead it elsewhere. One that was just made is given to that owner.
func openDir(dir string, made bool) (_ *os.Root, err error) {
	parent, err := os.Stat(filepath.Dir(dir))
	if err != nil {
		return nil, err
	}
	there, err := os.Lstat(dir)
	if err != nil {
		return nil, err
	}
	if !there.IsDir() {
		return nil, errors.New("not a directory, and links are not followed: put the directory itself there")
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			root.Close()
		}
	}()
	d, err := root.Open(".")
	if err != nil {
		return nil, err
	}
	defer d.Close()
	opened, err := d.Stat()
	if err != nil {
		return nil, err
	}
	if !os.SameFile(there, opened) {
		return nil, errors.New("somebody replaced it meanwhile: run it again")
	}
	want := parent.Sys().(*syscall.Stat_t).Uid
	if uid := opened.Sys().(*syscall.Stat_t).Uid; uid != 0 && uid != want {
		return nil, fmt.Errorf("belongs to the user %d: want root, or %d as the directory it is in: chown -R %[2]d %s", uid, want, dir)
	}
	if made {
		err = own(d, parent)
	}
	return root, err
}

// own gives f to the owner of like, where this is root's process. By a path it could be another file by now.
func own(f *os.File, like os.FileInfo) error {
	if os.Geteuid() != 0 {
		return nil
	}
	s := like.Sys().(*syscall.Stat_t)
	return f.Chown(int(s.Uid), int(s.Gid))
}

// open opens one of the files. The directory's owner may have put a link there, or a pipe, which would be waited for.
func (w *Writer) open(name string, flag int) (*os.File, error) {
	st, err := w.root.Lstat(name)
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is no plain file, and links are not followed: put the file itself there, or move it away", name)
	}
	return w.root.OpenFile(name, flag|syscall.O_NONBLOCK, 0)
}

// find looks for the last whole record, and opens its file for more if nothing follows there.
func (w *Writer) find() error {
	files, err := list(w.root.FS())
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
			w.f, err = w.open(files[i].name, os.O_WRONLY|os.O_APPEND)
			w.size = end
		}
		return err
	}
	return nil
}

// tail notes the head at a file's end, and what is torn there. End is the file's length.
func (w *Writer) tail(of file) (found bool, end int64, err error) {
	in, err := w.open(of.name, os.O_RDONLY)
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
		w.closeFile()
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
			return errors.Join(err, w.root.Remove(w.file.name))
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
	f, err := w.root.OpenFile(w.file.name, os.O_WRONLY|os.O_APPEND|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	w.f = f
	dir, err := w.root.Open(".")
	if err != nil {
		return err
	}
	defer dir.Close()
	st, err := dir.Stat()
	if err != nil {
		return err
	}
	return errors.Join(own(f, st), dir.Sync())
}

// Turn begins a new file where the day has changed, and removes files that are old enough after the chain says so durably.
// An error that is not ErrKept is one of Append.
func (w *Writer) Turn(now time.Time) error {
	if err := w.Append(now); err != nil || w.options.Keep <= 0 {
		return err
	}
	dir := w.root.FS()
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
			if err := w.root.Remove(f.name); err != nil {
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

// Close ends the Writer. What was written last may not be on the disk yet.
func (w *Writer) Close() error { return errors.Join(w.closeFile(), w.root.Close()) }

func (w *Writer) closeFile() error {
	if w.f == nil {
		return nil
	}
	err := w.f.Close()
	w.f = nil
	return err
}
