package control

import (
	"os"
	"path/filepath"
	"testing"
)

func TestAServiceIsOneOnlyWhereSystemdRunsAndHasTheUnit(t *testing.T) {
	root := t.TempDir()
	unit := filepath.Join(root, "usr/lib/systemd/system", Unit)
	if err := os.MkdirAll(filepath.Dir(unit), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(unit, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if hasService(root) {
		t.Error("without systemd")
	}
	if err := os.MkdirAll(filepath.Join(root, "run/systemd/system"), 0o755); err != nil {
		t.Fatal(err)
	}
	if !hasService(root) {
		t.Error("none with both")
	}
	if err := os.Remove(unit); err != nil {
		t.Fatal(err)
	}
	if hasService(root) {
		t.Error("without the unit")
	}
}
