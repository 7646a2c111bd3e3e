package awsiam

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
)

const (
	maxDocument = 64 << 10 // bytes of a policy's file; AWS takes 20 KiB of the largest kind
	maxDepth    = 16       // of JSON within JSON
)

// object is a JSON object whose keys differ.
type object map[string]any

// Parse reads a policy, and refuses what this package would not understand: IAM has more elements and operators.
func Parse(text []byte) (d Document, err error) {
	if len(text) > maxDocument {
		return d, fmt.Errorf("%d bytes: no policy has more than %d", len(text), maxDocument)
	}
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.UseNumber()
	v, err := decode(dec, maxDepth)
	if err != nil {
		return d, err
	}
	if _, err := dec.Token(); err != io.EOF {
		return d, errors.New("more text after the policy's end")
	}
	top, ok := v.(object)
	if !ok {
		return d, errors.New("no policy: want a JSON object with Version and Statement")
	}
	for _, key := range sorted(top) {
		switch v := top[key]; key {
		case "Version":
			if d.Version, ok = v.(string); !ok || d.Version != version && d.Version != "2008-10-17" {
				return d, fmt.Errorf("element Version %v: want %q", v, version)
			}
		case "Id":
			if d.ID, ok = v.(string); !ok {
				return d, errors.New("element Id is no text")
			}
		case "Statement":
			list, many := v.([]any)
			if !many {
				list = []any{v}
			}
			for i, v := range list {
				s, err := parseStatement(v)
				if err != nil {
					return d, fmt.Errorf("statement %s: %w", label(i, s.Sid), err)
				}
				d.Statement = append(d.Statement, s)
			}
		default:
			return d, fmt.Errorf("element %q is not understood: a policy has Version, Id and Statement", key)
		}
	}
	if len(d.Statement) == 0 {
		return d, errors.New("no Statement in it")
	}
	return d, nil
}

// decode is json.Unmarshal that refuses a key that stands twice, of which it would take the last.
func decode(dec *json.Decoder, depth int) (any, error) {
	if depth == 0 {
		return nil, errors.New("not a policy: too deep")
	}
	t, err := dec.Token()
	if err != nil {
		return nil, notJSON(err)
	}
	switch t {
	case json.Delim('{'):
		o := object{}
		for dec.More() {
			key, err := dec.Token()
			if err != nil {
				return nil, notJSON(err)
			}
			name := key.(string) // the decoder takes no other key
			if _, twice := o[name]; twice {
				return nil, fmt.Errorf("%q stands twice in one object: IAM refuses it or takes one of the two", name)
			}
			if o[name], err = decode(dec, depth-1); err != nil {
				return nil, err
			}
		}
		_, err = dec.Token()
		return o, notJSON(err)
	case json.Delim('['):
		list := []any{}
		for dec.More() {
			v, err := decode(dec, depth-1)
			if err != nil {
				return nil, err
			}
			list = append(list, v)
		}
		_, err = dec.Token()
		return list, notJSON(err)
	}
	return t, nil
}

func notJSON(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return errors.New("not JSON: it ends too early")
	}
	if err != nil {
		return fmt.Errorf("not JSON: %w", err)
	}
	return nil
}

func parseStatement(v any) (s Statement, err error) {
	o, ok := v.(object)
	if !ok {
		return s, errors.New("no JSON object")
	}
	if sid, there := o["Sid"]; there {
		if s.Sid, ok = sid.(string); !ok {
			return s, errors.New("element Sid is no text")
		}
	}
	for _, key := range sorted(o) {
		v := o[key]
		switch key {
		case "Sid":
		case "Effect":
			s.Effect, _ = v.(string)
		case "Principal":
			s.Principal, err = parsePrincipal(v)
		case "NotPrincipal":
			s.NotPrincipal, err = parsePrincipal(v)
		case "Action":
			s.Action, err = texts(v)
		case "NotAction":
			s.NotAction, err = texts(v)
		case "Resource":
			s.Resource, err = texts(v)
		case "NotResource":
			s.NotResource, err = texts(v)
		case "Condition":
			s.Condition, err = parseCondition(v)
		default:
			err = errors.New("not understood")
		}
		if err != nil {
			return s, fmt.Errorf("%s: %w", key, err)
		}
	}
	return s, s.check()
}

