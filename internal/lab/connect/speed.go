//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"perimeterd/internal/lab"
	"perimeterd/internal/lab/bench"
	"perimeterd/internal/lab/bulk"
)

// speedPort is where the servers' hosts and the cloud send and take bytes.
const speedPort = 5201

// plainNames are the devices of wireguard-go's own program, which share a directory of sockets.
var plainNames = [...]string{"plains", "plainc"}

// Who is measured.
const (
	ours      = "perimeterd"
	oursAlone = "perimeterd, tunnel alone"
	plainWG   = "wireguard-go"
	vpnTCP    = "OpenVPN"
	vpnUDP    = "OpenVPN, GCM over UDP"
	stack     = "ipset + OpenVPN + Squid"
)

// What is measured.
const (
	oneDown   = "tunnel, one flow, download"
	oneUp     = "tunnel, one flow, upload"
	eightDown = "tunnel, eight flows, download"
	eightUp   = "tunnel, eight flows, upload"
	serverCPU = "tunnel, server's CPU"
	clientCPU = "tunnel, client's CPU"
	uploading = ", upload" // follows those two
	throughIt = "download through tunnel and proxy"
)

// load is one kind of transfer.
type load struct {
	flows int
	word  string // that asks the source for it
}

var loads = map[string]load{oneDown: {1, bulk.Down}, oneUp: {1, bulk.Up}, eightDown: {8, bulk.Down}, eightUp: {8, bulk.Up}, throughIt: {1, bulk.Down}}

// carrier is a way to a source of bytes.
type carrier struct {
	who    string
	dial   func(context.Context) (net.Conn, error)
	server int // its process, whose CPU is counted, as is the client's; 0: not
	client int
}

// speeds is TCP through each tunnel alone, and through tunnel and proxy, in turn.
func (r *report) speeds(ctx context.Context, rounds int, span time.Duration) error {
	bin, err := lab.Bin("wireguard-go")
	if err != nil {
		return err
	}
	s, err := open(ctx, lab.Options{}, lab.Setting{Key: "keepalive", Value: fmt.Sprintf("\"25s\"\n[[tunnel.service]]\nport = %d\ngroups = [\"*\"]\n"+
		"[[proxy.rule]]\nallow = [\"198.19.1.2/32\"]\nports = [%[1]d]\ngroups = [\"operators\"]", speedPort)})
	if err != nil {
		return err
	}
	defer s.Close()
	if _, err := s.up(ctx); err != nil {
		return err
	}
	st, err := s.status(ctx)
	if err != nil {
		return err
	}
	defer func() {
		for _, name := range plainNames {
			os.Remove(filepath.Join("/var/run/wireguard", name+".sock"))
		}
	}()
	plain, err := s.plain(ctx, bin)
	if err != nil {
		return err
	}
	old, err := s.replace(ctx)
	if err != nil {
		return err
	}
	if _, err := old.up(ctx); err != nil {
		return err
	}
	udp, err := old.connect(ctx, "udp", "AES-256-GCM")
	if err != nil {
		return err
	}
	for _, ns := range []*lab.Namespace{s.Bastion, old.host, s.Cloud} {
		l, err := ns.Listen("tcp", fmt.Sprintf(":%d", speedPort))
		if err != nil {
			return err
		}
		defer l.Close()
		go bulk.Serve(l)
	}
	direct := func(address string) func(context.Context) (net.Conn, error) {
		return func(ctx context.Context) (net.Conn, error) {
			return s.Client.Dial(ctx, "tcp", net.JoinHostPort(address, fmt.Sprint(speedPort)))
		}
	}
	plain.dial = direct("10.99.0.1")
	tunnels := []carrier{{ours, direct("10.77.0.1"), s.daemon.PID(), st.PID}, plain,
		{vpnTCP, direct(replacedTCP), old.tcp.Process.Pid, old.client.Process.Pid}, {vpnUDP, direct(replacedUDP), old.udp.Process.Pid, udp.Process.Pid}}
	whole := []carrier{{who: ours, dial: s.connector("10.77.0.1")}, {who: stack, dial: s.connector(replacedTCP)}, {who: oursAlone, dial: direct("10.77.0.1")}}
	for round := range rounds {
		for _, what := range []string{oneDown, oneUp, eightDown, eightUp, throughIt} {
			ways := tunnels
			if what == throughIt {
				ways = whole
			}
			first := round % len(ways) // each round begins with another: what went before may still cost something
			for _, c := range slices.Concat(ways[first:], ways[:first]) {
				rate, cpu, err := c.carry(ctx, loads[what], span)
				if err != nil {
					return fmt.Errorf("%s, %s: %w", c.who, what, err)
				}
				r.Add(bench.Figure{What: what, Who: c.who, Unit: "B/s", Values: []float64{rate}})
				if suffix, counted := map[string]string{oneDown: "", oneUp: uploading}[what]; counted {
					r.Add(bench.Figure{What: serverCPU + suffix, Who: c.who, Unit: "CPU-s/GB", Values: []float64{cpu[0]}})
					r.Add(bench.Figure{What: clientCPU + suffix, Who: c.who, Unit: "CPU-s/GB", Values: []float64{cpu[1]}})
				}
				fmt.Printf("%s, %s: %.0f MB/s\n", c.who, what, rate/1e6)
			}
		}
	}
	return nil
}

