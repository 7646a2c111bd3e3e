//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"perimeterd/internal/lab"
	"perimeterd/internal/lab/roster"
	"perimeterd/knock"
)

const (
	gatePort = 1194
	// window is how long a knock opens every door here, so that no rule list of a peer grows without end.
	window = 5 * time.Second
	// spaPort is fwknop's (PCAP_FILTER), and spaLength the length of a message of its client for one port.
	spaPort, spaLength = 62201, 225
	metricsAddress     = "127.0.0.1:9617"
)

// knockPorts are those of knockd's stock configuration. The ipset script has the same.
var knockPorts = []knock.Port{{Proto: knock.TCP, Number: 7000}, {Proto: knock.TCP, Number: 8000}, {Proto: knock.TCP, Number: 9000}}

// door is a host whose TCP port 1194 opens to who knocks.
type door struct {
	name string
	host *lab.Namespace
	pid  int // of its daemon; 0: it has none
	ways []way
	// aimed is garbage of the kind that this door takes for knocks: an attacker's who knows what he attacks.
	aimed []lab.Garbage
}

// way is a kind of knock.
type way struct {
	name string
	make func(ctx context.Context, source netip.Addr) (lab.Knock, error)
}

func (d *door) behind() netip.AddrPort { return netip.AddrPortFrom(d.host.Addr, gatePort) }

// openDoors sets all four up.
func openDoors(ctx context.Context, l *lab.Lab) (doors []*door, err error) {
	for _, open := range []func(context.Context, *lab.Lab) (*door, error){perimeterd, knockd, fwknop, ipset} {
		d, err := open(ctx, l)
		if err != nil {
			return nil, err
		}
		// Whatever a host's own default is, a packet without a way back shall reach the firewall.
		for _, dev := range []string{"all", "outside"} {
			if err := d.host.Sysctl("net.ipv4.conf."+dev+".rp_filter", "0"); err != nil {
				return nil, err
			}
		}
		doors = append(doors, d)
	}
	return doors, nil
}

// perimeterd is ours, in host mode: it drops what is not let in, as the others do.
func perimeterd(ctx context.Context, l *lab.Lab) (*door, error) {
	daemon, err := l.NewDaemon(ctx, lab.Setting{Key: "window", Value: fmt.Sprintf("%q", window)},
		lab.Setting{Key: "mode", Value: `"host"`}, lab.Setting{Key: "allow", Value: `["icmp"]`})
	if err != nil {
		return nil, err
	}
	users, err := roster.New(daemon, 100)
	if err != nil {
		return nil, err
	}
	if err := daemon.Start(ctx); err != nil {
		return nil, err
	}
	first := users.Config.Firewall.Sequences[0].Ports[0]
	return &door{name: "perimeterd", host: l.Bastion, pid: daemon.PID(), ways: []way{
		{"perimeterd, token", func(ctx context.Context, source netip.Addr) (lab.Knock, error) {
			token, err := users.Next(ctx)
			return users.TokenKnock(source, l.Bastion.Addr, token), err
		}},
		{"perimeterd, sequence", func(_ context.Context, source netip.Addr) (lab.Knock, error) {
			return users.SequenceKnock(source, l.Bastion.Addr), nil
		}},
	}, aimed: []lab.Garbage{{Proto: unix.IPPROTO_UDP, Port: gatePort, Length: knock.TokenSize}, {Proto: first.Proto, Port: first.Number}}}, nil
}

// filter is what the peers' hosts start with: all is dropped but answers and ICMP.
const filter = `*filter
:INPUT DROP
:FORWARD ACCEPT
:OUTPUT ACCEPT
-A INPUT -i lo -j ACCEPT
-A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
-A INPUT -p icmp -j ACCEPT
%sCOMMIT
`

// newHost makes a host with that filter and further rules, and something that listens on the port behind the door.
func newHost(ctx context.Context, l *lab.Lab, name, rules string) (*lab.Namespace, error) {
	h, err := l.AddHost(ctx, name)
	if err != nil {
		return nil, err
	}
	restore := h.Command(ctx, "iptables-restore")
	restore.Stdin = strings.NewReader(fmt.Sprintf(filter, rules))
	if out, err := restore.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("iptables-restore: %w: %s", err, out)
	}
	listener, err := h.Listen("tcp", fmt.Sprintf(":%d", gatePort))
	if err != nil {
		return nil, err
	}
	go swallow(listener) // until the program ends
	return h, nil
}

func swallow(l net.Listener) {
	for {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil {
			c.Close()
		}
	}
}

// start runs a peer's daemon in the foreground.
func start(ctx context.Context, l *lab.Lab, h *lab.Namespace, name string, args ...string) (pid int, err error) {
	log, err := os.Create(filepath.Join(l.Dir, name+".log"))
	if err != nil {
		return 0, err
	}
	defer log.Close()
	c := h.Command(ctx, name, args...)
	c.Stdout, c.Stderr = log, log
	if err := c.Start(); err != nil {
		return 0, err
	}
	go c.Wait()
	return c.Process.Pid, nil
}

