package configs

import (
	"bytes"
	"path/filepath"

	"github.com/pelletier/go-toml/v2"
)

// Paths are what operators' commands need to find the daemon. Both are absolute; FindPaths leaves one empty that it
// cannot read.
type Paths struct{ StateDir, RunDir string }

// StateFile is the bbolt file of users and sessions.
func (p Paths) StateFile() string { return filepath.Join(p.StateDir, "state.db") }

// ControlSocket is where the running daemon takes operators' commands.
func (p Paths) ControlSocket() string { return filepath.Join(p.RunDir, "control.sock") }

// FindPaths reads no more of a file than these two, so that an error elsewhere in it, which the running daemon never took
// up, keeps nobody from revoking a user. Its error, an *Error, is everything that is wrong with the file; the paths are
// good besides, where they are not empty.
func FindPaths(path string) (Paths, error) {
	data, err := read(path)
	if err != nil {
		return Paths{}, err
	}
	c, err := Parse(path, data)
	if err == nil {
		return c.Paths, nil
	}
	found := defaults()
	// Line by line, as the decoder stops at the first error. Both stand before the first table, or they are not these keys.
	for line := range bytes.Lines(data) {
		line = bytes.TrimSpace(line)
		if bytes.HasPrefix(line, []byte("[")) {
			break
		}
		for key, value := range map[string]*string{"state_dir": &found.StateDir, "run_dir": &found.RunDir} {
			if !bytes.HasPrefix(bytes.TrimLeft(line, `"'`), []byte(key)) {
				continue
			}
			var is map[string]any
			_ = toml.Unmarshal(line, &is) // what it cannot read is in err already
			if _, other := is[key]; len(is) > 0 && !other {
				continue // a key that begins alike
			}
			if *value, _ = is[key].(string); !filepath.IsAbs(*value) {
				*value = ""
			}
		}
	}
	return Paths{StateDir: found.StateDir, RunDir: found.RunDir}, err
}
