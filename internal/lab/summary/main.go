//go:build linux

// Command summary gathers what the measuring programs left in bench/ into one file of raw numbers, one table of what was aimed
// at, and plots. It measures nothing. `make bench` runs it last.
package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"perimeterd/internal/lab/bench"
)

func main() {
	dir := flag.String("results", "bench", "`DIR` of the programs' files, where results.json is written too")
	doc := flag.String("doc", "docs/benchmarks.md", "`FILE` whose section \"At a glance\" is written")
	plots := flag.String("plots", "docs/plots", "`DIR` for the plots")
	flag.Parse()
	if err := summarize(*dir, *doc, *plots); err != nil {
		fmt.Fprintln(os.Stderr, "summary:", err)
		os.Exit(1)
	}
}

func summarize(dir, doc, plots string) error {
	runs, err := gather(dir)
	if err != nil {
		return err
	}
	var figures []bench.Figure
	for _, r := range runs {
		figures = append(figures, r.Figures...)
	}
	if err := bench.Write(filepath.Join(dir, "results.json"), runs); err != nil {
		return err
	}
	files, err := draw(plots, figures)
	if err != nil {
		return err
	}
	text := section(runs, figures)
	for _, f := range files {
		path, err := filepath.Rel(filepath.Dir(doc), f)
		if err != nil {
			return err
		}
		text += fmt.Sprintf("\n![%s](%s)\n", strings.TrimSuffix(filepath.Base(f), ".svg"), path)
	}
	fmt.Print(text)
	return bench.WriteSection(doc, text)
}

// gather reads the runs, by the name of their file.
func gather(dir string) (map[string]bench.Run, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.json"))
	if err != nil {
		return nil, err
	}
	runs := map[string]bench.Run{}
	for _, f := range files {
		name := strings.TrimSuffix(filepath.Base(f), ".json")
		if name == "results" {
			continue
		}
		text, err := os.ReadFile(f)
		if err != nil {
			return nil, err
		}
		var r bench.Run
		if err := json.Unmarshal(text, &r); err != nil {
			return nil, fmt.Errorf("%s: %w: run the program that wrote it again", f, err)
		}
		runs[name] = r
	}
	if len(runs) == 0 {
		return nil, errors.New("no results in " + dir + ": `make bench` measures")
	}
	return runs, nil
}

func section(runs map[string]bench.Run, figures []bench.Figure) string {
	var b strings.Builder
	b.WriteString("## At a glance\n\n`make bench` writes it from the sections below, which say how each figure came about. Medians; ratios are of one interleaved run.\n\n")
	b.WriteString("| | perimeterd | beside | aimed at | |\n|---|---|---|---|---|\n")
	for _, g := range goals {
		ours, others := g.find(figures)
		if ours == nil {
			fmt.Fprintf(&b, "| %s | not measured | | %s | |\n", g.label(), g.want)
			continue
		}
		var beside []string
		for _, o := range others {
			beside = append(beside, fmt.Sprintf("%s %s", o.Who, human(bench.Quantile(o.Values, 0.5), o.Unit)))
		}
		verdict := "missed"
		if g.kept(bench.Quantile(ours.Values, 0.5), others) {
			verdict = "kept"
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s |\n", g.label(), human(bench.Quantile(ours.Values, 0.5), ours.Unit), strings.Join(beside, "; "), g.want, verdict)
	}
	var from []string
	for name, r := range runs {
		from = append(from, fmt.Sprintf("%s: %s, %.0f s, load %.2f before", name, r.Date.Format("2006-01-02 15:04"), r.Took, r.Load))
	}
	slices.Sort(from)
	fmt.Fprintf(&b, "\nWhat was missed, and why: \"Where goals are missed\". Runs: %s.\n", strings.Join(from, "; "))
	return b.String()
}
