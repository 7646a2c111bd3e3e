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

// PACURL is where a browser asks for its configuration while the tunnel is up.
func PACURL(s Status) string {
	return "http://" + strings.TrimSuffix(s.Console.String(), ":80") + "/proxy.pac"
}

// FetchPAC asks the bastion for what its policy lets this user's browser do.
func FetchPAC(ctx context.Context, s Status) ([]byte, error) {
	if !s.Console.IsValid() {
		return nil, ErrDown
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, PACURL(s), nil)
	if err != nil {
		return nil, err
	}
	// Whatever proxy this shell has set is no way to it.
	t := &http.Transport{DisableKeepAlives: true}
	resp, err := t.RoundTrip(req)
	if err != nil {
		return nil, fmt.Errorf("%s: %w: `vpn status` says whether data pass", PACURL(s), err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxPAC+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("%s: %w", PACURL(s), err)
	case resp.StatusCode != http.StatusOK:
		return nil, fmt.Errorf("%s: %s: %.200q", PACURL(s), resp.Status, strings.TrimSpace(string(body)))
	case len(body) > maxPAC:
		return nil, fmt.Errorf("%s: longer than %d bytes", PACURL(s), maxPAC)
	}
	return body, nil
}
