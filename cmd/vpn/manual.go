//go:build manual

package main

import (
	"github.com/spf13/cobra"

	"perimeterd/internal/manual"
)

// addManual is for the build of the packages.
func addManual(root *cobra.Command) { root.AddCommand(manual.Command(root, "1")) }
