package configs

import (
	"bytes"
	"strings"
	"testing"
)

func TestMoveChangesTheDirectoriesAndNothingElse(t *testing.T) {
	for name, text := range map[string]string{
		"neither is written": minimal + "[proxy]\nport = 3128\n",
		"both are written":   "state_dir = \"/srv/a\" # here\n'run_dir'=\"/srv/b\"\n" + minimal + "# state_dir = \"/no\"\n",
		"the reference":      string(Reference),
	} {
		moved, c, err := Move("/x/perimeterd.toml", []byte(text), `/new/"a" b`, "/new/run")
		if err != nil {
			t.Fatalf("%s: %v\n%s", name, err, moved)
		}
		if c.StateDir != `/new/"a" b` || c.RunDir != "/new/run" || !bytes.Equal(c.Text, moved) {
			t.Errorf("%s: %s %s", name, c.StateDir, c.RunDir)
		}
		lines := bytes.Count(moved, []byte("\n"))
		for line := range strings.Lines(text) {
			if bytes.Contains(moved, []byte(line)) {
				lines--
			}
		}
		if lines != 2 {
			t.Errorf("%s: %d lines are new:\n%s", name, lines, moved)
		}
	}
}

func TestMoveRefusesWhatItCannotChange(t *testing.T) {
	if _, _, err := Move("/x/perimeterd.toml", []byte("state_dir = \"\"\"\n/srv/a\"\"\"\n"+minimal), "/new/state", "/new/run"); err == nil {
		t.Error("a value of several lines")
	}
}
