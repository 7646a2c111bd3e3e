package control

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestRootMakesNoSocketWhereOthersMaySwapIt(t *testing.T) {
	for name, spoil := range map[string]func(dir string) error{
		"another's directory": func(dir string) error { return os.Chown(dir, 65534, -1) },
		"a group's directory": func(dir string) error { return os.Chmod(dir, 0o775) },
		"a link": func(dir string) error {
			return os.Rename(dir, dir+"-real")
		},
	} {
		dir := filepath.Join(t.TempDir(), "run")
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := spoil(dir); err != nil {
			t.Fatal(err)
		}
		if name == "a link" {
			if err := os.Symlink(dir+"-real", dir); err != nil {
				t.Fatal(err)
			}
		}
		ln, err := Listen("unix", filepath.Join(dir, "s"))
		if err == nil {
			ln.Close()
		}
		if err == nil || !strings.Contains(err.Error(), "root makes no socket where others may write") {
			t.Errorf("%s: %v", name, err)
		}
		if entries, _ := os.ReadDir(dir); len(entries) > 0 {
			t.Errorf("%s: it left %v", name, entries)
		}
	}
}
