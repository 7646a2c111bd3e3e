//go:build linux

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"perimeterd/internal/lab"
)

// replaced is what perimeterd stands in for, from Debian's packages, on a host of its own at the same link: an ipset script for the
// knock, OpenVPN behind it, and Squid, which asks for nothing but an address of the tunnel's.
type replaced struct {
	host     *lab.Namespace
	stage    *stage
	pki      *lab.EasyRSA
	secret   string   // of tls-auth
	tcp, udp *lab.Cmd // the servers
	client   *lab.Cmd // that runs; nil: none
}

// Addresses of the servers in their tunnels.
const (
	replacedTCP   = "10.99.1.1"
	replacedUDP   = "10.99.2.1"
	replacedProxy = "http://" + replacedTCP + ":3128"
)

// door is the script: each knock moves its source from a set to the next. The UDP server is measured for speed alone.
const door = `set -e
iptables -P INPUT DROP
iptables -A INPUT -i lo -j ACCEPT
iptables -A INPUT -i tun+ -j ACCEPT
iptables -A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
iptables -A INPUT -p icmp -j ACCEPT
iptables -A INPUT -p udp --dport 1194 -j ACCEPT
ipset create step1 hash:ip timeout 10
ipset create step2 hash:ip timeout 10
ipset create opened hash:ip timeout %d
iptables -A INPUT -p tcp --dport 1194 -m set --match-set opened src -j ACCEPT
iptables -A INPUT -p tcp --syn --dport 9000 -m set --match-set step2 src -j SET --add-set opened src --exist
iptables -A INPUT -p tcp --syn --dport 8000 -m set --match-set step1 src -j SET --add-set step2 src --exist
iptables -A INPUT -p tcp --syn --dport 7000 -j SET --add-set step1 src --exist
`

const squidConf = `http_port 3128
visible_hostname replaced.test
acl tunnel src 10.99.0.0/16
http_access allow tunnel
http_access deny all
cache deny all
access_log none
cache_log /dev/null
pid_filename none
pinger_enable off
shutdown_lifetime 0 seconds
`

// replace sets it up beside ours.
func (s *stage) replace(ctx context.Context) (*replaced, error) {
	r := &replaced{stage: s}
	var err error
	if r.host, err = s.AddHost(ctx, "replaced"); err != nil {
		return nil, err
	}
	if _, err := output(r.host.Command(ctx, "sh", "-c", fmt.Sprintf(door, int(window.Seconds())))); err != nil {
		return nil, err
	}
	// A cable to the cloud of its own.
	if _, err := output(r.host.Command(ctx, "sh", "-ec", "ip link add egress type veth peer name eth1 netns "+s.Cloud.Name+
		"; ip addr add 198.19.2.1/24 dev egress; ip link set egress up")); err != nil {
		return nil, err
	}
	if _, err := output(s.Cloud.Command(ctx, "sh", "-ec", "ip addr add 198.19.2.2/24 dev eth1; ip link set eth1 up")); err != nil {
		return nil, err
	}
	if _, err := output(r.host.Command(ctx, "ip", "route", "add", s.Cloud.Addr.String()+"/32", "via", "198.19.2.2")); err != nil {
		return nil, err
	}
	if r.pki, err = lab.NewEasyRSA(ctx, s.Dir); err != nil {
		return nil, err
	}
	for _, kind := range []string{"server", "client"} {
		if err := r.pki.Run(ctx, "build-"+kind+"-full", kind, "nopass"); err != nil {
			return nil, err
		}
	}
	r.secret = filepath.Join(s.Dir, "ta.key")
	if _, err := output(r.host.Command(ctx, "openvpn", "--genkey", "tls-auth", r.secret)); err != nil {
		return nil, err
	}
	for _, v := range []struct {
		server             **lab.Cmd
		proto, net, cipher string
	}{{&r.tcp, "tcp-server", "10.99.1.0", "AES-256-CBC"}, {&r.udp, "udp", "10.99.2.0", "AES-256-GCM"}} {
		if *v.server, err = r.openvpn(ctx, r.host, "server", "0", "--dev", "tun", "--proto", v.proto, "--port", "1194", "--server", v.net, "255.255.255.0",
			"--topology", "subnet", "--dh", "none", "--keepalive", "10", "60", "--data-ciphers", v.cipher); err != nil {
			return nil, err
		}
	}
	conf := filepath.Join(s.Dir, "squid.conf")
	if err := os.WriteFile(conf, []byte(squidConf), 0o644); err != nil {
		return nil, err
	}
	squid := r.host.Command(context.WithoutCancel(ctx), "squid", "-N", "-f", conf) // it ends with the lab
	if err := squid.Start(); err != nil {
		return nil, err
	}
	go squid.Wait()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		c, err := r.host.Dial(ctx, "tcp", "127.0.0.1:3128")
		if err == nil {
			return r, c.Close()
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("squid does not listen: %w", err)
		}
	}
}

// openvpn runs one end and returns when its tunnel is up.
func (r *replaced) openvpn(ctx context.Context, ns *lab.Namespace, name, direction string, args ...string) (*lab.Cmd, error) {
	c := ns.Command(context.WithoutCancel(ctx), "openvpn", append(args, "--ca", r.pki.Path("ca.crt"), "--cert", r.pki.Path("issued/"+name+".crt"),
		"--key", r.pki.Path("private/"+name+".key"), "--tls-auth", r.secret, direction)...)
	if ns == r.stage.Client {
		c.SysProcAttr.Setpgid, c.SysProcAttr.Setsid = false, true // as every client here: see plain
	}
	out, err := c.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := c.Start(); err != nil {
		return nil, err
	}
	up := make(chan error, 1)
	go func() {
		var text strings.Builder
		for lines := bufio.NewScanner(out); lines.Scan(); {
			if strings.Contains(lines.Text(), "Initialization Sequence Completed") {
				up <- nil
			} else if text.Len() < 64<<10 {
				text.WriteString(lines.Text() + "\n")
			}
		}
		c.Wait()
		select {
		case up <- fmt.Errorf("openvpn ended: %v\n%s", c.ProcessState, text.String()):
		default:
		}
	}()
	select {
	case err = <-up:
	case <-time.After(30 * time.Second):
		err = fmt.Errorf("openvpn has no tunnel: %w", syscall.ETIMEDOUT)
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err != nil {
		c.Process.Kill()
		return nil, err
	}
	return c, nil
}

// up is how long it takes a person who has a script for it: knockd's knock, then openvpn.
func (r *replaced) up(ctx context.Context) (time.Duration, error) {
	start := time.Now()
	if _, err := output(r.stage.Client.Command(ctx, "knock", "-d", "0", r.host.Addr.String(), "7000", "8000", "9000")); err != nil {
		return 0, err
	}
	var err error
	r.client, err = r.connect(ctx, "tcp-client", "AES-256-CBC")
	return time.Since(start), err
}

func (r *replaced) connect(ctx context.Context, proto, cipher string) (*lab.Cmd, error) {
	return r.openvpn(ctx, r.stage.Client, "client", "1", "--client", "--dev", "tun", "--proto", proto, "--remote", r.host.Addr.String(), "1194",
		"--nobind", "--remote-cert-tls", "server", "--data-ciphers", cipher)
}

// end takes the tunnel down, as ours is.
func (r *replaced) end(_ context.Context, warm bool) error {
	signal := syscall.SIGTERM
	if warm {
		signal = syscall.SIGKILL
	}
	err := r.client.Process.Signal(signal)
	if errors.Is(err, os.ErrProcessDone) {
		err = nil
	}
	r.client.Wait()
	return err
}
