package bench

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// WriteSection puts a section of Markdown, from its "## " heading on, in the place of the one with the same heading, else at the end.
func WriteSection(file, section string) error {
	text, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		text, err = []byte("# Benchmarks\n"), os.MkdirAll(filepath.Dir(file), 0o755)
	}
	if err != nil {
		return err
	}
	heading, _, _ := strings.Cut(section, "\n")
	before, after, found := bytes.Cut(append([]byte("\n"), text...), []byte("\n"+heading+"\n"))
	rest := []byte{}
	if found {
		if i := bytes.Index(after, []byte("\n## ")); i >= 0 {
			rest = after[i:]
		}
	}
	out := strings.TrimSpace(string(before)) + "\n\n" + strings.TrimSpace(section) + "\n" + string(rest)
	return os.WriteFile(file, []byte(out), 0o644)
}
