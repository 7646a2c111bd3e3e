// Package cmdline puts into words what a command line gets wrong.
package cmdline

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// wants is what flags of a type take, by pflag.Value.Type.
var wants = map[string]string{
	"duration": "a number with its unit, as in 30s, 5m or 1h30m",
	"int":      "a whole number, as in 2",
	"uint":     "a whole number, 0 or more",
	"bool":     "true or false, or nothing, which is true",
}

// FlagError is for cobra.Command.SetFlagErrorFunc: it says what a flag wants, in the place of how the value was not parsed.
func FlagError(_ *cobra.Command, err error) error {
	var invalid *pflag.InvalidValueError
	if errors.As(err, &invalid) {
		if want := wants[invalid.GetFlag().Value.Type()]; want != "" {
			return fmt.Errorf("--%s %q: want %s", invalid.GetFlag().Name, invalid.GetValue(), want)
		}
	}
	return err
}
