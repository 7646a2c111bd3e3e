// Package manual writes a program's manual pages and completions from its commands, for the Debian packages. Only builds with
// the tag "manual" hold it: the daemon has no use for a Markdown parser.
package manual

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

// Command is a hidden command "manual DIR", which writes the pages of root's program, in a section of the manual (1 for
// everybody's programs, 8 for root's), and its completions for bash, zsh and fish. SOURCE_DATE_EPOCH is the pages' date.
func Command(root *cobra.Command, section string) *cobra.Command {
	return &cobra.Command{
		Use: "manual DIR", Hidden: true, Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error { return write(root, section, args[0]) },
	}
}

func write(root *cobra.Command, section, dir string) error {
	completions := map[string]func(path string) error{
		"bash/" + root.Name():           func(path string) error { return root.GenBashCompletionFileV2(path, true) },
		"zsh/_" + root.Name():           root.GenZshCompletionFile,
		"fish/" + root.Name() + ".fish": func(path string) error { return root.GenFishCompletionFile(path, true) },
	}
	for name, generate := range completions {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := generate(path); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	root.CompletionOptions.HiddenDefaultCmd = true
	prepare(root)
	pages := filepath.Join(dir, "man")
	if err := os.MkdirAll(pages, 0o755); err != nil {
		return err
	}
	return doc.GenManTree(root, &doc.GenManHeader{Section: section, Manual: "perimeterd", Source: root.Name()}, pages)
}

// examples is how a command's long text begins.
var examples = regexp.MustCompile(`^Examples:\n((?:  .*\n?)+)\n?`)

// prepare turns texts for a terminal into what the generator takes for Markdown: examples have a section of their own.
func prepare(c *cobra.Command) {
	c.DisableAutoGenTag = true // it has a date
	if m := examples.FindStringSubmatch(c.Long); m != nil {
		c.Example, c.Long = strings.TrimRight(m[1], "\n"), c.Long[len(m[0]):]
		if c.Long == "" {
			c.Long = c.Short + "."
		}
	}
	c.Long = strings.NewReplacer("<", `\<`, "*", `\*`, "_", `\_`).Replace(c.Long)
	for _, sub := range c.Commands() {
		prepare(sub)
	}
}
