package control

import (
	"context"
	"net/http"
	"net/url"
)

// Decision is what the proxy's policy says of a request that nobody made.
type Decision struct {
	User        string   `json:"user"`
	Groups      []string `json:"groups"`
	Destination string   `json:"destination"` // in its one form
	Plain       bool     `json:"plain"`       // plain HTTP, not a tunnel
	Allow       bool     `json:"allow"`
	Observed    bool     `json:"observed"` // let through only because proxy.mode is observe
	Reason      string   `json:"reason"`   // stable
	Sentence    string   `json:"sentence"`
	Rule        int      `json:"rule,omitempty"`      // of [[proxy.rule]], from 1
	RuleText    string   `json:"rule_text,omitempty"` // what that rule says
	TLS         bool     `json:"tls"`                 // the tunnel must open with a ClientHello for the destination
	Addresses   bool     `json:"addresses"`           // those that the name resolves to are judged when it is dialed
}

// decide answers GET /v1/decide?user=USER&to=DESTINATION.
func (o *Operations) decide(r *http.Request) (any, error) {
	q := r.URL.Query()
	return o.Decide(q.Get("user"), q.Get("to"))
}

// Decide asks what the running daemon's policy says of a user and a destination, HOST:PORT or a URL.
func (c *Client) Decide(ctx context.Context, user, to string) (d Decision, err error) {
	err = c.do(ctx, "GET", "/v1/decide?"+url.Values{"user": {user}, "to": {to}}.Encode(), nil, &d)
	return d, err
}
