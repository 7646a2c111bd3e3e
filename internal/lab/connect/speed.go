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

// speeds is a TCP download through our tunnel and through one of wireguard-go's own program, in turn.
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
	defer func() {
		for _, name := range plainNames {
			os.Remove(filepath.Join("/var/run/wireguard", name+".sock"))
		}
	}()
	if err := s.plain(ctx, bin); err != nil {
		return err
	}
	l, err := s.Bastion.Listen("tcp", fmt.Sprintf(":%d", speedPort))
	if err != nil {
		return err
	}
	defer l.Close()
	go serve(l)
	ways := []struct{ who, address string }{{"perimeterd", "10.77.0.1"}, {"wireguard-go", "10.99.0.1"}}
	got := map[string][]float64{}
	for range 6 {
		for _, w := range ways {
			rate, err := s.speed(ctx, net.JoinHostPort(w.address, fmt.Sprint(speedPort)))
			if err != nil {
				return fmt.Errorf("%s: %w", w.who, err)
			}
			got[w.who] = append(got[w.who], rate)
		}
	}
	var text []string
	for _, w := range ways {
		r.Add(bench.Figure{What: "tunnel alone, TCP download", Who: w.who, Unit: "B/s", Values: got[w.who]})
		text = append(text, fmt.Sprintf("%s %.2f Gb/s (%.2f–%.2f)", w.who, median(got[w.who])*8/1e9, slices.Min(got[w.who])*8/1e9, slices.Max(got[w.who])*8/1e9))
	}
	r.row("TCP through the tunnel alone, no delay, medians of 6 in turn", "%s: %.2f times", strings.Join(text, ", "), median(got[ways[0].who])/median(got[ways[1].who]))
	return nil
}

func median(list []float64) float64 {
	list = slices.Sorted(slices.Values(list))
	return (list[(len(list)-1)/2] + list[len(list)/2]) / 2
}

func serve(l net.Listener) {
	block := make([]byte, 128<<10)
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			for {
				if _, err := c.Write(block); err != nil {
					return
				}
			}
		}()
	}
}

// speed is bytes a second, after half a second to get going.
func (s *stage) speed(ctx context.Context, address string) (float64, error) {
	c, err := s.Client.Dial(ctx, "tcp", address)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	buf := make([]byte, 256<<10)
	begin := time.Now().Add(500 * time.Millisecond)
	end := begin.Add(2500 * time.Millisecond)
	var n int64
	for {
		c.SetReadDeadline(time.Now().Add(5 * time.Second))
		got, err := c.Read(buf)
		if err != nil {
			return 0, errors.Join(err, io.ErrUnexpectedEOF)
		}
		now := time.Now()
		if now.After(begin) {
			n += int64(got)
		}
		if now.After(end) {
			return float64(n) / now.Sub(begin).Seconds(), nil
		}
	}
}

// plain makes a tunnel of wireguard-go's own program between client and bastion.
func (s *stage) plain(ctx context.Context, bin string) error {
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
			return fmt.Errorf("wg genkey: %w", err)
		}
		ends[i].key = strings.TrimSpace(string(private))
		c := exec.CommandContext(ctx, "wg", "pubkey")
		c.Stdin = strings.NewReader(ends[i].key)
		out, err := c.Output()
		if err != nil {
			return fmt.Errorf("wg pubkey: %w", err)
		}
		public[i] = strings.TrimSpace(string(out))
	}
	for i, e := range ends {
		socket := filepath.Join("/var/run/wireguard", e.name+".sock")
		if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) { // of a run that was killed
			return err
		}
		c := e.ns.Command(context.WithoutCancel(ctx), bin, "-f", e.name) // it ends with the lab
		if err := c.Start(); err != nil {
			return err
		}
		go c.Wait()
		for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
			if _, err := os.Stat(socket); err == nil {
				break
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("wireguard-go made no %s: %w", socket, syscall.ETIMEDOUT)
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
			return err
		}
		for _, args := range [][]string{{"wg", "setconf", e.name, file}, {"ip", "addr", "add", fmt.Sprintf("10.99.0.%d/24", i+1), "dev", e.name}, {"ip", "link", "set", e.name, "mtu", "1420", "up"}} {
			if _, err := output(e.ns.Command(ctx, args[0], args[1:]...)); err != nil {
				return err
			}
		}
	}
	return nil
}
