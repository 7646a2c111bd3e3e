package cmdline

import (
	"io"
	"testing"
	"time"

	"github.com/spf13/cobra"
)

func TestFlagErrorsSayWhatIsWanted(t *testing.T) {
	for line, want := range map[string]string{
		"--timeout=5":     `--timeout "5": want a number with its unit, as in 30s, 5m or 1h30m`,
		"--devices=x":     `--devices "x": want a whole number, as in 2`,
		"--devices=9e99":  `--devices "9e99": want a whole number, as in 2`,
		"-d=-1":           `--delay "-1": want a whole number, 0 or more`,
		"--json=perhaps":  `--json "perhaps": want true or false, or nothing, which is true`,
		"--no-such":       "unknown flag: --no-such",
		"--timeout=90s":   "",
		"--json=false":    "",
		"--devices=-2":    "",
		"--timeout=1h30m": "",
	} {
		root := &cobra.Command{Use: "x", SilenceErrors: true, SilenceUsage: true}
		sub := &cobra.Command{Use: "y", RunE: func(*cobra.Command, []string) error { return nil }}
		sub.Flags().Duration("timeout", time.Second, "")
		sub.Flags().Int("devices", 0, "")
		sub.Flags().UintP("delay", "d", 0, "")
		sub.Flags().Bool("json", false, "")
		root.AddCommand(sub)
		root.SetFlagErrorFunc(FlagError)
		root.SetArgs([]string{"y", line})
		root.SetErr(io.Discard)
		got := ""
		if err := root.Execute(); err != nil {
			got = err.Error()
		}
		if got != want {
			t.Errorf("%s: %q, want %q", line, got, want)
		}
	}
}
