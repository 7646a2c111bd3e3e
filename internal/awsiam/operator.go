package awsiam

import (
	"fmt"
	"math/big"
	"net/netip"
	"regexp"
	"strings"
	"time"
)

// operator is a condition's operator, taken apart: ForAllValues:StringNotLikeIfExists.
type operator struct {
	set      string // "", ForAllValues or ForAnyValue
	name     string // without the negation: StringLike
	negated  bool
	ifExists bool
}

// One compares a value of the policy with one of the request. check is of the policy's value as it is written.
type comparison struct {
	check   func(want string) error
	compare func(want pattern, text, got string) (bool, error)
}

// comparisons are the operators. Of those in docs.aws.amazon.com/IAM/latest/UserGuide/reference_policies_elements_condition_operators.html only
// BinaryEquals is missing, whose values no key here has.
var comparisons = makeComparisons()

var negations = map[string]string{
	"StringNotEquals": "StringEquals", "StringNotEqualsIgnoreCase": "StringEqualsIgnoreCase", "StringNotLike": "StringLike", "ArnNotEquals": "ArnEquals",
	"ArnNotLike": "ArnLike", "NumericNotEquals": "NumericEquals", "DateNotEquals": "DateEquals", "NotIpAddress": "IpAddress",
}

func makeComparisons() map[string]comparison {
	anything := func(string) error { return nil }
	text := func(equal func(want pattern, got string) bool) comparison {
		return comparison{anything, func(want pattern, _, got string) (bool, error) { return equal(want, got), nil }}
	}
	all := map[string]comparison{
		"StringEquals":           text(pattern.matches),
		"StringEqualsIgnoreCase": {anything, func(_ pattern, want, got string) (bool, error) { return strings.EqualFold(want, got), nil }},
		"StringLike":             text(pattern.matches),
		"ArnEquals":              {checkARNPattern, func(want pattern, _, got string) (bool, error) { return want.matchesARN(got), nil }},
		"ArnLike":                {checkARNPattern, func(want pattern, _, got string) (bool, error) { return want.matchesARN(got), nil }},
		"Bool":                   ordered(parseBool, func(c int) bool { return c == 0 }),
		"Null":                   {func(s string) error { _, err := parseBool(s); return err }, nil},
		"IpAddress": {func(s string) error { _, err := parseNetwork(s); return err }, func(_ pattern, want, got string) (bool, error) {
			network, err := parseNetwork(want)
			if err != nil {
				return false, err
			}
			addr, err := netip.ParseAddr(got)
			if err != nil {
				return false, fmt.Errorf("%q is no address", got)
			}
			return network.Contains(addr.Unmap()), nil
		}},
	}
	for name, holds := range map[string]func(int) bool{
		"Equals": func(c int) bool { return c == 0 }, "LessThan": func(c int) bool { return c < 0 }, "LessThanEquals": func(c int) bool { return c <= 0 },
		"GreaterThan": func(c int) bool { return c > 0 }, "GreaterThanEquals": func(c int) bool { return c >= 0 },
	} {
		all["Numeric"+name] = ordered(parseNumber, holds)
		all["Date"+name] = ordered(parseDate, holds)
	}
	return all
}

// ordered compares numbers: holds gets the sign of the request's value against the policy's.
func ordered(parse func(string) (*big.Rat, error), holds func(int) bool) comparison {
	return comparison{func(s string) error { _, err := parse(s); return err }, func(_ pattern, want, got string) (bool, error) {
		w, err := parse(want)
		if err != nil {
			return false, err
		}
		g, err := parse(got)
		if err != nil {
			return false, err
		}
		return holds(g.Cmp(w)), nil
	}}
}

// wildcards are of these operators; elsewhere * is a character.
func (o operator) wildcards() bool {
	return o.name == "StringLike" || strings.HasPrefix(o.name, "Arn")
}

func parseOperator(s string) (o operator, err error) {
	name := s
	if set, rest, ok := strings.Cut(s, ":"); ok {
		o.set, name = set, rest
		if set != "ForAllValues" && set != "ForAnyValue" {
			return o, fmt.Errorf("operator %q is not understood: before the colon stands ForAllValues or ForAnyValue", s)
		}
	}
	name, o.ifExists = strings.CutSuffix(name, "IfExists")
	o.name = name
	if positive, ok := negations[name]; ok {
		o.name, o.negated = positive, true
	}
	if _, ok := comparisons[o.name]; !ok || o.name == "Null" && s != "Null" {
		return o, fmt.Errorf("operator %q is not understood: there are %s, their negations, and IfExists, ForAllValues: and ForAnyValue: with all but Null",
			s, strings.Join(sorted(comparisons), ", "))
	}
	return o, nil
}

// checkValues refuses what could never match, but for values that a variable fills.
func (o operator) checkValues(values Values) error {
	check := comparisons[o.name].check
	for _, v := range values {
		if err := check(v); err != nil && !strings.Contains(v, "${") {
			return err
		}
	}
	return nil
}

func checkARNPattern(s string) error {
	if !strings.HasPrefix(s, "arn:") || strings.Count(s, ":") < 5 {
		return fmt.Errorf("%q is no ARN, which has six parts", s)
	}
	return nil
}

func parseBool(s string) (*big.Rat, error) {
	switch strings.ToLower(s) {
	case "true":
		return big.NewRat(1, 1), nil
	case "false":
		return new(big.Rat), nil
	}
	return nil, fmt.Errorf("%q is neither true nor false", s)
}

var decimal = regexp.MustCompile(`^-?[0-9]{1,30}(\.[0-9]{1,30})?$`)

func parseNumber(s string) (*big.Rat, error) {
	if r, ok := new(big.Rat).SetString(s); ok && decimal.MatchString(s) {
		return r, nil
	}
	return nil, fmt.Errorf("%q is no number", s)
}

// parseDate takes the W3C's profile of ISO 8601, and seconds since 1970.
func parseDate(s string) (*big.Rat, error) {
	for _, layout := range []string{time.RFC3339, "2006-01-02T15:04Z07:00", "2006-01-02"} {
		if t, err := time.Parse(layout, s); err == nil {
			return new(big.Rat).SetFrac(new(big.Int).Add(new(big.Int).Mul(big.NewInt(t.Unix()), big.NewInt(1e9)), big.NewInt(int64(t.Nanosecond()))), big.NewInt(1e9)), nil
		}
	}
	if r, err := parseNumber(s); err == nil {
		return r, nil
	}
	return nil, fmt.Errorf("%q is no time, as 2026-01-31T12:00:00Z is", s)
}

func parseNetwork(s string) (netip.Prefix, error) {
	if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" {
		return netip.PrefixFrom(a.Unmap(), a.Unmap().BitLen()), nil
	}
	p, err := netip.ParsePrefix(s)
	if err != nil || p.Addr().Is4In6() {
		return netip.Prefix{}, fmt.Errorf("%q is no address or CIDR", s)
	}
	return p.Masked(), nil
}
