//go:build linux

package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// Daemon is perimeterd on the bastion, made by its own init and user add.
type Daemon struct {
	Dir, Config string
	Manager     *Manager // of the next start; nil: nobody, as from a shell
	Environment []string // more of it, for the next start with a Manager

	lab *Lab
	bin string
	cmd *Cmd
	log *journal
}

// journal keeps what the daemon logs and tells who waits for a line.
type journal struct {
	mu      sync.Mutex
	text    bytes.Buffer
	arrived chan struct{} // closed and renewed with every write
}

func (j *journal) Write(b []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.text.Write(b)
	close(j.arrived)
	j.arrived = make(chan struct{})
	return len(b), nil
}

func (j *journal) read() (text string, next <-chan struct{}) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.text.String(), j.arrived
}

// Setting is a line of the configuration that init wrote and what shall stand there instead.
type Setting struct{ Key, Value string }

// BackendVariable names the variable that sets every daemon's tunnel.backend, so that the same tests are run with each.
const BackendVariable = "PERIMETERD_BACKEND"

// NewDaemon runs init for the lab's addresses: the egress address as source, the cloud's network allowed although its
// addresses are reserved. Settings change more; a key that the file does not have is an error.
func (l *Lab) NewDaemon(ctx context.Context, settings ...Setting) (*Daemon, error) {
	bin, err := Bin("perimeterd")
	if err != nil {
		return nil, err
	}
	d := &Daemon{Dir: filepath.Join(l.Dir, "perimeterd"), lab: l, bin: bin, log: &journal{arrived: make(chan struct{})}}
	d.Config = filepath.Join(d.Dir, "perimeterd.toml")
	if out, err := l.Bastion.Command(ctx, bin, "init", "--dir", d.Dir, "--endpoint", l.Bastion.Addr.String(),
		"--egress", netip.PrefixFrom(l.Egress, 32).String()).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("perimeterd init: %w\n%s", err, out)
	}
	if backend := os.Getenv(BackendVariable); backend != "" {
		settings = append([]Setting{{"backend", fmt.Sprintf("%q", backend)}}, settings...)
	}
	settings = append([]Setting{{"bind", fmt.Sprintf("%q", l.Egress)}, {"allow_private", `["198.19.1.0/24"]`}}, settings...)
	return d, d.Set(settings...)
}

// Set changes lines of the configuration.
func (d *Daemon) Set(settings ...Setting) error {
	text, err := os.ReadFile(d.Config)
	if err != nil {
		return err
	}
	lines := strings.Split(string(text), "\n")
	for _, s := range settings {
		found := false
		for i, line := range lines {
			if key, _, ok := strings.Cut(line, "="); ok && strings.TrimSpace(key) == s.Key {
				lines[i], found = s.Key+" = "+s.Value, true
				break
			}
		}
		if !found {
			return fmt.Errorf("%s has no line for %q", d.Config, s.Key)
		}
	}
	return os.WriteFile(d.Config, []byte(strings.Join(lines, "\n")), 0o640)
}

// Perimeterd runs one of its commands on the bastion and returns all it printed.
func (d *Daemon) Perimeterd(ctx context.Context, args ...string) (string, error) {
	out, err := d.lab.Bastion.Command(ctx, d.bin, append([]string{"--config", d.Config}, args...)...).CombinedOutput()
	return string(out), err
}

// AddUser adds a user and returns the profile's file.
func (d *Daemon) AddUser(ctx context.Context, name string, args ...string) (profile string, err error) {
	profile = filepath.Join(d.lab.Dir, name+".profile")
	out, err := d.Perimeterd(ctx, append([]string{"user", "add", name, "--out", profile}, args...)...)
	if err != nil {
		return "", fmt.Errorf("perimeterd user add %s: %w\n%s", name, err, out)
	}
	return profile, nil
}

