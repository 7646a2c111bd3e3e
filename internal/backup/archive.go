package backup

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"filippo.io/age"
)

// ErrPassphrase is returned for an archive that does not open with the passphrase given.
var ErrPassphrase = errors.New("this is not its passphrase")

// Write makes an archive for a passphrase's recipient. Open gives an entry's content, of which Size bytes are taken; a shorter one is
// an error.
func Write(w io.Writer, to *age.ScryptRecipient, m *Manifest, open func(Entry) (io.ReadCloser, error)) error {
	if err := m.check(); err != nil {
		return err
	}
	sealed, err := age.Encrypt(w, to)
	if err != nil {
		return err
	}
	if err := writeTar(sealed, m, open); err != nil {
		return err
	}
	return sealed.Close()
}

func writeTar(w io.Writer, m *Manifest, open func(Entry) (io.ReadCloser, error)) error {
	text, err := json.MarshalIndent(m, "", " ")
	if err != nil {
		return err
	}
	t := tar.NewWriter(w)
	if err := t.WriteHeader(&tar.Header{Name: manifestName, Size: int64(len(text)), Mode: 0o600, ModTime: m.Made}); err != nil {
		return err
	}
	if _, err := t.Write(text); err != nil {
		return err
	}
	for _, e := range m.Entries {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: e.Name, Size: e.Size, Mode: int64(e.Mode), Uid: e.UID, Gid: e.GID, Uname: e.Owner, Gname: e.Group, ModTime: m.Made}
		if e.Dir {
			h.Typeflag, h.Name = tar.TypeDir, e.Name+"/"
		}
		if err := t.WriteHeader(h); err != nil {
			return fmt.Errorf("%s: %w", e.Name, err)
		}
		if e.Dir {
			continue
		}
		content, err := open(e)
		if err != nil {
			return err
		}
		_, err = io.CopyN(t, content, e.Size)
		content.Close()
		if err != nil {
			return fmt.Errorf("%s: it became shorter meanwhile, try again: %w", e.Name, err)
		}
	}
	return t.Close()
}

// Archive is one that lies in a file.
type Archive struct {
	file     io.ReadSeeker
	identity age.Identity
}

// New is the archive in file. Nothing is read yet.
func New(file io.ReadSeeker, passphrase string) (*Archive, error) {
	identity, err := age.NewScryptIdentity(passphrase)
	if err != nil {
		return nil, err
	}
	return &Archive{file, &once{Identity: identity}}, nil
}

// once derives the key a single time, which takes a second.
type once struct {
	age.Identity
	key []byte
}

func (o *once) Unwrap(stanzas []*age.Stanza) (key []byte, err error) {
	if o.key == nil {
		o.key, err = o.Identity.Unwrap(stanzas)
	}
	return o.key, err
}

// Read goes through an archive to its end: begin is told of the manifest, which was checked, and each of the content of every file.
// What they were told is worth nothing where Read returns an error, as the end shows whether it is whole. It may be called again.
func (a *Archive) Read(begin func(*Manifest) error, each func(Entry, io.Reader) error) error {
	if _, err := a.file.Seek(0, io.SeekStart); err != nil {
		return err
	}
	opened, err := age.Decrypt(a.file, a.identity)
	var other *age.NoIdentityMatchError
	switch {
	case errors.As(err, &other):
		return ErrPassphrase
	case err != nil:
		return fmt.Errorf("not a file of `perimeterd backup`, or cut short: %w", err)
	}
	return readTar(opened, begin, each)
}

func readTar(r io.Reader, begin func(*Manifest) error, each func(Entry, io.Reader) error) error {
	t := tar.NewReader(r)
	next := func(name string) (*tar.Header, error) {
		h, err := t.Next()
		if err != nil {
			return nil, fmt.Errorf("damaged or cut short, at %s: %w", name, err)
		}
		return h, nil
	}
	h, err := next(manifestName)
	if err != nil {
		return err
	}
	if h.Name != manifestName || h.Typeflag != tar.TypeReg || h.Size > maxManifest {
		return fmt.Errorf("not a file of `perimeterd backup`: it begins with %.100q, %d bytes", h.Name, h.Size)
	}
	text, err := io.ReadAll(t)
	if err != nil {
		return fmt.Errorf("damaged or cut short, in %s: %w", manifestName, err)
	}
	var m Manifest
	if err := json.Unmarshal(text, &m); err != nil {
		return fmt.Errorf("%s: %w", manifestName, err)
	}
	if err := m.check(); err != nil {
		return err
	}
	if err := begin(&m); err != nil {
		return err
	}
	for _, e := range m.Entries {
		h, err := next(e.Name)
		if err != nil {
			return err
		}
		name, kind := e.Name, byte(tar.TypeReg)
		if e.Dir {
			name, kind = e.Name+"/", tar.TypeDir
		}
		if h.Name != name || h.Typeflag != kind || h.Size != e.Size {
			return fmt.Errorf("entry %q is %.100q in it, of kind %q and %d bytes: not what the manifest says", e.Name, h.Name, h.Typeflag, h.Size)
		}
		if e.Dir {
			continue
		}
		if err := each(e, t); err != nil {
			return err
		}
		if _, err := io.Copy(io.Discard, t); err != nil {
			return fmt.Errorf("damaged or cut short, in %s: %w", e.Name, err)
		}
	}
	if h, err := t.Next(); err == nil {
		return fmt.Errorf("entry %.100q is not in the manifest", h.Name)
	} else if err != io.EOF {
		return fmt.Errorf("damaged or cut short, at the end: %w", err)
	}
	// What age has not seen the end of may be cut short.
	if n, err := io.CopyN(io.Discard, r, 1<<16); err != io.EOF {
		return fmt.Errorf("damaged or cut short, %d bytes after the end: %v", n, err)
	}
	return nil
}
