package main

import (
	"log/slog"
	"os"
	"runtime/debug"
	"testing"

	"golang.org/x/sys/unix"
)

func TestHeapHasABoundBelowTheMachines(t *testing.T) {
	if before, set := os.LookupEnv("GOMEMLIMIT"); set {
		os.Unsetenv("GOMEMLIMIT")
		defer os.Setenv("GOMEMLIMIT", before)
	}
	before := debug.SetMemoryLimit(-1)
	defer debug.SetMemoryLimit(before)
	limitMemory(slog.New(slog.NewTextHandler(t.Output(), nil)))
	var machine unix.Sysinfo_t
	if err := unix.Sysinfo(&machine); err != nil {
		t.Fatal(err)
	}
	if got, all := debug.SetMemoryLimit(-1), int64(machine.Totalram)*int64(machine.Unit); got <= 0 || got > all*3/4 {
		t.Errorf("the limit is %d bytes, of %d", got, all)
	}
}