func (s Statement) check() error {
	if s.Effect != "Allow" && s.Effect != "Deny" {
		return fmt.Errorf("element Effect %q: want Allow or Deny", s.Effect)
	}
	if (s.Action == nil) == (s.NotAction == nil) {
		return errors.New("want one of Action and NotAction")
	}
	for _, a := range slices.Concat(s.Action, s.NotAction) {
		if service, name, ok := strings.Cut(a, ":"); a != "*" && (!ok || service == "" || name == "" || strings.Contains(name, ":")) {
			return fmt.Errorf("action %q: want SERVICE:ACTION or *", a)
		}
	}
	if s.Resource != nil && s.NotResource != nil {
		return errors.New("want one of Resource and NotResource")
	}
	ofPrincipal := s.Principal != nil || s.NotPrincipal != nil
	if s.Resource == nil && s.NotResource == nil && !ofPrincipal {
		return errors.New("no Resource: only a trust policy, which names its Principal, has none")
	}
	for _, r := range slices.Concat(s.Resource, s.NotResource) {
		if r != "*" && !strings.HasPrefix(r, "arn:") {
			return fmt.Errorf("resource %q: want an ARN or *", r)
		}
	}
	if s.Principal != nil && s.NotPrincipal != nil {
		return errors.New("want one of Principal and NotPrincipal")
	}
	if s.NotPrincipal != nil && s.Effect == "Allow" {
		return errors.New("element NotPrincipal with Allow lets everybody else in, anonymous strangers included: write the Principal")
	}
	return nil
}

func parsePrincipal(v any) (Principal, error) {
	if v == "*" {
		return Principal{"AWS": {"*"}}, nil
	}
	o, ok := v.(object)
	if !ok || len(o) == 0 {
		return nil, errors.New(`want "*" or an object of AWS, Federated, Service, CanonicalUser`)
	}
	p := Principal{}
	for kind, v := range o {
		if !slices.Contains([]string{"AWS", "Federated", "Service", "CanonicalUser"}, kind) {
			return nil, fmt.Errorf("%q is not understood: there are AWS, Federated, Service, CanonicalUser", kind)
		}
		names, err := texts(v)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", kind, err)
		}
		for _, n := range names {
			if n != "*" && strings.ContainsAny(n, "*?") {
				return nil, fmt.Errorf("%s %q: a principal has no wildcard, but for the lone *", kind, n)
			}
		}
		p[kind] = names
	}
	return p, nil
}

func parseCondition(v any) (Condition, error) {
	o, ok := v.(object)
	if !ok {
		return nil, errors.New("no JSON object")
	}
	c := Condition{}
	for _, operator := range sorted(o) {
		op, err := parseOperator(operator)
		if err != nil {
			return nil, err
		}
		keys, ok := o[operator].(object)
		if !ok {
			return nil, fmt.Errorf("%s: want an object of keys and values", operator)
		}
		c[operator] = map[string]Values{}
		lower := map[string]bool{}
		for _, key := range sorted(keys) {
			if lower[strings.ToLower(key)] {
				return nil, fmt.Errorf("%s: %q stands twice", operator, key)
			}
			lower[strings.ToLower(key)] = true
			values, err := texts(keys[key])
			if err == nil {
				err = op.checkValues(values)
			}
			if err != nil {
				return nil, fmt.Errorf("%s %s: %w", operator, key, err)
			}
			c[operator][key] = values
		}
	}
	return c, nil
}

// texts is a text or a list of them. IAM takes true and 5 for "true" and "5".
func texts(v any) (Values, error) {
	list, many := v.([]any)
	if !many {
		list = []any{v}
	}
	if len(list) == 0 {
		return nil, errors.New("an empty list: IAM refuses it")
	}
	var all Values
	for _, v := range list {
		switch v := v.(type) {
		case string:
			all = append(all, v)
		case bool:
			all = append(all, fmt.Sprint(v))
		case json.Number:
			all = append(all, v.String())
		default:
			return nil, errors.New("want a text or a list of texts")
		}
	}
	return all, nil
}

func sorted[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// label names a statement for a person: its number, from 1, and its Sid.
func label(i int, sid string) string {
	if sid == "" {
		return fmt.Sprint(i + 1)
	}
	return fmt.Sprintf("%d (%s)", i+1, sid)
}
