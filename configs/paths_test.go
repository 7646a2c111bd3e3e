package configs

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestPathsAreFoundInAFileWithErrors(t *testing.T) {
	const dirs = "state_dir = \"/srv/state\" # here\n  run_dir='/srv/run'\n"
	both := Paths{"/srv/state", "/srv/run"}
	for name, test := range map[string]struct {
		text string
		want Paths
		says string // in the error; empty: none
	}{
		"a good one":                {dirs + minimal, both, ""},
		"an unknown key":            {dirs + minimal + "[proxy]\nidel = \"1m\"\n", both, ":6: proxy.idel: unknown: proxy has port, "},
		"a value that cannot be":    {dirs + minimal + "[session]\nmax = \"forever\"\n", both, "session.max"},
		"no TOML further down":      {dirs + "[gate\n", both, ":3: "},
		"no TOML above":             {"x = \n" + dirs + minimal, both, ":1: "},
		"the defaults":              {"[gate]\nstate_dir = \"/no\"\n", Paths{"/var/lib/perimeterd", "/run/perimeterd"}, "gate.state_dir"},
		"a state_dir that is none":  {"state_dir = 5\nrun_dir = \"/srv/run\"\n" + minimal, Paths{"", "/srv/run"}, "state_dir"},
		"a run_dir without quotes":  {"state_dir = \"/srv/state\"\nrun_dir = /srv/run\n" + minimal, Paths{"/srv/state", ""}, ":2: "},
		"a run_dir that is no path": {"run_dir = \"run\"\n" + minimal, Paths{"/var/lib/perimeterd", ""}, "run_dir \"run\""},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "perimeterd.toml")
			if err := os.WriteFile(path, []byte(test.text), 0o600); err != nil {
				t.Fatal(err)
			}
			got, err := FindPaths(path)
			if got != test.want {
				t.Errorf("%+v, want %+v", got, test.want)
			}
			var e *Error
			if (err == nil) != (test.says == "") || err != nil && (!errors.As(err, &e) || !strings.Contains(err.Error(), test.says)) {
				t.Errorf("error %v, want %q", err, test.says)
			}
		})
	}
	if got, err := FindPaths(filepath.Join(t.TempDir(), "missing.toml")); got != (Paths{}) || err == nil {
		t.Errorf("of no file: %+v, %v", got, err)
	}
}
