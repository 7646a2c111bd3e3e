//go:build linux

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"perimeterd/internal/lab/bench"
)

func TestValuesHaveUnitsThatSuitThem(t *testing.T) {
	for want, got := range map[string]string{
		"99 µs": human(99e-6, "s"), "32.2 ms": human(0.0322, "s"), "1.11 s": human(1.11, "s"), "6 KB": human(6000, "B"),
		"1.9 Gb/s": human(237.5e6, "B/s"), "1803 1/s": human(1803, "1/s"), "0.25 CPU-s/GB": human(0.25, "CPU-s/GB"),
		"2": human(2, "1"), "33.3 %": human(1.0/3, "of a scan"),
	} {
		if got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

func TestGoalIsKeptWithinItsBoundAndBesideItsPeer(t *testing.T) {
	peer := []bench.Figure{{Who: "squid", Values: []float64{10}}, {Who: "nginx", Values: []float64{40}}}
	for _, c := range []struct {
		goal goal
		ours float64
		kept bool
	}{
		{goal{bound: 1}, 1, true},
		{goal{bound: 1}, 1.1, false},
		{goal{bound: -5}, 4, false},
		{goal{bound: -5}, 6, true},
		{goal{beside: map[string]float64{"squid": 8}}, 80, true},
		{goal{beside: map[string]float64{"squid": 8}}, 79, false},
		{goal{beside: map[string]float64{"squid": -1}}, 10, true},
		{goal{beside: map[string]float64{"squid": -1}}, 11, false},
		{goal{beside: map[string]float64{"squid": 8, "nginx": 2}}, 80, true},
		{goal{beside: map[string]float64{"squid": 8, "nginx": 2}}, 79, false},
		{goal{beside: map[string]float64{"squid": 1, "nginx": 2}}, 79, false},
		{goal{bound: 70, beside: map[string]float64{"squid": 1}}, 80, false},
		{goal{beside: map[string]float64{"tinyproxy": 1}}, 100, false},
	} {
		if got := c.goal.kept(c.ours, peer); got != c.kept {
			t.Errorf("%+v with %v: %v", c.goal, c.ours, got)
		}
	}
}

func TestSummaryHasTheRowAndThePlotAndSaysWhatIsNotMeasured(t *testing.T) {
	dir := t.TempDir()
	run := bench.Run{Figures: []bench.Figure{
		{What: "knock to open port", Who: "perimeterd, token", Unit: "s", Values: []float64{1e-4, 2e-4, 9e-4}},
		{What: "knock to open port", Who: "iptables + ipset", Unit: "s", Values: []float64{1e-4}},
	}}
	if err := bench.Write(filepath.Join(dir, "door.json"), run); err != nil {
		t.Fatal(err)
	}
	doc := filepath.Join(dir, "benchmarks.md")
	if err := summarize(dir, doc, filepath.Join(dir, "plots")); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(doc)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"| knock to open port | 200 µs | iptables + ipset 100 µs | as soon as the kernel's ipset | kept |",
		"| not measured |", "![knock-to-open-port](plots/knock-to-open-port.svg)",
	} {
		if !strings.Contains(string(text), want) {
			t.Errorf("%q is not in\n%s", want, text)
		}
	}
	svg, err := os.ReadFile(filepath.Join(dir, "plots", "knock-to-open-port.svg"))
	if err != nil || !strings.HasPrefix(string(svg), "<svg") {
		t.Errorf("the plot: %v, %.60s", err, svg)
	}
	if err := summarize(t.TempDir(), doc, dir); err == nil || !strings.Contains(err.Error(), "make bench") {
		t.Errorf("without results: %v", err)
	}
}
