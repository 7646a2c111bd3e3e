package client

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"time"
)

const (
	proxyPatience = 5 * time.Second
	sitePatience  = 15 * time.Second // the proxy itself waits for a destination
	maxEcho       = 4 << 10
)

// inside looks at the tunnel from within, and through it at the proxy, the egress address and the destinations.
func (d *Doctor) inside(ctx context.Context) {
	asking, cancel := context.WithTimeout(ctx, gatePatience)
	s, err := AskStatus(asking, d.Profile)
	cancel()
	switch {
	case errors.Is(err, ErrDown):
		d.well("tunnel", "down; vpn up brings it up, and the proxy and the egress address are looked at then")
		return
	case err != nil:
		d.found(Problem, "tunnel", CodeTunnel, err.Error(), "")
		return
	case s.State != Up:
		d.found(Problem, "tunnel", CodeTunnel, fmt.Sprintf("%s: %s", s.State, s.Problem), "")
	case s.Problem != "":
		d.found(Warning, "tunnel", CodeTunnel, s.Problem, "")
	default:
		d.well("tunnel", "up on %s, address %v", s.Interface, s.Address.Addr())
	}
	proxy := proxyOf(s)
	if proxy == nil {
		return
	}
	d.proxies = []string{proxy.String()}
	if s.Mode == ModeTUN {
		d.proxies = append(d.proxies, "http://"+s.Proxy.String())
	}
	asking, cancel = context.WithTimeout(ctx, proxyPatience)
	_, err = FetchPAC(asking, s) // the listener here answers without a tunnel too; what the bastion says has come through it
	cancel()
	if err != nil {
		if d.doubt || s.Data == DataBlocked {
			d.passes(false)
			return
		}
		d.found(Problem, "tunnel", CodeNoData, fmt.Sprintf("nothing comes back through it: %v", err), "vpn down && vpn up")
		return
	}
	d.passes(s.Transport != "tls")
	d.well("proxy", "the bastion answers through the tunnel; programs find it at %s", proxy.Host)
	d.egress(ctx, proxy, s)
	for _, to := range d.Destinations {
		d.destination(ctx, proxy, to)
	}
}

// proxyOf is where programs are sent. Nil: nowhere.
func proxyOf(s Status) *url.URL {
	if !s.Proxy.IsValid() {
		return nil
	}
	u, _ := url.Parse(s.URL)
	return u
}

// proxyRefusal is the proxy's answer to a CONNECT, if that is not yes.
type proxyRefusal struct {
	Status string
	Code   string `json:"code"`
	Text   string `json:"message"`
	ID     string `json:"id"`
}

func (r *proxyRefusal) Error() string {
	if r.Code == "" {
		return "the proxy answers " + r.Status
	}
	return fmt.Sprintf("the proxy refuses it (%s): %s", r.Code, strings.TrimSuffix(r.Text, "."))
}

func (r *proxyRefusal) fix() string {
	if r.ID == "" {
		return ""
	}
	return "the operator finds it with: perimeterd why " + r.ID
}

// through is a connection to HOST:PORT through the proxy. A *proxyRefusal is the proxy's own word.
func (d *Doctor) through(ctx context.Context, proxy *url.URL, to string) (net.Conn, error) {
	conn, err := (&net.Dialer{Timeout: proxyPatience}).DialContext(ctx, "tcp", proxy.Host)
	if err != nil {
		return nil, err
	}
	deadline, _ := ctx.Deadline()
	conn.SetDeadline(deadline)
	req := &http.Request{Method: http.MethodConnect, URL: &url.URL{Opaque: to}, Host: to, Header: http.Header{"Accept": {"application/json"}}}
	if user := proxy.User; user != nil {
		password, _ := user.Password()
		basic := &http.Request{Header: http.Header{}}
		basic.SetBasicAuth(user.Username(), password)
		req.Header.Set("Proxy-Authorization", basic.Header.Get("Authorization"))
	}
	if err := req.Write(conn); err != nil {
		conn.Close()
		return nil, err
	}
	resp, err := http.ReadResponse(bufio.NewReader(io.LimitReader(conn, maxAnswerHead+maxEcho)), req)
	if err != nil {
		conn.Close()
		return nil, err
	}
	if resp.StatusCode == http.StatusOK {
		return conn, nil // TLS has the client speak first: nothing is in the reader
	}
	defer conn.Close()
	answer := struct {
		Error proxyRefusal `json:"error"`
	}{}
	text, _ := io.ReadAll(io.LimitReader(resp.Body, maxEcho))
	json.Unmarshal(text, &answer)
	answer.Error.Status = resp.Status
	return nil, &answer.Error
}

