package main

import (
	"path/filepath"
	"regexp"
	"strings"

	"github.com/spf13/cobra"
)

// hintedError has the commands that it tells to run take the configuration that this one was given.
type hintedError struct {
	error
	config string
}

func (e hintedError) Unwrap() error { return e.error }

// hint is a command to run. What is "of" one is only named by it.
var hint = regexp.MustCompile("(of )?`perimeterd [^`]*`")

func (e hintedError) Error() string {
	return hint.ReplaceAllStringFunc(e.error.Error(), func(s string) string {
		if strings.HasPrefix(s, "of ") || strings.Contains(s, "--config") || strings.Contains(s, "--help") {
			return s
		}
		return strings.TrimSuffix(s, "`") + " --config " + e.config + "`"
	})
}

// hinted is err, where the configuration is at its usual place.
func hinted(cmd *cobra.Command, err error) error {
	if err == nil {
		return nil
	}
	if f := cmd.Flags().Lookup("config"); f != nil && f.Changed {
		return hintedError{err, f.Value.String()}
	}
	if f := cmd.Flags().Lookup("dir"); f != nil && f.Changed {
		return hintedError{err, filepath.Join(f.Value.String(), "perimeterd.toml")}
	}
	return err
}
