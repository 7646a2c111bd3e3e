//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
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
)

// speedPort is where the bastion sends bytes for ever.
const speedPort = 5201

// plainNames are the devices of wireguard-go's own program, which share a directory of sockets.
var plainNames = [...]string{"plains", "plainc"}

// directions are by the byte that asks the bastion for them.
var directions = []struct {
	name string
	ask  byte
}{{"download", 'd'}, {"upload", 'u'}}

// through is a tunnel and the programs at its ends.
type through struct {
	who, address   string
	server, client int // process IDs
}

// pace is what a tunnel did: bytes a second, and the processor seconds a gigabyte that its ends took.
type pace struct{ rate, server, client float64 }

// rounds are as many as short ones need that another load on the machine falls on both ways alike.
const (
	rounds  = 10
	warming = 300 * time.Millisecond
	timed   = 1200 * time.Millisecond
)

// speeds is TCP through our tunnel and through one of wireguard-go's own program, in turn, each way. What its processes take is
// moved less by what else runs on the machine.
func (r *report) speeds(ctx context.Context) error {
	bin, err := lab.Bin("wireguard-go")
	if err != nil {
		return err
	}
	s, err := open(ctx, lab.Options{}, lab.Setting{Key: "keepalive", Value: fmt.Sprintf("\"25s\"\n[[tunnel.service]]\nport = %d\ngroups = [\"*\"]", speedPort)})
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
	l, err := s.Bastion.Listen("tcp", fmt.Sprintf(":%d", speedPort))
	if err != nil {
		return err
	}
	defer l.Close()
	go serve(l)
	ways := []through{{"perimeterd", "10.77.0.1", s.daemon.PID(), st.PID}, plain}
	for _, d := range directions {
		got := map[string][]pace{}
		for range rounds {
			for _, w := range ways {
				p, err := s.speed(ctx, w, d.ask)
				if err != nil {
					return fmt.Errorf("%s: %w", w.who, err)
				}
				got[w.who] = append(got[w.who], p)
			}
		}
		r.compare(d.name, ways, got)
	}
	return nil
}

func (r *report) compare(direction string, ways []through, got map[string][]pace) {
	var text []string
	for _, w := range ways {
		var rates, servers, clients []float64
		for _, p := range got[w.who] {
			rates, servers, clients = append(rates, p.rate), append(servers, p.server), append(clients, p.client)
		}
		r.Add(bench.Figure{What: "tunnel alone, TCP " + direction, Who: w.who, Unit: "B/s", Values: rates})
		r.Add(bench.Figure{What: "tunnel alone, TCP " + direction + ", processor of the server", Who: w.who, Unit: "s/GB", Values: servers})
		r.Add(bench.Figure{What: "tunnel alone, TCP " + direction + ", processor of the client", Who: w.who, Unit: "s/GB", Values: clients})
		text = append(text, fmt.Sprintf("%s %.2f Gb/s (%.2f–%.2f), CPU seconds a GB %.2f and %.2f",
			w.who, median(rates)*8/1e9, slices.Min(rates)*8/1e9, slices.Max(rates)*8/1e9, median(servers), median(clients)))
	}
	ours, theirs := got[ways[0].who], got[ways[1].who]
	ratio := func(of func(pace) float64) float64 {
		var list []float64
		for i := range ours { // of neighbours in time
			list = append(list, of(ours[i])/of(theirs[i]))
		}
		return median(list)
	}
	r.row(fmt.Sprintf("TCP %s through the tunnel alone, no delay, medians of %d in turn; CPU of server and client", direction, rounds),
		"%s: %.2f times as fast, for %.2f and %.2f times the CPU", strings.Join(text, "; "), ratio(func(p pace) float64 { return p.rate }),
		ratio(func(p pace) float64 { return p.server }), ratio(func(p pace) float64 { return p.client }))
}

func median(list []float64) float64 {
	list = slices.Sorted(slices.Values(list))
	return (list[(len(list)-1)/2] + list[len(list)/2]) / 2
}

// serve sends or takes bytes for ever, as the first one asks.
func serve(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			block := make([]byte, 256<<10)
			if _, err := io.ReadFull(c, block[:1]); err != nil {
				return
			}
			step := c.Read
			if block[0] == 'd' {
				step = c.Write
			}
			for err := error(nil); err == nil; {
				_, err = step(block)
			}
		}()
	}
}

// speed is after a moment to get going.
func (s *stage) speed(ctx context.Context, w through, ask byte) (p pace, err error) {
	c, err := s.Client.Dial(ctx, "tcp", net.JoinHostPort(w.address, fmt.Sprint(speedPort)))
	if err != nil {
		return p, err
	}
	defer c.Close()
	if _, err := c.Write([]byte{ask}); err != nil {
		return p, err
	}
	step := c.Write
	if ask == 'd' {
		step = c.Read
	}
	block := make([]byte, 256<<10)
	pass := func(until time.Time) (n int, err error) {
		for time.Now().Before(until) {
			c.SetDeadline(time.Now().Add(5 * time.Second))
			moved, err := step(block)
			if err != nil {
				return n, errors.Join(err, io.ErrUnexpectedEOF)
			}
			n += moved
		}
		return n, nil
	}
	if _, err := pass(time.Now().Add(warming)); err != nil {
		return p, err
	}
	began, before, err := time.Now(), [2]lab.Usage{}, error(nil)
	for i, pid := range []int{w.server, w.client} {
		if before[i], err = lab.UsageOf(pid); err != nil {
			return p, err
		}
	}
	n, err := pass(began.Add(timed))
	if err != nil {
		return p, err
	}
	p.rate = float64(n) / time.Since(began).Seconds()
	for i, pid := range []int{w.server, w.client} {
		after, err := lab.UsageOf(pid)
		if err != nil {
			return p, err
		}
		*[]*float64{&p.server, &p.client}[i] = (after.CPU - before[i].CPU).Seconds() / float64(n) * 1e9
	}
	return p, nil
}

// plain makes a tunnel of wireguard-go's own program between client and bastion. Linux shares processors among sessions first
// (sched(7), autogroup), and our client has one of its own: so has this one, or it would cost a fifth less, and go faster.
func (s *stage) plain(ctx context.Context, bin string) (through, error) {
	w := through{who: "wireguard-go", address: "10.99.0.1"}
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
