package configs

import (
	"bytes"
	"fmt"
	"regexp"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

var (
	tableLine = regexp.MustCompile(`^\[+([a-z_.]+)\]+`)
	valueLine = regexp.MustCompile(`^([a-z_]+)(\s*=\s*)(.*?)(\s+#.*)?$`)
)

// Render is the reference with some values replaced, comments kept. Values are by key ("gate.endpoint"), of an array of
// tables the first element's; strings and lists of strings. A key that the reference lacks is an error.
func Render(values map[string]any) ([]byte, error) {
	done := map[string]bool{}
	table := ""
	lines := strings.Split(string(Reference), "\n")
	for i, line := range lines {
		if m := tableLine.FindStringSubmatch(line); m != nil {
			table = m[1] + "."
			continue
		}
		m := valueLine.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		value, wanted := values[table+m[1]]
		if !wanted || done[table+m[1]] {
			continue
		}
		text, err := encodeValue(value)
		if err != nil {
			return nil, err
		}
		// The comment keeps its column where the value leaves room.
		width := len(m[3]) + len(m[4]) - len(strings.TrimLeft(m[4], " "))
		lines[i] = m[1] + m[2] + text
		if comment := strings.TrimLeft(m[4], " "); comment != "" {
			lines[i] += strings.Repeat(" ", max(1, width-len(text))) + comment
		}
		done[table+m[1]] = true
	}
	for k := range values {
		if !done[k] {
			return nil, fmt.Errorf("the reference configuration has no key %s", k)
		}
	}
	return []byte(strings.Join(lines, "\n")), nil
}

func encodeValue(v any) (string, error) {
	if list, ok := v.([]string); ok {
		parts := make([]string, len(list))
		for i, s := range list {
			p, err := encodeValue(s)
			if err != nil {
				return "", err
			}
			parts[i] = p
		}
		return "[" + strings.Join(parts, ", ") + "]", nil
	}
	s, ok := v.(string)
	if !ok {
		return "", fmt.Errorf("a value of type %T cannot be rendered", v)
	}
	var b bytes.Buffer
	if err := toml.NewEncoder(&b).Encode(map[string]string{"k": s}); err != nil {
		return "", err
	}
	text := strings.TrimSpace(strings.TrimPrefix(b.String(), "k = "))
	// The encoder prefers literal strings; the reference has basic ones.
	if !strings.ContainsAny(s, `"\`) && strings.HasPrefix(text, "'") && !strings.HasPrefix(text, "'''") {
		text = `"` + s + `"`
	}
	return text, nil
}