// egress asks the cloud which address it sees.
func (d *Doctor) egress(ctx context.Context, proxy *url.URL, s Status) {
	seen, err := d.echo(ctx, proxy)
	var refused *proxyRefusal
	switch {
	case errors.As(err, &refused):
		d.found(Warning, "egress", CodeProxyRefused, fmt.Sprintf("%s cannot be asked: %v", d.Echo, refused), refused.fix())
	case err != nil:
		d.found(Warning, "egress", CodeEgressUnseen, fmt.Sprintf("%s cannot be asked through the proxy: %v", d.Echo, err), "")
	case within(seen, s.Egress):
		d.well("egress", "the cloud sees %v", seen)
	default:
		d.found(Problem, "egress", CodeEgress, fmt.Sprintf("the cloud sees %v, and the profile promises %s", seen, strings.Join(s.Egress, ", ")),
			"policies that insist on the address will refuse you: ask the operator to compare egress.public with the bastion's address")
	}
}

func within(a netip.Addr, cidrs []string) bool {
	for _, c := range cidrs {
		if p, err := netip.ParsePrefix(c); err == nil && p.Contains(a) {
			return true
		}
	}
	return false
}

func (d *Doctor) echo(ctx context.Context, proxy *url.URL) (netip.Addr, error) {
	ctx, cancel := context.WithTimeout(ctx, sitePatience)
	defer cancel()
	t := &http.Transport{DisableKeepAlives: true, MaxResponseHeaderBytes: maxAnswerHead, DialContext: func(ctx context.Context, _, to string) (net.Conn, error) { return d.through(ctx, proxy, to) }}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, d.Echo, nil)
	if err != nil {
		return netip.Addr{}, err
	}
	resp, err := t.RoundTrip(req)
	if err != nil {
		return netip.Addr{}, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxEcho))
	if err != nil {
		return netip.Addr{}, err
	}
	a, err := netip.ParseAddr(strings.TrimSpace(string(text)))
	if err != nil || resp.StatusCode != http.StatusOK {
		return netip.Addr{}, fmt.Errorf("it answers %s and %.100q, and no address", resp.Status, text)
	}
	return a.Unmap(), nil
}

// destination tries one that the user asks about, as a program would.
func (d *Doctor) destination(ctx context.Context, proxy *url.URL, to string) {
	ctx, cancel := context.WithTimeout(ctx, sitePatience)
	defer cancel()
	conn, err := d.through(ctx, proxy, to)
	if err == nil {
		host, _, _ := net.SplitHostPort(to)
		c := tls.Client(conn, &tls.Config{ServerName: host})
		err = c.HandshakeContext(ctx)
		conn.Close()
	}
	var refused *proxyRefusal
	switch {
	case errors.As(err, &refused):
		d.found(Problem, "proxy", CodeProxyRefused, fmt.Sprintf("%s: %v", to, refused), refused.fix())
	case err != nil:
		d.found(Problem, "proxy", CodeUnreachable, fmt.Sprintf("%s: the proxy lets it pass, and TLS with it fails: %v", to, err), "")
	default:
		d.well("proxy", "%s is reached through the proxy", to)
	}
}
