//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"syscall"
	"time"

	"github.com/elazarl/goproxy"
	"golang.org/x/sys/unix"

	"perimeterd/internal/lab"
	"perimeterd/internal/lab/swarm"
)

const (
	metricsAddress = "127.0.0.1:9617"
	cloudName      = "s3.us-east-1.amazonaws.com"
	nameTTL        = 60 // seconds, as S3's are at most
	originPort     = 8443
	originPorts    = 16
	spareFiles     = 150 // of those that a process may open, for what are no tunnels
)

// inner is the address that all proxies listen on.
var inner = netip.MustParseAddr("10.77.0.1")

// contender is a running proxy. One without an address is none: clients connect to the origin.
type contender struct {
	name    string
	at      netip.AddrPort
	pid     int
	distant bool // clients come by a tunnel
}

func (c *contender) cpu() (time.Duration, error) {
	// The clock of another process, as clock_getcpuclockid(3) makes its number: nanoseconds where /proc has ticks, and with
	// threads that have ended.
	var t unix.Timespec
	if err := unix.ClockGettime(int32(^c.pid)<<3|2, &t); err != nil {
		return 0, fmt.Errorf("CPU time of %s: %w", c.name, err)
	}
	return time.Duration(t.Nano()), nil
}

// room is a lab with all proxies on the bastion. Clients are on the bastion too, at a session's own address, which is put on its
// loopback device: the daemon sees them as it sees those who come by the tunnel, and the tunnel's cost, many
// times the proxy's, stays out of the comparison.
type room struct {
	*lab.Lab
	daemon  *lab.Daemon
	swarm   *swarm.Swarm
	source  netip.Addr    // of clients on the bastion
	member  *swarm.Member // whose session it is
	distant *swarm.Member // a client with a tunnel
	all     []*contender  // ours is the first
	floor   []*contender  // what no product is, if asked for
	origins []int         // listening sockets at the cloud, by port
	direct  *contender
	files   int // that this process and every proxy may open
}

// raiseFiles raises the limit of open files to what the machine allows, for children too.
func raiseFiles() (int, error) {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return 0, err
	}
	most := syscall.Rlimit{Cur: 1 << 18, Max: 1 << 18}
	if limit.Max >= most.Max || syscall.Setrlimit(syscall.RLIMIT_NOFILE, &most) != nil { // without CAP_SYS_RESOURCE
		most.Cur, most.Max = limit.Max, limit.Max
		if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &most); err != nil { // explicitly, or Go gives children what it found
			return 0, fmt.Errorf("limit of open files, %d: %w", most.Cur, err)
		}
	}
	return int(most.Cur), nil
}

func newRoom(ctx context.Context, o options) (_ *room, err error) {
	debug.SetMemoryLimit(math.MaxInt64) // GOMEMLIMIT is for the proxies
	r := &room{direct: &contender{name: "direct"}}
	if r.files, err = raiseFiles(); err != nil {
		return nil, err
	}
	if r.Lab, err = lab.New(ctx, lab.Options{}); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.close())
		}
	}()
	cloud, err := r.StartCloud(lab.CloudOptions{Names: []string{cloudName}})
	if err != nil {
		return nil, err
	}
	cloud.DNS.SetTTL(nameTTL)
	for key, value := range map[string]string{
		"net.ipv4.ip_local_port_range": "1024 65535",
		// The firewall's memory of 100,000 connections that are over.
		"net.netfilter.nf_conntrack_tcp_timeout_time_wait": "2",
	} {
		if err := r.Bastion.Sysctl(key, value); err != nil {
			return nil, err
		}
	}
	for i := range originPorts {
		if err := r.Cloud.Do(func() error {
			fd, err := listen(netip.AddrPortFrom(r.Cloud.Addr, uint16(originPort+i)))
			r.origins = append(r.origins, fd)
			return err
		}); err != nil {
			return nil, err
		}
	}
	if err := r.startDaemon(ctx); err != nil {
		return nil, err
	}
	if err := r.startOthers(ctx); err != nil {
		return nil, err
	}
	if len(o.names) > 0 {
		r.all = slices.DeleteFunc(r.all, func(c *contender) bool { return !slices.Contains(o.names, c.name) })
	}
	if i := slices.IndexFunc(r.all, func(c *contender) bool { return c.name == floorName }); i >= 0 {
		r.floor, r.all = r.all[i:i+1], slices.Delete(slices.Clone(r.all), i, i+1)
	}
	return r, nil
}

