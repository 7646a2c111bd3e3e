// Package backup is the one file that brings a bastion up on another host.
//
// It is an age file for a passphrase (age-encryption.org/v1, scrypt), which shows a change, a cut and a wrong passphrase alike.
// Inside is a tar: manifest.json, then the entries that it lists, in this order. Without this program:
//
//	age -d FILE | tar x
//
//	config/perimeterd.toml     the configuration
//	config/pki/…               keys and certificates, and whatever else lies there
//	config/…                   files that the configuration names beside itself
//	state/state.db             a copy of the state file, as package statefile reads it
//	state/audit/…              the audit's files, if they were asked for
//
// Nothing else may be in it, and nothing that is no plain file or directory: no link, no absolute name, no "..".
package backup

import (
	"fmt"
	"io/fs"
	"path"
	"strings"
	"time"
	"unicode"
)

// Format is the version of the archive that this program writes, and the newest that it reads.
const Format = 1

// The names that are the same in every archive.
const (
	ConfigFile = "config/perimeterd.toml"
	PKI        = "config/pki"
	StateFile  = "state/state.db"
	Audit      = "state/audit"

	manifestName = "manifest.json"
)

// Bounds of what is read.
const (
	maxManifest = 16 << 20 // bytes
	maxEntries  = 1 << 16
	maxName     = 1 << 10 // bytes
	maxDepth    = 16
	maxConfig   = 64 << 20 // bytes of a file below config/: a CRL may be long
	maxState    = 1 << 30  // of one below state/
)

// Manifest says what an archive holds.
type Manifest struct {
	Format   int       `json:"format"`
	Program  string    `json:"program"` // version that wrote it
	Schema   int       `json:"schema"`  // of state/state.db
	Made     time.Time `json:"made"`
	Host     string    `json:"host"`     // its name
	Endpoint string    `json:"endpoint"` // where its clients find it
	Entries  []Entry   `json:"entries"`  // a directory before what is in it
}

// Entry is a file, or a directory.
type Entry struct {
	Name  string      `json:"name"` // with slashes
	Dir   bool        `json:"dir,omitempty"`
	Size  int64       `json:"size"` // bytes; 0 of a directory
	Mode  fs.FileMode `json:"mode"` // permissions only
	Owner string      `json:"owner,omitempty"`
	Group string      `json:"group,omitempty"` // names; empty where the host had none for the numbers
	UID   int         `json:"uid"`
	GID   int         `json:"gid"`
}

// Has says whether there is an entry of this name.
func (m *Manifest) Has(name string) bool {
	for _, e := range m.Entries {
		if e.Name == name {
			return true
		}
	}
	return false
}

// Size is that of all files, bytes.
func (m *Manifest) Size() (n int64) {
	for _, e := range m.Entries {
		n += e.Size
	}
	return n
}

func (m *Manifest) check() error {
	if m.Format > Format {
		return fmt.Errorf("format %d was written by a newer perimeterd (%q), this one knows up to %d: install that one", m.Format, m.Program, Format)
	}
	if m.Format < 1 || len(m.Entries) > maxEntries {
		return fmt.Errorf("its manifest is none: format %d, %d entries", m.Format, len(m.Entries))
	}
	dirs := map[string]bool{".": true}
	seen := map[string]bool{}
	for _, e := range m.Entries {
		if err := e.check(); err != nil {
			return err
		}
		if seen[e.Name] || !dirs[path.Dir(e.Name)] {
			return fmt.Errorf("entry %q stands there twice, or in no directory", e.Name)
		}
		seen[e.Name], dirs[e.Name] = true, e.Dir
	}
	if !seen[ConfigFile] || dirs[ConfigFile] {
		return fmt.Errorf("%s is not in it", ConfigFile)
	}
	return nil
}

func (e Entry) check() error {
	odd := func(r rune) bool { return r == '\\' || r == unicode.ReplacementChar || unicode.IsControl(r) }
	switch {
	case len(e.Name) > maxName || !fs.ValidPath(e.Name) || strings.ContainsFunc(e.Name, odd) || strings.Count(e.Name, "/") > maxDepth:
		return fmt.Errorf("entry %.100q: not a name that a backup has", e.Name)
	case e.Mode&^fs.ModePerm != 0 || e.Size < 0 || e.Dir && e.Size != 0 || e.UID < 0 || e.GID < 0:
		return fmt.Errorf("entry %q: mode %v, size %d, owner %d:%d: not what a backup has", e.Name, e.Mode, e.Size, e.UID, e.GID)
	}
	most := int64(maxConfig)
	switch top, rest, _ := strings.Cut(e.Name, "/"); {
	case top == "config":
	case e.Name == "state" && e.Dir, e.Name == Audit && e.Dir, e.Name == StateFile && !e.Dir, path.Dir(rest) == "audit" && top == "state" && !e.Dir:
		most = maxState
	default:
		return fmt.Errorf("entry %q: not a name that a backup has", e.Name)
	}
	if e.Size > most {
		return fmt.Errorf("entry %q: %d bytes, at most %d", e.Name, e.Size, most)
	}
	return nil
}
