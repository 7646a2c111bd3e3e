package bench

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"time"
)

// Quantile is by the nearest rank; zero of none.
func Quantile[T cmp.Ordered](list []T, q float64) (v T) {
	if len(list) == 0 {
		return v
	}
	sorted := slices.Sorted(slices.Values(list))
	return sorted[max(int(math.Ceil(q*float64(len(sorted))))-1, 0)]
}

// Rounded keeps of a time what it is worth.
func Rounded(d time.Duration) time.Duration {
	switch {
	case d < time.Millisecond:
		return d.Round(time.Microsecond)
	case d < 100*time.Millisecond:
		return d.Round(100 * time.Microsecond)
	case d < 10*time.Second:
		return d.Round(time.Millisecond)
	}
	return d.Round(10 * time.Millisecond)
}

// Spread is median, 99 % and worst.
func Spread(list []time.Duration) string {
	return fmt.Sprintf("median %v, 99 %% within %v, worst %v", Rounded(Quantile(list, 0.5)), Rounded(Quantile(list, 0.99)), Rounded(Quantile(list, 1)))
}

// Times is a ratio with the two digits that it is worth.
func Times(ratio float64) string {
	if ratio < 10 {
		return fmt.Sprintf("%.1f", ratio)
	}
	unit := math.Pow(10, math.Floor(math.Log10(ratio))-1)
	return fmt.Sprintf("%.0f", math.Round(ratio/unit)*unit)
}

// Seconds turns times into a figure's values.
func Seconds(list ...time.Duration) []float64 {
	var s []float64
	for _, d := range list {
		s = append(s, d.Seconds())
	}
	return s
}