// knockd is Debian's with the stock configuration's sequence and iptables command, and a command that closes again.
func knockd(ctx context.Context, l *lab.Lab) (*door, error) {
	h, err := newHost(ctx, l, "knockd", "")
	if err != nil {
		return nil, err
	}
	file := filepath.Join(l.Dir, "knockd.conf")
	if err := os.WriteFile(file, fmt.Appendf(nil, `[options]
	UseSyslog

[gate]
	sequence      = 7000,8000,9000
	seq_timeout   = 5
	tcpflags      = syn
	start_command = /sbin/iptables -A INPUT -s %%IP%% -p tcp --dport %[1]d -j ACCEPT
	cmd_timeout   = %[2]d
	stop_command  = /sbin/iptables -D INPUT -s %%IP%% -p tcp --dport %[1]d -j ACCEPT
`, gatePort, int(window.Seconds())), 0o600); err != nil {
		return nil, err
	}
	pid, err := start(ctx, l, h, "knockd", "-i", "outside", "-c", file, "-p", filepath.Join(l.Dir, "knockd.pid"))
	if err != nil {
		return nil, err
	}
	return &door{name: "knockd", host: h, pid: pid, ways: []way{{"knockd", func(_ context.Context, source netip.Addr) (lab.Knock, error) {
		return roster.SequenceKnock(source, h.Addr, knockPorts), nil
	}}}, aimed: []lab.Garbage{{Proto: unix.IPPROTO_TCP, Port: knockPorts[0].Number}}}, nil
}

// fwknop is Debian's server with its default settings (iptables, libpcap); its client makes each message.
func fwknop(ctx context.Context, l *lab.Lab) (*door, error) {
	h, err := newHost(ctx, l, "fwknop", "")
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(l.Dir, "fwknop")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	in := func(name string) string { return filepath.Join(dir, name) }
	client := func(ctx context.Context, args ...string) error {
		c := l.Client.Command(ctx, "fwknop", args...)
		c.Env = append(os.Environ(), "HOME="+dir)
		if out, err := c.CombinedOutput(); err != nil {
			return fmt.Errorf("fwknop: %w: %s", err, out)
		}
		return nil
	}
	if err := client(ctx, "--key-gen", "--key-gen-file", in("keys")); err != nil {
		return nil, err
	}
	keys, err := os.ReadFile(in("keys"))
	if err != nil {
		return nil, err
	}
	k := strings.NewReplacer(":", " ").Replace(string(keys)) // "KEY_BASE64: …" there, "KEY_BASE64 …" in the configurations
	for name, text := range map[string]string{
		"fwknopd.conf": "PCAP_INTF outside;\n",
		"access.conf":  fmt.Sprintf("SOURCE ANY\n%sFW_ACCESS_TIMEOUT %d\n", k, int(window.Seconds())),
		"rc":           fmt.Sprintf("[default]\n%sUSE_HMAC Y\nACCESS tcp/%d\nSPA_SERVER %v\n", k, gatePort, h.Addr),
	} {
		if err := os.WriteFile(in(name), []byte(text), 0o600); err != nil {
			return nil, err
		}
	}
	pid, err := start(ctx, l, h, "fwknopd", "--foreground", "--config-file", in("fwknopd.conf"), "--access-file", in("access.conf"),
		"--run-dir", dir, "--pid-file", in("pid"), "--digest-file", in("digest"))
	if err != nil {
		return nil, err
	}
	return &door{name: "fwknop", host: h, pid: pid, ways: []way{{"fwknop", func(ctx context.Context, source netip.Addr) (lab.Knock, error) {
		file := in("spa-" + source.String())
		defer os.Remove(file)
		if err := client(ctx, "--rc-file", in("rc"), "--no-save-args", "--test", "--save-packet", file, "--allow-ip", source.String()); err != nil {
			return lab.Knock{}, err
		}
		spa, err := os.ReadFile(file)
		if err != nil {
			return lab.Knock{}, err
		}
		return lab.Knock{Packets: [][]byte{
			lab.Datagram4(netip.AddrPortFrom(source, 40000), netip.AddrPortFrom(h.Addr, spaPort), bytes.TrimSpace(spa)),
		}}, nil
	}}}, aimed: []lab.Garbage{{Proto: unix.IPPROTO_UDP, Port: spaPort, Length: spaLength, Base64: true}}}, nil
}

// ipset is the script that has no daemon: each knock moves the source from a set to the next.
func ipset(ctx context.Context, l *lab.Lab) (*door, error) {
	const name = "ipset"
	h, err := newHost(ctx, l, name, "")
	if err != nil {
		return nil, err
	}
	script := fmt.Sprintf(`set -e
ipset create step1 hash:ip timeout 10
ipset create step2 hash:ip timeout 10
ipset create opened hash:ip timeout %[2]d
iptables -A INPUT -p tcp --dport %[1]d -m set --match-set opened src -j ACCEPT
iptables -A INPUT -p tcp --syn --dport %[5]d -m set --match-set step2 src -j SET --add-set opened src --exist
iptables -A INPUT -p tcp --syn --dport %[4]d -m set --match-set step1 src -j SET --add-set step2 src --exist
iptables -A INPUT -p tcp --syn --dport %[3]d -j SET --add-set step1 src --exist
`, gatePort, int(window.Seconds()), knockPorts[0].Number, knockPorts[1].Number, knockPorts[2].Number)
	if out, err := h.Command(ctx, "sh", "-c", script).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("the ipset script: %w: %s", err, out)
	}
	return &door{name: name, host: h, ways: []way{{"iptables + ipset", func(_ context.Context, source netip.Addr) (lab.Knock, error) {
		return roster.SequenceKnock(source, h.Addr, knockPorts), nil
	}}}, aimed: []lab.Garbage{{Proto: unix.IPPROTO_TCP, Port: knockPorts[0].Number}}}, nil
}
