package configs

import (
	"bytes"
	"fmt"
)

// Move is the text of a file with other directories for state and socket, and its Config, as read at path. All else stays as it is.
func Move(path string, text []byte, stateDir, runDir string) ([]byte, *Config, error) {
	var head, rest bytes.Buffer
	for _, p := range [][2]string{{"state_dir", stateDir}, {"run_dir", runDir}} {
		value, err := encodeValue(p[1])
		if err != nil {
			return nil, nil, err
		}
		fmt.Fprintf(&head, "%s = %s\n", p[0], value)
	}
	table := false
	for line := range bytes.Lines(text) {
		trimmed := bytes.TrimSpace(line)
		table = table || bytes.HasPrefix(trimmed, []byte("["))
		if table || !pathLine.Match(trimmed) {
			rest.Write(line)
		}
	}
	moved := append(head.Bytes(), rest.Bytes()...)
	c, err := Parse(path, moved)
	if err == nil && (c.StateDir != stateDir || c.RunDir != runDir) {
		err = fmt.Errorf("%s: state_dir and run_dir are written so that they cannot be changed: write each on a line of its own", path)
	}
	return moved, c, err
}

// File is one that the configuration names: by its key, or where it has none by what it is.
type File struct{ Key, Path string }

// Files are those of the PKI; without a path where there is none.
func (i Identity) Files() []File {
	return []File{
		{"identity.ca", i.CA}, {"identity.ca_key", i.CAKey}, {"identity.cert", i.Cert}, {"identity.key", i.Key},
		{"identity.crl", i.CRL}, {"identity.allowed", i.Allowed}, {"the knock master", i.Master}, {"the WireGuard key", i.WireGuardKey}, {"the server id", i.ServerID},
	}
}
