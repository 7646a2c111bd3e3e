//go:build linux

package main

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"perimeterd/internal/lab"
	"perimeterd/internal/lab/bulk"
	"perimeterd/vpn/client"
)

// ordinary is the user of the rootless tunnel.
const ordinary = 4711

// sourcePort is where the hosts send and take bytes.
const sourcePort = 9000

// room is a lab with a long link, a source of bytes on both sides of the bastion, and a tunnel of each kind.
type room struct {
	*lab.Lab
	ways []*way
}

// way leads to a source.
type way struct {
	name   string
	dial   func(context.Context) (net.Conn, error)
	memory func() (float64, error) // of its process, bytes
}

func newRoom(ctx context.Context) (_ *room, err error) {
	r := &room{}
	if r.Lab, err = lab.New(ctx, lab.Options{LongLink: true}); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.Close())
		}
	}()
	beside, err := r.AddHost(ctx, "source")
	if err != nil {
		return nil, err
	}
	for _, ns := range []*lab.Namespace{beside, r.Cloud} {
		l, err := ns.Listen("tcp", fmt.Sprintf("%v:%d", ns.Addr, sourcePort))
		if err != nil {
			return nil, err
		}
		go bulk.Serve(l) // until the lab's namespaces are gone
		context.AfterFunc(ctx, func() { l.Close() })
	}
	d, err := r.NewDaemon(ctx)
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(d.Config, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return nil, err
	}
	_, err = fmt.Fprintf(f, "\n[[proxy.rule]]\nallow = [\"%v/32\"]\nports = [%d]\ngroups = [\"operators\"]\n", r.Cloud.Addr, sourcePort)
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	profiles := map[string]string{}
	for _, name := range []string{device, rootless} {
		if profiles[name], err = d.AddUser(ctx, name, "--group", "operators"); err != nil {
			return nil, err
		}
	}
	if err := d.Start(ctx); err != nil {
		return nil, err
	}
	r.ways = []*way{{name: bare, dial: func(ctx context.Context) (net.Conn, error) {
		return r.Client.Dial(ctx, "tcp", fmt.Sprintf("%v:%d", beside.Addr, sourcePort))
	}}}
	for _, name := range []string{device, rootless} {
		w, err := r.raise(ctx, name, profiles[name])
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		r.ways = append(r.ways, w)
	}
	return r, nil
}

// raise brings a tunnel up by `vpn exec`, whose proxy asks for a password and not who comes.
func (r *room) raise(ctx context.Context, name, profile string) (*way, error) {
	u, err := r.NewHome(r.Client, name)
	if err != nil {
		return nil, err
	}
	own := func(c *lab.Cmd) *lab.Cmd {
		if name == rootless {
			c.SysProcAttr.Credential = &syscall.Credential{Uid: ordinary, Gid: ordinary}
		}
		return c
	}
	if name == rootless {
		for _, f := range []string{u.Home, filepath.Join(u.Home, "run"), profile} {
			if err := os.Chown(f, ordinary, ordinary); err != nil {
				return nil, err
			}
		}
	}
	if out, err := own(u.VPN(ctx, "import", profile)).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("vpn import: %w: %s", err, out)
	}
	keep := own(u.VPN(ctx, "exec", "--", "sh", "-c", "echo $https_proxy; sleep 3600"))
	out, err := keep.StdoutPipe()
	if err != nil {
		return nil, err
	}
	keep.Stderr = os.Stderr
	if err := keep.Start(); err != nil {
		return nil, err
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		return nil, fmt.Errorf("vpn exec: %w", err)
	}
	at, err := url.Parse(strings.TrimSpace(line))
	if err != nil {
		return nil, err
	}
	text, err := own(u.VPN(ctx, "status", "--json")).Output()
	if err != nil {
		return nil, err
	}
	var s client.Status
	if err := json.Unmarshal(text, &s); err != nil {
		return nil, err
	}
	if want := map[string]string{device: client.ModeTUN, rootless: client.ModeRootless}[name]; s.Mode != want {
		return nil, fmt.Errorf("its mode is %q, not %q", s.Mode, want)
	}
	secret, _ := at.User.Password()
	to, login := at.Host, "Proxy-Authorization: Basic "+base64.StdEncoding.EncodeToString([]byte(at.User.Username()+":"+secret))+"\r\n"
	if name == device { // programs need no listener there
		to, login = s.Proxy.String(), ""
	}
	return &way{name, func(ctx context.Context) (net.Conn, error) {
		c, err := r.Client.Dial(ctx, "tcp", to)
		if err != nil {
			return nil, err
		}
		if err := bulk.Connect(c, fmt.Sprintf("%v:%d", r.Cloud.Addr, sourcePort), login); err != nil {
			return nil, errors.Join(err, c.Close())
		}
		return c, nil
	}, func() (float64, error) {
		u, err := lab.UsageOf(s.PID)
		return float64(u.RSS), err
	}}, nil
}

// flow says how many bytes a second arrive, once they flow: a long way takes a while to fill.
func (r *room) flow(ctx context.Context, w *way, what string, rtt, span time.Duration) (float64, error) {
	count, word := 1, bulk.Down
	switch what {
	case upload:
		word = bulk.Up
	case crowd:
		count = 100
	}
	flows, err := bulk.Start(ctx, count, word, w.dial)
	if err != nil {
		return 0, err
	}
	defer func() {
		flows.Close()
		time.Sleep(4 * rtt) // until what was under way is gone
	}()
	if err := bulk.Wait(ctx, time.Second/2+40*rtt); err != nil {
		return 0, err
	}
	before, start := flows.Moved(), time.Now()
	if err := bulk.Wait(ctx, span); err != nil {
		return 0, err
	}
	return float64(flows.Moved()-before) / time.Since(start).Seconds(), nil
}
