//go:build linux

package main

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/go-analyze/charts"

	"perimeterd/internal/lab/bench"
)

// draw makes a plot of each thing that several ways were measured of, or that was measured at several loads, and returns the files.
func draw(dir string, figures []bench.Figure) (files []string, err error) {
	var names []string
	of := map[string][]bench.Figure{}
	for _, f := range figures {
		if strings.Contains(f.What, ", lost ") { // dozens, whose worst is in their table
			continue
		}
		if of[f.What] == nil {
			names = append(names, f.What)
		}
		of[f.What] = append(of[f.What], f)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	for _, name := range names {
		if len(of[name]) < 2 {
			continue
		}
		svg, err := plot(name, of[name])
		if err != nil {
			return nil, err
		}
		file := filepath.Join(dir, strings.Trim(regexp.MustCompile(`[^a-z0-9]+`).ReplaceAllString(strings.ToLower(name), "-"), "-")+".svg")
		if err := os.WriteFile(file, svg, 0o644); err != nil {
			return nil, err
		}
		files = append(files, file)
	}
	return files, nil
}

// plot is bars by way, or lines over the load where there are several.
func plot(name string, list []bench.Figure) ([]byte, error) {
	var whos, ats []string
	at := map[string]float64{}
	for _, f := range list {
		label := human(f.At, "")
		if at[label] = f.At; !slices.Contains(ats, label) {
			ats = append(ats, label)
		}
		if !slices.Contains(whos, f.Who) {
			whos = append(whos, f.Who)
		}
	}
	slices.SortFunc(ats, func(a, b string) int {
		if at[a] < at[b] {
			return -1
		}
		return 1
	})
	value := func(who, label string) float64 {
		for _, f := range list {
			if f.Who == who && f.At == at[label] {
				return bench.Quantile(f.Values, 0.5)
			}
		}
		return charts.GetNullValue()
	}
	unit := list[0].Unit
	label := func(v float64) string { return human(v, unit) }
	p := charts.NewPainter(charts.PainterOptions{OutputFormat: charts.ChartOutputSVG, Width: 800, Height: 90 + 45*max(4, len(whos))})
	if len(ats) == 1 {
		slices.Reverse(whos) // from above
		values := make([]float64, len(whos))
		for i, who := range whos {
			values[i] = value(who, ats[0])
		}
		o := charts.NewBarChartOptionWithData([][]float64{values})
		o.Horizontal, o.ValueFormatter = true, label
		o.Title.Text = name + ", median"
		o.CategoryAxis.Labels = whos
		o.SeriesList[0].Label = charts.SeriesLabel{Show: charts.Ptr(true), ValueFormatter: label}
		if err := p.BarChart(o); err != nil {
			return nil, err
		}
		return p.Bytes()
	}
	var values [][]float64
	for _, who := range whos {
		var row []float64
		for _, a := range ats {
			row = append(row, value(who, a))
		}
		values = append(values, row)
	}
	o := charts.NewLineChartOptionWithData(values)
	o.Title.Text = name + ", median, by " + list[0].Axis
	o.Legend.SeriesNames = whos
	o.Legend.Offset = charts.OffsetStr{Left: "center", Top: "24"}
	o.XAxis.Labels = ats
	o.YAxis = []charts.YAxisOption{{ValueFormatter: label}}
	if err := p.LineChart(o); err != nil {
		return nil, err
	}
	return p.Bytes()
}
