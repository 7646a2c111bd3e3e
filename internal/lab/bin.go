//go:build linux

package lab

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// Bin gives the absolute path of a built binary: in $BIN, or in bin/ at the root of the module around the working directory.
// It builds nothing, so that what is tested is what `make build` made.
func Bin(name string) (string, error) {
	dir := os.Getenv("BIN")
	if dir == "" {
		root, err := moduleRoot()
		if err != nil {
			return "", err
		}
		dir = filepath.Join(root, "bin")
	}
	path, err := filepath.Abs(filepath.Join(dir, name))
	if err != nil {
		return "", err
	}
	if st, err := os.Stat(path); err != nil || !st.Mode().IsRegular() || st.Mode()&0o111 == 0 {
		return "", fmt.Errorf("no program %s: run `make build`, or set BIN to the directory of the binaries", path)
	}
	return path, nil
}

func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		mod, err := os.ReadFile(filepath.Join(dir, "go.mod"))
		if err == nil && bytes.HasPrefix(mod, []byte("module perimeterd\n")) {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", errors.New("the working directory is outside the module perimeterd: set BIN to the directory of the binaries")
		}
		dir = filepath.Dir(dir)
	}
}
