package awsiam

import (
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"
)

// pattern is a text of a policy, with its variables replaced. What a variable gives is taken literally: a user who is named "*"
// is no wildcard.
type pattern []symbol

type symbol struct {
	char rune
	wild bool // char is * or ?
}

// errNoValue is of a variable that the request has no value for. IAM's text is then matched by nothing.
var errNoValue = errors.New("a variable of it has no value in the request, and what IAM makes of that in a negation is not documented")

// compile replaces variables by lookup's values: ${aws:username}, ${aws:PrincipalTag/team, 'none'}, and ${*}, ${?}, ${$} for
// the characters themselves. With a nil lookup there are none, as in policies of the language's older version.
func compile(s string, wild bool, lookup func(key string) (value string, ok bool, err error)) (p pattern, err error) {
	for s != "" {
		if lookup != nil && strings.HasPrefix(s, "${") {
			name, rest, closed := strings.Cut(s[2:], "}")
			if !closed {
				return nil, fmt.Errorf("%q: a variable without its }", s)
			}
			value := name
			if name != "*" && name != "?" && name != "$" {
				if value, err = expand(name, lookup); err != nil {
					return nil, err
				}
			}
			for _, c := range value {
				p = append(p, symbol{char: c})
			}
			s = rest
			continue
		}
		c, n := utf8.DecodeRuneInString(s)
		p = append(p, symbol{c, wild && (c == '*' || c == '?')})
		s = s[n:]
	}
	return p, nil
}

func expand(name string, lookup func(string) (string, bool, error)) (string, error) {
	key, fallback, has := strings.Cut(name, ",")
	value, ok, err := lookup(strings.TrimSpace(key))
	if err != nil || ok {
		return value, err
	}
	if fallback = strings.TrimSpace(fallback); has && len(fallback) > 1 && fallback[0] == '\'' && fallback[len(fallback)-1] == '\'' {
		return fallback[1 : len(fallback)-1], nil
	}
	return "", errNoValue
}

// matches goes back to the last * only, so that its work is bounded by the two lengths' product.
func (p pattern) matches(s string) bool {
	text := []rune(s)
	i, j, star, from := 0, 0, -1, 0
	for j < len(text) {
		switch {
		case i < len(p) && p[i].wild && p[i].char == '*':
			star, from = i, j
			i++
		case i < len(p) && (p[i].wild || p[i].char == text[j]):
			i++
			j++
		case star >= 0:
			from++
			i, j = star+1, from
		default:
			return false
		}
	}
	for i < len(p) && p[i].wild && p[i].char == '*' {
		i++
	}
	return i == len(p)
}

// fields cuts a pattern at its first colons, as an ARN is cut.
func (p pattern) fields(n int) (all []pattern) {
	from := 0
	for i, s := range p {
		if s.char == ':' && !s.wild && len(all) < n-1 {
			all = append(all, p[from:i])
			from = i + 1
		}
	}
	return append(all, p[from:])
}

// matchesARN compares part by part: a * never reaches over a colon but in the last. Missing parts match all.
func (p pattern) matchesARN(s string) bool {
	text := strings.SplitN(s, ":", 6)
	parts := p.fields(6)
	if len(text) != 6 {
		return false
	}
	for i, part := range parts {
		if !part.matches(text[i]) {
			return false
		}
	}
	return true
}

// all says whether the pattern is nothing but *.
func (p pattern) all() bool {
	for _, s := range p {
		if !s.wild || s.char != '*' {
			return false
		}
	}
	return len(p) > 0
}

// String is the text with its variables replaced.
func (p pattern) String() string {
	var b strings.Builder
	for _, s := range p {
		b.WriteRune(s.char)
	}
	return b.String()
}
