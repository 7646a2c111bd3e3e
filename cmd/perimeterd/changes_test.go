package main

import (
	"strings"
	"testing"

	"perimeterd/configs"
)

func TestWhatTakesARestartIsNamedByItsKey(t *testing.T) {
	parse := func(replace ...string) *configs.Config {
		c, err := configs.Parse("/etc/perimeterd/perimeterd.toml", []byte(strings.NewReplacer(replace...).Replace(string(configs.Reference))))
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	good := parse()
	for _, tt := range []struct {
		replace []string
		want    string
	}{
		{[]string{`listen   = [":1194"]`, `listen   = [":443"]`}, "gate.listen"},
		{[]string{`mtu       = 1420`, `mtu       = 1400`, `devices = 5`, `devices = 6`}, "session.devices, tunnel.mtu"},
		{[]string{`step       = "30s"`, `step       = "10s"`}, "knock.step"},
		{[]string{`level  = "info"`, `level  = "debug"`}, "log.level"},
		{[]string{`window     = "60s"`, `window     = "10s"`}, ""},
		{[]string{"[log]\nlevel  = \"info\"", "[log]\nlevel  = \"warn\""}, "log.level"},
	} {
		if got := needsRestart(good, parse(tt.replace...)); got != tt.want {
			t.Errorf("%v: %q, want %q", tt.replace, got, tt.want)
		}
	}
}
