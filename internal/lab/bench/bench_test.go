//go:build linux

package bench

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestSectionTakesThePlaceOfTheOneBefore(t *testing.T) {
	file := filepath.Join(t.TempDir(), "benchmarks.md")
	write := func(section string) string {
		t.Helper()
		if err := WriteSection(file, section); err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	if got, want := write("## A\n\none\n"), "# Benchmarks\n\n## A\n\none\n"; got != want {
		t.Errorf("new file: %q, want %q", got, want)
	}
	if got, want := write("## B\n\ntwo\n"), "# Benchmarks\n\n## A\n\none\n\n## B\n\ntwo\n"; got != want {
		t.Errorf("new section: %q, want %q", got, want)
	}
	if got, want := write("## A\n\nthree\n"), "# Benchmarks\n\n## A\n\nthree\n\n## B\n\ntwo\n"; got != want {
		t.Errorf("section again: %q, want %q", got, want)
	}
}

func TestQuantileIsTheNearestRank(t *testing.T) {
	var hundred []time.Duration
	for i := range 100 {
		hundred = append(hundred, time.Duration(100-i))
	}
	for q, want := range map[float64]time.Duration{0: 1, 0.5: 50, 0.99: 99, 1: 100} {
		if got := Quantile(hundred, q); got != want {
			t.Errorf("quantile %v is %v, want %v", q, got, want)
		}
	}
	if Quantile([]int(nil), 0.5) != 0 {
		t.Error("quantile of nothing")
	}
}
