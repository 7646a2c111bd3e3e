//go:build linux

// Package bench is what the measuring programs share: the machine they ran on, the figures they found, and how these become a
// file of raw numbers, a section of docs/benchmarks.md, and plots.
package bench

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/procfs"
	"golang.org/x/sys/unix"

	"perimeterd/internal/lab"
)

// Run is one run of a measuring program: when, on what, of what, and what came of it.
type Run struct {
	Date     time.Time         `json:"date"`
	Command  string            `json:"command"` // that does it again
	Took     float64           `json:"took_seconds"`
	Kernel   string            `json:"kernel"`
	CPU      string            `json:"cpu"`
	Cores    int               `json:"cores"`
	Load     float64           `json:"load_before"` // others' use of the machine
	Versions map[string]string `json:"versions"`
	Figures  []Figure          `json:"figures"`
}

// Figure is one thing measured of one way to do it, so that ways can be set side by side and a way be followed as a load grows.
type Figure struct {
	What   string    `json:"what"`         // "knock to open port"
	Who    string    `json:"who"`          // "perimeterd", "squid", "bare TCP"
	Unit   string    `json:"unit"`         // of Values: "s", "B", "B/s", "1/s", "CPU-s/GB"
	At     float64   `json:"at,omitempty"` // the load or distance, where What is measured at several
	Axis   string    `json:"axis,omitempty"`
	Values []float64 `json:"values"` // raw, as they came
}

// Begin says what is measured, and on what. Packages are Debian's, whose versions count.
func Begin(ctx context.Context, command string, packages ...string) (*Run, error) {
	r := &Run{Date: time.Now().Round(0), Command: command, Versions: map[string]string{}}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return nil, err
	}
	r.Kernel = unix.ByteSliceToString(u.Release[:])
	proc, err := procfs.NewDefaultFS()
	if err != nil {
		return nil, err
	}
	cpus, err := proc.CPUInfo()
	if err != nil {
		return nil, err
	}
	if r.Cores = len(cpus); r.Cores > 0 {
		r.CPU = cpus[0].ModelName
	}
	load, err := proc.LoadAvg()
	if err != nil {
		return nil, err
	}
	r.Load = load.Load1
	ours, err := lab.Bin("perimeterd")
	if err != nil {
		return nil, err
	}
	out, err := exec.CommandContext(ctx, ours, "--version").Output()
	if err != nil {
		return nil, err
	}
	r.Versions["perimeterd"] = strings.TrimPrefix(strings.TrimSpace(string(out)), "perimeterd version ")
	for _, p := range packages {
		out, err := exec.CommandContext(ctx, "dpkg-query", "-W", "-f", "${Version}", p).Output()
		if err != nil {
			return nil, fmt.Errorf("version of Debian's package %s: %w", p, err)
		}
		r.Versions[p] = string(out)
	}
	return r, nil
}

// Add notes a figure; values of the same one are gathered.
func (r *Run) Add(f Figure) {
	for i := range r.Figures {
		if g := &r.Figures[i]; g.What == f.What && g.Who == f.Who && g.At == f.At {
			g.Values = append(g.Values, f.Values...)
			return
		}
	}
	r.Figures = append(r.Figures, f)
}

// End takes the time.
func (r *Run) End() { r.Took = time.Since(r.Date).Seconds() }

// Origin is the line below a section's heading: the command, how long it took, the machine and the versions.
func (r *Run) Origin() string {
	return fmt.Sprintf("`%s`, which took %v; written by it. %s.", r.Command, (time.Duration(r.Took) * time.Second), r.Machine())
}

// Machine is the day, the machine and the versions.
func (r *Run) Machine() string {
	s := fmt.Sprintf("%s, %d × %s, Linux %s, load %.2f before", r.Date.Format(time.DateOnly), r.Cores, r.CPU, r.Kernel, r.Load)
	var versions []string
	for name, v := range r.Versions {
		versions = append(versions, name+" "+v)
	}
	slices.Sort(versions)
	return s + "; " + strings.Join(versions, ", ")
}

// Write keeps the raw numbers: v is a Run, or holds one.
func Write(file string, v any) error {
	text, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	return os.WriteFile(file, append(text, '\n'), 0o644)
}