// connector asks a proxy for the cloud's source.
func (s *stage) connector(proxy string) func(context.Context) (net.Conn, error) {
	return func(ctx context.Context) (net.Conn, error) {
		c, err := s.Client.Dial(ctx, "tcp", net.JoinHostPort(proxy, "3128"))
		if err != nil {
			return nil, err
		}
		if err := bulk.Connect(c, fmt.Sprintf("%v:%d", s.Cloud.Addr, speedPort), ""); err != nil {
			return nil, errors.Join(err, c.Close())
		}
		return c, nil
	}
}

// carry is bytes a second, after half a second to get going, and the CPU seconds of server and client for 10^9 of them.
func (c carrier) carry(ctx context.Context, l load, span time.Duration) (rate float64, cpu [2]float64, err error) {
	flows, err := bulk.Start(ctx, l.flows, l.word, c.dial)
	if err != nil {
		return 0, cpu, err
	}
	defer flows.Close()
	take := func() (n int64, used [2]time.Duration, err error) {
		for i, pid := range []int{c.server, c.client} {
			if pid == 0 {
				continue
			}
			u, err := lab.UsageOf(pid)
			if err != nil {
				return 0, used, err
			}
			used[i] = u.CPU
		}
		return flows.Moved(), used, nil
	}
	if err := bulk.Wait(ctx, time.Second/2); err != nil {
		return 0, cpu, err
	}
	before, used, err := take()
	if err != nil {
		return 0, cpu, err
	}
	start := time.Now()
	if err := bulk.Wait(ctx, span); err != nil {
		return 0, cpu, err
	}
	took := time.Since(start)
	after, usedAfter, err := take()
	if err == nil && after == before {
		err = fmt.Errorf("nothing moved: %w", syscall.ETIMEDOUT)
	}
	if err != nil {
		return 0, cpu, err
	}
	bytes := float64(after - before)
	for i := range cpu {
		cpu[i] = (usedAfter[i] - used[i]).Seconds() / bytes * 1e9
	}
	return bytes / took.Seconds(), cpu, nil
}

// plain makes a tunnel of wireguard-go's own program between client and bastion. Linux shares processors among sessions first
// (sched(7), autogroup), and our client has one of its own: so has this one, or it would cost a fifth less, and go faster.
func (s *stage) plain(ctx context.Context, bin string) (carrier, error) {
	w := carrier{who: plainWG}
	ends := []struct {
		ns         *lab.Namespace
		name, peer string
		config     string
		key        string
	}{{ns: s.Bastion, name: plainNames[0], peer: "10.99.0.2/32"}, {ns: s.Client, name: plainNames[1], peer: "10.99.0.1/32"}}
	var public [2]string
	for i := range ends {
		private, err := exec.CommandContext(ctx, "wg", "genkey").Output()
		if err != nil {
			return w, fmt.Errorf("wg genkey: %w", err)
		}
		ends[i].key = strings.TrimSpace(string(private))
		c := exec.CommandContext(ctx, "wg", "pubkey")
		c.Stdin = strings.NewReader(ends[i].key)
		out, err := c.Output()
		if err != nil {
			return w, fmt.Errorf("wg pubkey: %w", err)
		}
		public[i] = strings.TrimSpace(string(out))
	}
	for i, e := range ends {
		socket := filepath.Join("/var/run/wireguard", e.name+".sock")
		if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) { // of a run that was killed
			return w, err
		}
		c := e.ns.Command(context.WithoutCancel(ctx), bin, "-f", e.name) // it ends with the lab
		if i == 1 {
			c.SysProcAttr.Setpgid, c.SysProcAttr.Setsid = false, true // which makes a group too
		}
		if err := c.Start(); err != nil {
			return w, err
		}
		go c.Wait()
		*[]*int{&w.server, &w.client}[i] = c.Process.Pid
		for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
			if _, err := os.Stat(socket); err == nil {
				break
			}
			if time.Now().After(deadline) {
				return w, fmt.Errorf("wireguard-go made no %s: %w", socket, syscall.ETIMEDOUT)
			}
		}
		config := fmt.Sprintf("[Interface]\nPrivateKey = %s\n", e.key)
		if i == 0 {
			config += "ListenPort = 51820\n"
		}
		config += fmt.Sprintf("[Peer]\nPublicKey = %s\nAllowedIPs = %s\n", public[1-i], e.peer)
		if i == 1 {
			config += fmt.Sprintf("Endpoint = %v:51820\n", s.Bastion.Addr)
		}
		file := filepath.Join(s.Dir, e.name+".conf")
		if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
			return w, err
		}
		for _, args := range [][]string{{"wg", "setconf", e.name, file}, {"ip", "addr", "add", fmt.Sprintf("10.99.0.%d/24", i+1), "dev", e.name}, {"ip", "link", "set", e.name, "mtu", "1420", "up"}} {
			if _, err := output(e.ns.Command(ctx, args[0], args[1:]...)); err != nil {
				return w, err
			}
		}
	}
	return w, nil
}
