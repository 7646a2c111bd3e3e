package control

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"strings"

	"perimeterd/internal/audit"
	"perimeterd/internal/session"
)

const actionSet = "user-set"

// actions are the names that acts have in the audit. One that is not here goes by its method and path.
var actions = map[string]string{
	"POST /v1/users":                  "user-add",
	"POST /v1/users/{name}/revoke":    "user-revoke",
	"POST /v1/users/{name}/settings":  actionSet,
	"POST /v1/authority/rotate":       "ca-rotate",
	"POST /v1/authority/finish":       "ca-finish",
	"DELETE /v1/sessions/{id}":        "kick",
	"POST /v1/configuration":          "apply",
	"POST /v1/configuration/confirm":  "confirm",
	"POST /v1/configuration/rollback": "rollback",
}

// act has everything that is asked for but reading recorded, with who asked and what came of it.
func (o *Operations) act(pattern string, r *http.Request, fn func(*http.Request) (any, error)) (any, error) {
	if o.Audit == nil || r.Method == http.MethodGet {
		return fn(r)
	}
	a := audit.Record{Action: actions[pattern], User: r.PathValue("name")}
	if a.Action == "" {
		a.Action = r.Method + " " + r.URL.Path
	}
	if id, err := session.ParseID(r.PathValue("id")); err == nil {
		a.Session = id.String()
		if s, live := o.Sessions.Get(id); live {
			a.User, a.Device, a.Source = s.User, s.Device, s.Outer.String()
		}
	}
	var body bytes.Buffer
	r.Body = struct {
		io.Reader
		io.Closer
	}{io.TeeReader(r.Body, &body), r.Body}
	reply, err := fn(r)
	var asked struct {
		Name, Device string
		Groups       []string
		Replace      bool
	}
	if json.Unmarshal(body.Bytes(), &asked) == nil { // else it is refused as well
		a.User, a.Device = cmp.Or(a.User, asked.Name), cmp.Or(a.Device, asked.Device)
		if a.Action == actionSet {
			a.Detail = strings.TrimSpace(body.String()) // only what changes, and nothing secret
		} else if len(asked.Groups) > 0 {
			a.Detail = "groups " + strings.Join(asked.Groups, ",")
		}
		if asked.Replace {
			a.Action = "user-profile"
		}
	}
	o.Audit(Act(r.Context(), a, err))
	return reply, err
}

// Act completes the record of an operator's act.
func Act(ctx context.Context, a audit.Record, err error) audit.Record {
	a.Kind, a.By, a.Decision = audit.Operator, by(ctx), "done"
	if err != nil {
		a.Decision = "failed"
		if a.Detail != "" {
			a.Detail += ": "
		}
		a.Detail += err.Error()
	}
	return a
}
