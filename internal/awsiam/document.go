package awsiam

import (
	"bytes"
	"encoding/json"
	"slices"
)

const version = "2012-10-17" // of the policy language: the one with variables

// Document is a policy in IAM's grammar.
type Document struct {
	Version   string      `json:",omitempty"`
	ID        string      `json:"Id,omitempty"`
	Statement []Statement `json:""`
}

// Statement is one rule. Of Action and NotAction one is set, of Resource and NotResource at most one.
type Statement struct {
	Sid          string    `json:",omitempty"`
	Effect       string    // Allow or Deny
	Principal    Principal `json:",omitempty"` // of trust and resource policies
	NotPrincipal Principal `json:",omitempty"`
	Action       Values    `json:",omitempty"`
	NotAction    Values    `json:",omitempty"`
	Resource     Values    `json:",omitempty"`
	NotResource  Values    `json:",omitempty"`
	Condition    Condition `json:",omitempty"`
}

// Principal is kind → names: AWS, Federated, Service, CanonicalUser. Everybody, "*", is AWS → "*".
type Principal map[string]Values

// Condition is operator → key → values. All keys must hold.
type Condition map[string]map[string]Values

// Values is one text, or a list of them.
type Values []string

// MarshalJSON writes a single value without brackets, as people do.
func (v Values) MarshalJSON() ([]byte, error) {
	if len(v) == 1 {
		return json.Marshal(v[0])
	}
	return json.Marshal([]string(v))
}

// Text is the document as JSON with a line's end, in one order: keys as in the types above, conditions by name.
func (d Document) Text() string { return d.text("", "  ") }

// Line is Text without a space: what counts against AWS's limits.
func (d Document) Line() string {
	var b bytes.Buffer
	if err := json.Compact(&b, []byte(d.Text())); err != nil {
		panic(err) // Text is JSON
	}
	return b.String()
}

func (d Document) text(prefix, indent string) string {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent(prefix, indent)
	if err := e.Encode(d); err != nil {
		panic(err) // texts, lists and maps of texts
	}
	return b.String()
}

// NamesPrincipal says whether the document is a trust or resource policy.
func (d Document) NamesPrincipal() bool {
	return slices.ContainsFunc(d.Statement, func(s Statement) bool { return s.Principal != nil || s.NotPrincipal != nil })
}
