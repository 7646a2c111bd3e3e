package configs

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"

	"github.com/pelletier/go-toml/v2"
)

// Paths are what operators' commands need to find the daemon and its state: absolute, but FindPaths leaves empty what it
// cannot read.
type Paths struct{ StateDir, RunDir string }

// StateFile is the bbolt file of users and sessions; empty where StateDir is.
func (p Paths) StateFile() string {
	if p.StateDir == "" {
		return ""
	}
	return filepath.Join(p.StateDir, "state.db")
}

// AuditDir holds the audit's files; empty where StateDir is.
func (p Paths) AuditDir() string {
	if p.StateDir == "" {
		return ""
	}
	return filepath.Join(p.StateDir, "audit")
}

// ControlSocket is where the running daemon takes operators' commands.
func (p Paths) ControlSocket() string { return filepath.Join(p.RunDir, "control.sock") }

// SignerSocket is where the process that holds the CA key is asked.
func (p Paths) SignerSocket() string { return filepath.Join(p.RunDir, "signer.sock") }

// FindPaths needs no more of a file than these two: an error elsewhere in it, which the running daemon did not take up,
// must keep nobody from revoking a user. Its error, an *Error, is all that is wrong with the file; the paths are good
// besides, where they are not empty.
//
// DefaultPath is the daemon's and its operators' to read. Who may only look at what it does finds it at the default paths.
func FindPaths(path string) (Paths, error) {
	data, err := read(path)
	if _, e := os.ReadFile(path); path == DefaultPath && errors.Is(e, fs.ErrPermission) {
		r := defaults()
		return Paths{StateDir: r.StateDir, RunDir: r.RunDir}, nil
	}
	if err != nil {
		return Paths{}, err
	}
	c, err := Parse(path, data)
	if err != nil {
		return scanPaths(data), err
	}
	return c.Paths, nil
}

var pathLine = regexp.MustCompile(`^["']?(state_dir|run_dir)\b`)

// scanPaths goes line by line, as the decoder stops at the first error, up to the first table: further down the keys would
// be others.
func scanPaths(data []byte) Paths {
	found := defaults()
	for line := range bytes.Lines(data) {
		line = bytes.TrimSpace(line)
		if bytes.HasPrefix(line, []byte("[")) {
			break
		}
		m := pathLine.FindSubmatch(line)
		if m == nil {
			continue
		}
		var is map[string]any
		_ = toml.Unmarshal(line, &is) // Parse complains of it
		dir, _ := is[string(m[1])].(string)
		if !filepath.IsAbs(dir) {
			dir = ""
		}
		if string(m[1]) == "run_dir" {
			found.RunDir = dir
		} else {
			found.StateDir = dir
		}
	}
	return Paths{StateDir: found.StateDir, RunDir: found.RunDir}
}