// Start runs the daemon and returns when it is ready.
func (d *Daemon) Start(ctx context.Context) error {
	before, _ := d.log.read()
	d.cmd = d.lab.Bastion.Command(context.WithoutCancel(ctx), d.bin, "--config", d.Config, "run")
	d.cmd.Stdout, d.cmd.Stderr = d.log, d.log
	if d.Manager != nil {
		d.Manager.equip(d.cmd, d.Environment...)
	}
	if err := d.cmd.Start(); err != nil {
		return err
	}
	ended := make(chan struct{})
	go func() { d.cmd.Wait(); close(ended) }()
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	for {
		text, next := d.log.read()
		if strings.Contains(text[len(before):], `"msg":"ready"`) {
			return nil
		}
		select {
		case <-next:
		case <-ended:
			return fmt.Errorf("perimeterd ended: %v\n%s", d.cmd.ProcessState, d.Log())
		case <-ctx.Done():
			return fmt.Errorf("perimeterd is not ready: %w\n%s", ctx.Err(), d.Log())
		}
	}
}

// Signal sends the daemon a signal; Wait waits until it ended.
func (d *Daemon) Signal(s os.Signal) error { return d.cmd.Process.Signal(s) }

// Wait is for the daemon's end.
func (d *Daemon) Wait() error { return d.cmd.Wait() }

// Pid is the running daemon's.
func (d *Daemon) Pid() int { return d.cmd.Process.Pid }

// Log is what the daemon wrote so far.
func (d *Daemon) Log() string { text, _ := d.log.read(); return text }

// Entries are the log's JSON lines with this message.
func (d *Daemon) Entries(msg string) (list []map[string]any) {
	for line := range strings.Lines(d.Log()) {
		var e map[string]any
		if json.Unmarshal([]byte(line), &e) == nil && e["msg"] == msg {
			list = append(list, e)
		}
	}
	return list
}

// Await waits until the log has n entries with this message.
func (d *Daemon) Await(ctx context.Context, msg string, n int) ([]map[string]any, error) {
	for {
		_, next := d.log.read()
		if list := d.Entries(msg); len(list) >= n {
			return list, nil
		}
		select {
		case <-next:
		case <-ctx.Done():
			return nil, fmt.Errorf("the log has %d entries %q, not %d: %w\n%s", len(d.Entries(msg)), msg, n, ctx.Err(), d.Log())
		}
	}
}

// User is an administrator at a host, with a home of his own.
type User struct {
	Home string

	ns       *Namespace
	knockBin string
	vpnBin   string
}

// NewUser imports a profile at a host.
func (l *Lab) NewUser(ctx context.Context, ns *Namespace, profile string) (*User, error) {
	u, err := l.NewHome(ns, strings.TrimSuffix(filepath.Base(profile), ".profile"))
	if err != nil {
		return nil, err
	}
	if out, err := u.VPN(ctx, "import", profile).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("vpn import: %w\n%s", err, out)
	}
	return u, nil
}

// NewHome makes a user at a host who has no profile yet.
func (l *Lab) NewHome(ns *Namespace, name string) (*User, error) {
	u := &User{Home: filepath.Join(l.Dir, "home-"+name), ns: ns}
	var err error
	if u.knockBin, err = Bin("knock"); err != nil {
		return nil, err
	}
	if u.vpnBin, err = Bin("vpn"); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Join(u.Home, "run"), 0o700); err != nil {
		return nil, err
	}
	return u, nil
}

// Command prepares a command of this user.
func (u *User) Command(ctx context.Context, name string, args ...string) *Cmd {
	c := u.ns.Command(ctx, name, args...)
	c.Env = append(os.Environ(), "HOME="+u.Home, "XDG_CONFIG_HOME="+u.Home+"/.config", "XDG_RUNTIME_DIR="+u.Home+"/run")
	return c
}

// Knock prepares our knock.
func (u *User) Knock(ctx context.Context, args ...string) *Cmd {
	return u.Command(ctx, u.knockBin, args...)
}

// VPN prepares our vpn.
func (u *User) VPN(ctx context.Context, args ...string) *Cmd {
	return u.Command(ctx, u.vpnBin, args...)
}