// startDaemon runs perimeterd with two sessions.
func (r *room) startDaemon(ctx context.Context) (err error) {
	if r.daemon, err = r.NewDaemon(ctx,
		lab.Setting{Key: "metrics", Value: fmt.Sprintf("%q", metricsAddress)},
		lab.Setting{Key: "connections", Value: "50000"},
		lab.Setting{Key: "per_user_connections", Value: "50000"},
	); err != nil {
		return err
	}
	f, err := os.OpenFile(r.daemon.Config, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(f, "\n[[proxy.rule]]\nallow = [%q, %q]\nports = [%s]\ngroups = [\"*\"]\ntls = true\n", cloudName, r.Cloud.Addr, portList(", "))
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	day := 24 * time.Hour
	if r.swarm, err = swarm.New(ctx, r.Lab, r.daemon, day, day); err != nil {
		return err
	}
	if err := r.daemon.Start(ctx); err != nil {
		return err
	}
	if _, err := r.swarm.Join(ctx, r.swarm.Members, 1); err != nil {
		return err
	}
	at := netip.AddrPortFrom(inner, 3128)
	for _, m := range r.swarm.Members { // a first packet admits it
		c, err := m.Dial(ctx, at)
		if err != nil {
			return err
		}
		c.Close()
	}
	r.member, r.distant = r.swarm.Members[0], r.swarm.Members[1]
	r.source = r.member.Address
	r.all = append(r.all, &contender{name: "perimeterd", at: at, pid: r.daemon.PID()})
	return r.Bastion.AddAddress(ctx, "lo", netip.PrefixFrom(r.source, 32))
}

// startOthers runs what perimeterd is compared with.
func (r *room) startOthers(ctx context.Context) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	dir := filepath.Join(r.Dir, "others")
	if err := os.Mkdir(dir, 0o777); err != nil {
		return err
	}
	if err := os.Chmod(dir, 0o777); err != nil { // Squid and tinyproxy give up root
		return err
	}
	for i, other := range []struct {
		name, conf string
		command    []string
	}{
		{"goproxy", "", []string{self, "-goproxy", "AT"}},
		{"squid", squidConf, []string{"squid", "-N", "-f", "CONF"}},
		{"tinyproxy", tinyproxyConf, []string{"tinyproxy", "-d", "-c", "CONF"}},
		{floorName, "", []string{self, "-floor", "AT", "-egress", r.Egress.String(), "-origin", r.Cloud.Addr.String()}},
	} {
		c := &contender{name: other.name, at: netip.AddrPortFrom(inner, uint16(3129+i))}
		conf := filepath.Join(dir, other.name+".conf")
		text := fmt.Sprintf(other.conf, c.at, c.at.Port(), r.Egress, dir, portList(" "), portLines())
		if other.conf != "" {
			if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
				return err
			}
		}
		args := slices.Clone(other.command)
		for j, a := range args {
			switch a {
			case "AT":
				args[j] = c.at.String()
			case "CONF":
				args[j] = conf
			}
		}
		cmd := r.Bastion.Command(context.WithoutCancel(ctx), args[0], args[1:]...)
		complaints, err := os.Create(filepath.Join(dir, other.name+".out"))
		if err != nil {
			return err
		}
		cmd.Stdout, cmd.Stderr = complaints, complaints
		err = cmd.Start()
		complaints.Close()
		if err != nil {
			return err
		}
		c.pid = cmd.Process.Pid
		if err := r.awaitListening(ctx, c); err != nil {
			said, _ := os.ReadFile(complaints.Name())
			return fmt.Errorf("%w\n%s", err, said)
		}
		r.all = append(r.all, c)
	}
	return nil
}

func (r *room) awaitListening(ctx context.Context, c *contender) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	for {
		conn, err := r.Bastion.DialFrom(ctx, r.source, "tcp", c.at.String())
		if err == nil {
			return conn.Close()
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("%s does not listen on %v: %w", c.name, c.at, err)
		}
	}
}

func (r *room) close() error {
	if r.swarm != nil {
		r.swarm.Close()
	}
	for _, fd := range r.origins {
		unix.Close(fd)
	}
	return r.Lab.Close()
}

func portList(separator string) (s string) {
	for i := range originPorts {
		if i > 0 {
			s += separator
		}
		s += fmt.Sprint(originPort + i)
	}
	return s
}

func portLines() (s string) {
	for i := range originPorts {
		s += fmt.Sprintf("ConnectPort %d\n", originPort+i)
	}
	return s
}

// serveGoproxy is goproxy as its own example has it.
func serveGoproxy(at string) error {
	lc := net.ListenConfig{}
	lc.SetMultipathTCP(false) // such sockets are not spliced
	l, err := lc.Listen(context.Background(), "tcp", at)
	if err != nil {
		return err
	}
	return http.Serve(l, goproxy.NewProxyHttpServer())
}

// The arguments are address, port, egress address, directory, ports as a list and as tinyproxy's lines. Both write a line for each
// tunnel, as perimeterd does, and know who may connect and to which ports.
const squidConf = `http_port %[1]v
visible_hostname bastion.test
acl tunnel src 10.77.0.0/16
acl origin port %[5]s
http_access deny !origin
http_access allow tunnel
http_access deny all
tcp_outgoing_address %[3]v
cache deny all
access_log stdio:%[4]s/squid-access.log
cache_log %[4]s/squid-cache.log
pid_filename none
pinger_enable off
max_filedescriptors 65536
read_timeout 1 hour
shutdown_lifetime 0 seconds
`

const tinyproxyConf = `User nobody
Group nogroup
Port %[2]d
Listen 10.77.0.1
Bind %[3]v
Timeout 3600
LogFile "%[4]s/tinyproxy.log"
LogLevel Connect
MaxClients 20000
Allow 10.77.0.0/16
%[6]s`
