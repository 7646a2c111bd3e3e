package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"syscall"
	"time"

	"perimeterd/internal/identity"
	"perimeterd/internal/session"
	"perimeterd/vpn"
)

// ErrNotRunning is wrapped when nobody listens at the socket.
var ErrNotRunning = errors.New("the daemon is not running")

// maxReply bounds what a client reads: 10,000 users with several devices each fit.
const maxReply = 64 << 20

// Client asks a running daemon. Its methods are those of Operations.
type Client struct {
	path string
	http http.Client
}

// NewClient talks to the socket at path.
func NewClient(path string) *Client {
	dialer := &net.Dialer{Timeout: 2 * time.Second}
	return &Client{path: path, http: http.Client{
		Timeout: 30 * time.Second,
		Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			conn, err := dialer.DialContext(ctx, "unix", path)
			if errors.Is(err, fs.ErrPermission) {
				// Who may only read has a socket of his own.
				if readers, e := dialer.DialContext(ctx, "unix", ReadersSocket(path)); e == nil {
					return readers, nil
				}
			}
			return conn, err
		}},
	}}
}

// AddUser is Operations.AddUser.
func (c *Client) AddUser(ctx context.Context, e identity.Enrolment) (u identity.User, err error) {
	err = c.do(ctx, "POST", "/v1/users", e, &u)
	return u, err
}

// ListUsers is Operations.ListUsers.
func (c *Client) ListUsers(ctx context.Context) (all []identity.User, err error) {
	err = c.do(ctx, "GET", "/v1/users", nil, &all)
	return all, err
}

// RevokeUser is Operations.RevokeUser.
func (c *Client) RevokeUser(ctx context.Context, name, device string) (u identity.User, err error) {
	err = c.do(ctx, "POST", "/v1/users/"+url.PathEscape(name)+"/revoke", Revocation{device}, &u)
	return u, err
}

// Sessions lists the live sessions, oldest first.
func (c *Client) Sessions(ctx context.Context) (all []Session, err error) {
	err = c.do(ctx, "GET", "/v1/sessions", nil, &all)
	return all, err
}

// Kick is Operations.Kick.
func (c *Client) Kick(ctx context.Context, id session.ID) error {
	return c.do(ctx, "DELETE", "/v1/sessions/"+id.String(), nil, nil)
}

// Status asks how the daemon is.
func (c *Client) Status(ctx context.Context) (s Status, err error) {
	err = c.do(ctx, "GET", "/v1/status", nil, &s)
	return s, err
}

func (c *Client) do(ctx context.Context, method, path string, in, out any) error {
	body, err := c.ask(ctx, method, path, in, maxReply)
	if err != nil || out == nil {
		return err
	}
	return json.Unmarshal(body, out)
}

// ask is do, and leaves the reply as it is.
func (c *Client) ask(ctx context.Context, method, path string, in any, limit int64) ([]byte, error) {
	var request []byte
	if in != nil {
		var err error
		if request, err = json.Marshal(in); err != nil {
			return nil, err
		}
	}
	res, err := c.send(ctx, &c.http, method, path, request)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(http.MaxBytesReader(nil, res.Body, limit))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", c.path, err)
	}
	return body, nil
}

// stream asks for an answer that may take any time. Its body must be closed.
func (c *Client) stream(ctx context.Context, path string) (*http.Response, error) {
	return c.send(ctx, &http.Client{Transport: c.http.Transport}, "GET", path, nil)
}

// send returns the answer, if it is one of success.
func (c *Client) send(ctx context.Context, client *http.Client, method, path string, request []byte) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://perimeterd"+path, bytes.NewReader(request))
	if err != nil {
		return nil, err
	}
	if login, err := os.ReadFile("/proc/self/loginuid"); err == nil {
		req.Header.Set(loginHeader, strings.TrimSpace(string(login)))
	}
	res, err := client.Do(req)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		start := "perimeterd run"
		if c.path == serviceSocket && HasService() {
			start = "systemctl start perimeterd"
		}
		return nil, fmt.Errorf("%s: %w: start it with `%s`", c.path, ErrNotRunning, start)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("%s: permission denied: run it as root, or join the group %s, or %s to read only", c.path, Group, ReadersGroup)
	case err != nil:
		return nil, fmt.Errorf("%s: %w", c.path, err)
	case res.StatusCode == http.StatusOK:
		return res, nil
	}
	defer res.Body.Close()
	body, err := io.ReadAll(http.MaxBytesReader(nil, res.Body, maxBody))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", c.path, err)
	}
	var e vpn.ErrorReply
	if json.Unmarshal(body, &e) != nil || e.Error == nil {
		return nil, fmt.Errorf("%s: the daemon answered %s", c.path, res.Status)
	}
	e.Error.Status = res.StatusCode
	return nil, e.Error
}
