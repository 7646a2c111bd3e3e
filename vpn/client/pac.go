package client

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
)

// maxPAC bounds a proxy configuration, bytes.
const maxPAC = 1 << 20

// PACURL is where a browser on this machine asks for its configuration while the tunnel is up.
func PACURL(s Status) string { return "http://" + s.Listen.String() + "/proxy.pac" }

// FetchPAC asks the bastion for what its policy lets this user's browser do.
func FetchPAC(ctx context.Context, s Status) ([]byte, error) {
	if s.URL == "" {
		return nil, ErrDown
	}
	at := PACURL(s)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.URL+"/proxy.pac", nil)
	if err != nil {
		return nil, err
	}
	// Whatever proxy this shell has set is no way to it.
	t := &http.Transport{DisableKeepAlives: true}
	if user := req.URL.User; user != nil {
		secret, _ := user.Password()
		req.SetBasicAuth(user.Username(), secret)
	}
	resp, err := t.RoundTrip(req)
	if err != nil {
		return nil, fmt.Errorf("%s: %w: `vpn status` says whether data pass", at, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxPAC+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("%s: %w", at, err)
	case resp.StatusCode != http.StatusOK:
		return nil, fmt.Errorf("%s: %s: %.200q", at, resp.Status, strings.TrimSpace(string(body)))
	case len(body) > maxPAC:
		return nil, fmt.Errorf("%s: longer than %d bytes", at, maxPAC)
	}
	return body, nil
}
