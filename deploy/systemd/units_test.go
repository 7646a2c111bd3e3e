package systemd

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// mostExposed is in tenths: systemd-analyze rates from 0.0, shut in, to 10.0.
const mostExposed = "16"

// In the units a program of this machine stands for the daemon, which is not installed here.
func copyUnits(t *testing.T) (services, all []string) {
	t.Helper()
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	found, err := filepath.Glob("*.*")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for _, unit := range found {
		if ext := filepath.Ext(unit); ext != ".service" && ext != ".socket" {
			continue
		}
		text, err := os.ReadFile(unit)
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, unit)
		if err := os.WriteFile(path, []byte(strings.ReplaceAll(string(text), "/usr/bin/perimeterd", program)), 0o644); err != nil {
			t.Fatal(err)
		}
		all = append(all, path)
		if filepath.Ext(unit) == ".service" {
			services = append(services, path)
		}
	}
	if len(services) != 3 || len(all) != 4 {
		t.Fatalf("units: %q", found)
	}
	return services, all
}

func TestUnitsAreUnderstood(t *testing.T) {
	_, all := copyUnits(t)
	out, err := exec.Command("systemd-analyze", append([]string{"verify", "--man=no", "--recursive-errors=no"}, all...)...).CombinedOutput()
	if err != nil || len(out) > 0 {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestUnitsAreShutIn(t *testing.T) {
	services, _ := copyUnits(t)
	for _, unit := range services {
		out, err := exec.Command("systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold="+mostExposed, unit).CombinedOutput()
		lines := strings.Split(strings.TrimSpace(string(out)), "\n")
		t.Log(lines[len(lines)-1])
		if err != nil {
			t.Errorf("%s: %v\n%s", filepath.Base(unit), err, out)
		}
	}
}
