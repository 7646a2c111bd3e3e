package configs

import (
	"strconv"
	"strings"
)

// rate reads a bandwidth, "" for none, in bits a second. Its units are powers of ten, as links are sold.
func (p *parser) rate(key, s string) uint64 {
	if s == "" {
		return 0
	}
	for unit, bits := range map[string]float64{"kbit": 1e3, "Mbit": 1e6, "Gbit": 1e9} {
		number, ok := strings.CutSuffix(s, unit)
		if !ok {
			continue
		}
		if n, err := strconv.ParseFloat(number, 64); err == nil && n*bits >= 64e3 && n*bits <= 1e12 {
			return uint64(n * bits)
		}
	}
	p.bad(key, `%s %q: want a number and a unit, 64kbit to 1000Gbit, as in "200Mbit", or "" for no limit`, key, s)
	return 0
}
