package identity

import (
	"errors"
	"path/filepath"
	"syscall"
	"testing"
)

func TestAPipeThatTookAFilesPlaceIsNotWaitedFor(t *testing.T) {
	path := filepath.Join(t.TempDir(), "crl")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := readFile(path); !errors.Is(err, errNotFile) {
		t.Error(err)
	}
}
