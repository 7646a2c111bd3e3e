package control

import (
	"context"
	"errors"
	"net/http"
	"time"

	"perimeterd/configs"
	"perimeterd/firewall"
	"perimeterd/vpn"
)

// Configuration is how the daemon changes its configuration while it runs.
type Configuration interface {
	// Apply takes up the file; with a positive trial, only for so long unless Confirm is called meanwhile.
	Apply(trial time.Duration) (Applied, error)
	Confirm() (Applied, error)
	Rollback() (Applied, error)
	// Table is what the file would make of the table.
	Table() (firewall.Config, error)
}

// Trial is the body of an apply.
type Trial struct {
	Confirm time.Duration `json:"confirm,omitempty"` // nanoseconds; 0: no trial
}

// Applied says what rules now.
type Applied struct {
	File  string    `json:"file"`
	Until time.Time `json:"until,omitzero"` // of a trial
}

func handleConfiguration(handle func(string, func(*http.Request) (any, error)), c Configuration) {
	// What is wrong with the file is the operator's to know, and not a failure of the daemon.
	refused := func(v any, err error) (any, error) {
		var file *configs.Error
		if errors.As(err, &file) {
			err = &vpn.APIError{Status: http.StatusUnprocessableEntity, Code: vpn.CodeBadRequest, Message: err.Error()}
		}
		return v, err
	}
	handle("POST /v1/configuration", func(r *http.Request) (any, error) {
		var t Trial
		if err := decode(r.Body, &t); err != nil {
			return nil, err
		}
		return refused(c.Apply(t.Confirm))
	})
	handle("POST /v1/configuration/confirm", func(*http.Request) (any, error) { return c.Confirm() })
	handle("POST /v1/configuration/rollback", func(*http.Request) (any, error) { return c.Rollback() })
	handle("GET /v1/configuration/table", func(*http.Request) (any, error) { return refused(c.Table()) })
}

// Apply is Configuration.Apply.
func (c *Client) Apply(ctx context.Context, trial time.Duration) (a Applied, err error) {
	err = c.do(ctx, "POST", "/v1/configuration", Trial{trial}, &a)
	return a, err
}

// Confirm is Configuration.Confirm.
func (c *Client) Confirm(ctx context.Context) (a Applied, err error) {
	err = c.do(ctx, "POST", "/v1/configuration/confirm", nil, &a)
	return a, err
}

// Rollback is Configuration.Rollback.
func (c *Client) Rollback(ctx context.Context) (a Applied, err error) {
	err = c.do(ctx, "POST", "/v1/configuration/rollback", nil, &a)
	return a, err
}

// Table is Configuration.Table.
func (c *Client) Table(ctx context.Context) (t firewall.Config, err error) {
	err = c.do(ctx, "GET", "/v1/configuration/table", nil, &t)
	return t, err
}
