package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"perimeterd/vpn/client"
)

func envCommand(load func() (*client.Profile, error)) *cobra.Command {
	shell := ""
	c := &cobra.Command{
		Use: "env", Short: "Print the shell's exports for the proxy", Args: noArguments,
		Long: "Prints the variables that make programs use the proxy on this machine, in the words of the shell that $SHELL names,\n" +
			"or PowerShell's on Windows.",
		Example: "  eval \"$(vpn env)\"\n" +
			"  vpn env --shell fish | source\n" +
			"  vpn env --shell powershell | Out-String | Invoke-Expression",
		RunE: func(*cobra.Command, []string) error {
			if shell == "" {
				shell = usualShell(runtime.GOOS, os.Getenv("SHELL"))
			}
			export, ok := exports[shell]
			if !ok {
				return usageError{fmt.Errorf("--shell %q: want sh, bash, zsh, fish or powershell", shell)}
			}
			p, err := load()
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			defer cancel()
			s, err := client.AskStatus(ctx, p)
			if err != nil {
				return err
			}
			if s.URL == "" {
				return client.ErrDown
			}
			for _, e := range client.Environment(s) {
				name, value, _ := strings.Cut(e, "=")
				fmt.Println(export(name, value))
			}
			return nil
		},
	}
	c.Flags().StringVar(&shell, "shell", "", "`NAME` of the shell: sh, bash, zsh, fish or powershell (default: of $SHELL)")
	return c
}

// exports are how shells set a variable for the programs that they start.
var exports = map[string]func(name, value string) string{
	"sh": exportPOSIX, "bash": exportPOSIX, "zsh": exportPOSIX,
	"fish": func(name, value string) string {
		return fmt.Sprintf("set -gx %s '%s'", name, strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(value))
	},
	"powershell": func(name, value string) string {
		return fmt.Sprintf("$Env:%s = '%s'", name, strings.ReplaceAll(value, "'", "''"))
	},
}

func exportPOSIX(name, value string) string {
	return fmt.Sprintf("export %s='%s'", name, strings.ReplaceAll(value, "'", `'\''`))
}

// usualShell is the one that a person most likely has; others than those known speak as sh does.
func usualShell(system, variable string) string {
	name := strings.TrimSuffix(filepath.Base(variable), ".exe")
	if name == "pwsh" || variable == "" && system == "windows" {
		return "powershell"
	}
	if _, ok := exports[name]; ok {
		return name
	}
	return "sh"
}
