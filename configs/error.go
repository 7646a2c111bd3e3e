package configs

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"

	"github.com/pelletier/go-toml/v2/unstable"
)

// Error is everything that is wrong with a configuration file. A program that meets it ends with exit status 2.
type Error struct {
	File     string
	Problems []Problem // in the order of the file
}

// Problem is one thing that is wrong. Line is 0 where it is of the whole file.
type Problem struct {
	Line    int
	Text    string // the key, its value, and the way out
	Excerpt string // the line with a caret below, or empty
}

func (e *Error) Error() string {
	var b strings.Builder
	for i, p := range e.Problems {
		if i > 0 {
			b.WriteByte('\n')
		}
		b.WriteString(e.File)
		if p.Line > 0 {
			fmt.Fprintf(&b, ":%d", p.Line)
		}
		b.WriteString(": " + p.Text)
		if p.Excerpt != "" {
			b.WriteString("\n" + p.Excerpt)
		}
	}
	return b.String()
}

// excerpt shows a line (from 1) of the file with carets below width bytes from column (from 1) on.
func excerpt(data []byte, line, column, width int) string {
	lines := bytes.Split(data, []byte("\n"))
	if line < 1 || line > len(lines) {
		return ""
	}
	text := strings.TrimRight(string(lines[line-1]), "\r")
	column = min(max(column, 1), len(text)+1)
	// Tabs stay tabs below, so that the caret stands where it should on any terminal.
	pad := strings.Map(func(r rune) rune {
		if r == '\t' {
			return r
		}
		return ' '
	}, text[:column-1])
	return fmt.Sprintf("    %s\n    %s%s", text, pad, strings.Repeat("^", max(1, min(width, len(text)-column+1))))
}

// key names an element of an array of tables: key("knock.sequence", 0, "ports") is knock.sequence[0].ports.
func key(table string, i int, name string) string {
	k := table + "[" + strconv.Itoa(i) + "]"
	if name != "" {
		k += "." + name
	}
	return k
}

// keyLines maps every key and table of a file to its line. What does not parse is left out: the decoder complains of it.
func keyLines(data []byte) map[string]int {
	lines := map[string]int{}
	count := map[string]int{} // elements of arrays of tables so far
	table := ""
	var p unstable.Parser
	p.Reset(data)
	for p.NextExpression() {
		e := p.Expression()
		name, line := "", 0
		for it := e.Key(); it.Next(); {
			if name != "" {
				name += "."
			}
			name += string(it.Node().Data)
			if line == 0 {
				line = p.Shape(it.Node().Raw).Start.Line
			}
		}
		switch e.Kind {
		case unstable.ArrayTable:
			table = key(name, count[name], "")
			count[name]++
			lines[table] = line
			if _, seen := lines[name]; !seen {
				lines[name] = line
			}
		case unstable.Table:
			table = name
			lines[table] = line
		case unstable.KeyValue:
			if table != "" {
				name = table + "." + name
			}
			lines[name] = line
			inlineLines(&p, lines, name, line, e.Value())
		}
	}
	return lines
}

// inlineLines enters the keys of an inline table, or of an array of them, under the line where it begins.
func inlineLines(p *unstable.Parser, lines map[string]int, name string, line int, v *unstable.Node) {
	switch v.Kind {
	case unstable.InlineTable:
		for it := v.Children(); it.Next(); {
			sub := name
			for k := it.Node().Key(); k.Next(); {
				sub += "." + string(k.Node().Data)
			}
			lines[sub] = line
			inlineLines(p, lines, sub, line, it.Node().Value())
		}
	case unstable.Array:
		i := 0
		for it := v.Children(); it.Next(); i++ {
			if it.Node().Kind == unstable.InlineTable {
				lines[key(name, i, "")] = line
				inlineLines(p, lines, key(name, i, ""), line, it.Node())
			}
		}
	}
}
