package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"perimeterd/configs"
	"perimeterd/internal/control"
	"perimeterd/internal/identity"
	"perimeterd/internal/signer"
	"perimeterd/vpn"
)

type initOptions struct {
	config   string // path
	dir      string // --dir, absolute, or empty
	endpoint string
	egress   []string
}

func newInitCommand() *cobra.Command {
	var o initOptions
	cmd := &cobra.Command{
		Use:   "init",
		Short: "Make the keys, the certificates, a random knock sequence and perimeterd.toml",
		Long: `Examples:
  perimeterd init                                          on EC2: the address and region come from the instance
  perimeterd init --endpoint bastion.example.com
  perimeterd init --endpoint bastion.example.com:443 --egress 203.0.113.10/32
  perimeterd init --endpoint 127.0.0.1 --dir ./try         everything below ./try, no service is started

It asks nothing, and overwrites nothing. On EC2 the instance metadata service (IMDSv2) is asked for a second at most;
AWS_EC2_METADATA_DISABLED=true keeps it from that.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if o.config, err = cmd.Flags().GetString("config"); err != nil {
				return err
			}
			if o.dir != "" {
				if cmd.Flags().Changed("config") {
					return usageError{errors.New("--dir and --config: --dir DIR keeps the configuration at DIR/perimeterd.toml: leave one of them off")}
				}
				if o.dir, err = filepath.Abs(o.dir); err != nil {
					return err
				}
				o.config = filepath.Join(o.dir, "perimeterd.toml")
			}
			if o.config, err = filepath.Abs(o.config); err != nil {
				return err
			}
			return runInit(cmd.Context(), cmd.OutOrStdout(), o)
		},
	}
	cmd.Flags().StringVar(&o.endpoint, "endpoint", "", "`HOST[:PORT]` where clients find this host; a name is best: the address can move")
	cmd.Flags().StringArrayVar(&o.egress, "egress", nil, "`CIDR` that AWS sees; may be repeated")
	cmd.Flags().StringVar(&o.dir, "dir", "", "keep configuration, keys, state and socket below `DIR`")
	return cmd
}

func runInit(ctx context.Context, out io.Writer, o initOptions) error {
	ec2 := askEC2(ctx)
	values, err := o.values(ec2)
	if err != nil {
		return err
	}
	text, err := configs.Render(values)
	if err != nil {
		return err
	}
	// What is written must be what the daemon takes.
	c, err := configs.Parse(o.config, text)
	if err != nil {
		return err
	}
	if err := untouched(c, o.config); err != nil {
		return err
	}
	if err := nobodyListens(c.Firewall.GatePorts[0]); err != nil {
		return usageError{err}
	}
	made, err := writeAll(c, o.config, text, time.Now())
	if errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("%w: run it as root, or try it out with --dir DIR", err)
	}
	if err != nil {
		return err
	}
	return o.report(ctx, out, c, ec2, made)
}

// values are the keys of the reference that init fills in.
func (o *initOptions) values(ec2 instance) (map[string]any, error) {
	endpoint := o.endpoint
	if endpoint == "" {
		if !ec2.Address.IsValid() {
			return nil, usageError{errors.New("where do clients find this host? It is not an EC2 instance with a public address: " +
				"name it with --endpoint HOST[:PORT]")}
		}
		endpoint = ec2.Address.String()
	}
	if _, _, err := net.SplitHostPort(endpoint); err != nil && !strings.Contains(endpoint, "://") {
		endpoint = net.JoinHostPort(strings.Trim(endpoint, "[]"), strconv.Itoa(vpn.DefaultPort))
	}
	host, err := configs.SplitEndpoint(endpoint)
	if err != nil {
		return nil, usageError{fmt.Errorf("--endpoint %w", err)}
	}
	_, port, err := net.SplitHostPort(endpoint)
	if err != nil {
		return nil, err
	}
	gatePort, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return nil, err
	}
	if use, others := othersPorts[uint16(gatePort)]; others {
		return nil, usageError{fmt.Errorf("--endpoint %q: port %d is %s, and the gate's port is shut to everybody who did not knock: "+
			"leave the port off for %d, or take another, as in %s", endpoint, gatePort, use, vpn.DefaultPort, net.JoinHostPort(host, "443"))}
	}
	egress := []string{}
	for _, e := range o.egress {
		// A single address is meant as itself.
		if a, err := netip.ParseAddr(e); err == nil {
			e = netip.PrefixFrom(a, a.BitLen()).String()
		} else if p, err := netip.ParsePrefix(e); err != nil {
			return nil, usageError{fmt.Errorf("--egress %q: want a CIDR, as in 203.0.113.10/32", e)}
		} else if p != p.Masked() {
			return nil, usageError{fmt.Errorf("--egress %q: bits are set past the prefix: write %v, or %v for the one address", e, p.Masked(), p.Addr())}
		}
		egress = append(egress, e)
	}
	if len(egress) == 0 {
		a := ec2.Address
		if !a.IsValid() {
			a, _ = netip.ParseAddr(host) // a host goes out by the address at which it is reached, as a rule
		}
		if a.Is4() && a.IsGlobalUnicast() && !a.IsPrivate() { // egress.ipv6 is off: AWS sees no address of IPv6
			egress = append(egress, netip.PrefixFrom(a, a.BitLen()).String())
		}
	}
	v := map[string]any{
		"gate.endpoint":        endpoint,
		"gate.listen":          []string{":" + port},
		"egress.public":        egress,
		"knock.sequence.ports": randomSequence(uint16(gatePort)),
	}
	if ec2.Region != "" && ec2.Region != "us-east-1" {
		v["proxy.regions"] = []string{"us-east-1", ec2.Region} // IAM and other global services live in the first
	}
	if o.dir != "" {
		v["state_dir"], v["run_dir"] = filepath.Join(o.dir, "state"), filepath.Join(o.dir, "run")
	}
	return v, nil
}

// othersPorts are what the gate must not have. A gate on SSH's port locks the operator out.
var othersPorts = map[uint16]string{
	22: "SSH's", 25: "SMTP's", 53: "DNS's", 80: "the console's and HTTP's", 3128: "the proxy's",
}

// nobodyListens refuses a TCP port at which a service of this host is reached now: only those who knock would reach it.
func nobodyListens(port uint16) error {
	for _, file := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		table, err := os.ReadFile(file)
		if errors.Is(err, fs.ErrNotExist) { // a kernel without IPv6
			continue
		}
		if err != nil {
			return err
		}
		// proc(5): sl, local_address as HEX:PORT, rem_address, st, which is 0A for TCP_LISTEN.
		for line := range strings.Lines(string(table)) {
			f := strings.Fields(line)
			if len(f) > 3 && f[3] == "0A" && strings.HasSuffix(f[1], fmt.Sprintf(":%04X", port)) {
				return fmt.Errorf("port %d/tcp: a service of this host listens there (`ss -ltnp sport = :%d` shows it), and the gate would shut it "+
					"to everybody who did not knock: stop the service, or name another port with --endpoint HOST:PORT", port, port)
			}
		}
	}
	return nil
}

// commonPorts are ports above 1023 that scanners try first, or that services of a bastion's neighbours use.
var commonPorts = []uint16{
	1080, 1194, 1433, 1434, 1521, 1701, 1723, 1883, 2049, 2082, 2083, 2181, 2222, 2375, 2376, 2379, 2380, 3000, 3128, 3260,
	3306, 3389, 4000, 4369, 4443, 4444, 4500, 4789, 4848, 5000, 5001, 5044, 5060, 5061, 5201, 5222, 5432, 5555, 5601, 5672,
	5900, 5901, 5984, 5985, 5986, 6000, 6379, 6443, 6667, 7000, 7001, 7070, 7443, 7474, 7777, 8000, 8008, 8009, 8080, 8081,
	8086, 8088, 8089, 8090, 8125, 8140, 8443, 8472, 8500, 8530, 8883, 8888, 9000, 9001, 9042, 9090, 9091, 9092, 9093, 9100,
	9200, 9300, 9418, 9443, 9999, 10000, 10050, 10051, 10250, 11211, 15672, 25565, 27015, 27017, 27018, 28017, 32400, 49152,
	50000, 50070, 51820, 61616,
}

// randomSequence draws four TCP ports in an order that no scan has: neither rising nor falling, none near another.
func randomSequence(gate uint16) []string {
	const low, high, apart = 1024, 65535, 16
	for {
		var ports []int
		for len(ports) < 4 {
			n, err := rand.Int(rand.Reader, big.NewInt(high-low+1))
			if err != nil {
				panic(err) // never since Go 1.24
			}
			p := int(n.Int64()) + low
			near := func(q int) bool { return max(p, q)-min(p, q) < apart }
			if !slices.Contains(commonPorts, uint16(p)) && p != int(gate) && !slices.ContainsFunc(ports, near) {
				ports = append(ports, p)
			}
		}
		rising := slices.IsSorted(ports)
		falling := slices.IsSortedFunc(ports, func(a, b int) int { return b - a })
		if rising || falling {
			continue
		}
		text := make([]string, len(ports))
		for i, p := range ports {
			text[i] = strconv.Itoa(p)
		}
		return text
	}
}

// untouched refuses where a file that writeAll makes is there already.
func untouched(c *configs.Config, config string) error {
	id := c.Identity
	for _, path := range []string{config, filepath.Join(filepath.Dir(id.CAKey), signer.Renewable), id.CA, id.CAKey, id.Cert, id.Key, id.Master, id.WireGuardKey, id.ServerID} {
		if _, err := os.Lstat(path); err == nil {
			return fmt.Errorf("%s exists: this host was set up before, and init overwrites nothing: "+
				"go on with `perimeterd user add`, or begin elsewhere with --dir", path)
		} else if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// writeAll makes every file, or none: what it wrote before an error goes again. The configuration comes last, so where it
// is, the rest is. Made are the directories that were not there before.
func writeAll(c *configs.Config, config string, text []byte, now time.Time) (made []string, err error) {
	id := c.Identity
	var serverID [16]byte
	rand.Read(serverID[:]) // never fails since Go 1.24
	name := hex.EncodeToString(serverID[:])
	ca, err := identity.NewCA("perimeterd CA "+name[:8], now)
	if err != nil {
		return nil, err
	}
	host, _, err := net.SplitHostPort(c.Gate.Endpoint)
	if err != nil {
		return nil, err
	}
	gate, err := ca.IssueServer(name, host, now)
	if err != nil {
		return nil, err
	}
	var master [32]byte
	rand.Read(master[:])
	var wireguard [32]byte
	rand.Read(wireguard[:])
	var written []string
	defer func() {
		if err != nil {
			slices.Reverse(made) // children first
			for _, path := range append(written, made...) {
				os.Remove(path)
			}
		}
	}()
	for _, d := range []struct {
		path string
		perm fs.FileMode
	}{{filepath.Dir(config), 0o755}, {filepath.Dir(id.CAKey), 0o700}, {c.StateDir, 0o700}} {
		if made, err = mkdirAll(d.path, d.perm, made); err != nil {
			return made, err
		}
	}
	service, err := serviceOf(config)
	if err != nil {
		return made, err
	}
	if err := service.own(c.StateDir); err != nil {
		return made, err
	}
	written = append(written, id.CA, id.CAKey)
	if err := ca.Save(id.CA, id.CAKey); err != nil {
		return made, err
	}
	record := filepath.Join(filepath.Dir(id.CAKey), signer.Renewable)
	written = append(written, record)
	if err := os.Mkdir(record, 0o700); err != nil {
		return made, err
	}
	if err := giveToSigner(id.CAKey); err != nil {
		return made, err
	}
	for _, f := range []struct {
		path string
		data []byte
		perm fs.FileMode
	}{
		{id.Cert, gate.Certificate, 0o644},
		{id.Key, gate.Key, 0o600},
		{id.Master, identity.EncodeKey(master), 0o600},
		{id.WireGuardKey, identity.EncodeKey(wireguard), 0o600},
		{id.ServerID, []byte(name + "\n"), 0o644},
		{config, text, 0o640},
	} {
		written = append(written, f.path)
		if err := identity.WriteNew(f.path, f.data, f.perm); err != nil {
			return made, err
		}
		if err := service.own(f.path); err != nil {
			return made, err
		}
	}
	return made, service.read(config)
}

// mkdirAll is os.MkdirAll, and adds to made what it made, parents first.
func mkdirAll(path string, perm fs.FileMode, made []string) ([]string, error) {
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		return made, err
	}
	made, err := mkdirAll(filepath.Dir(path), perm, made)
	if err != nil {
		return made, err
	}
	if err := os.Mkdir(path, perm); err != nil {
		return made, err
	}
	return append(made, path), nil
}

// report ends init with what is left to do.
func (o *initOptions) report(ctx context.Context, out io.Writer, c *configs.Config, ec2 instance, made []string) error {
	flag := ""
	if o.config != configs.DefaultPath {
		flag = " --config " + o.config
	}
	seq := c.Firewall.Sequences[0].Ports
	var ports []string
	for _, p := range seq {
		ports = append(ports, p.String())
	}
	gate := c.Firewall.GatePorts[0]
	fmt.Fprintf(out, "%s and %s are written; users and sessions will be in %s.\n", o.config, filepath.Dir(c.Identity.CAKey)+"/", c.StateDir)
	if len(made) > 0 {
		fmt.Fprintf(out, "New directories: %s\n", strings.Join(made, " "))
	}
	fmt.Fprintln(out)
	if len(c.Egress.Public) == 0 {
		fmt.Fprintf(out, "The address that AWS sees is not known: write it in [egress] public before making policies.\n\n")
	} else {
		fmt.Fprintf(out, "AWS will see %v. If that is not so, write the address in [egress] public.\n\n", c.Egress.Public)
	}
	fmt.Fprintf(out, "Open these ports to everybody in the security group or outer firewall; the host itself keeps them shut:\n"+
		"    %d/tcp  the gate\n    %d/udp  tunnel and token knocks\n    %s tcp  the knock sequence\n\n",
		gate, c.Firewall.TunnelPort, strings.Join(ports, ", "))
	fmt.Fprintf(out, "    %s\n\n", authorizeIngress(ec2, c.Endpoint, gate, c.Firewall.TunnelPort, ports))
	switch {
	case o.config == configs.DefaultPath && control.HasService():
		if text, err := exec.CommandContext(ctx, "systemctl", "enable", "--quiet", "--now", control.Unit).CombinedOutput(); err != nil {
			return fmt.Errorf("everything is written, but the service did not start: systemctl: %s: see journalctl -u %s",
				strings.TrimSpace(string(text)), control.Unit)
		}
		fmt.Fprintf(out, "The service runs.\n\n")
	default:
		fmt.Fprintf(out, "Start the daemon:\n    perimeterd run%s\n\n", flag)
	}
	fmt.Fprintf(out, "Next:\n    perimeterd user add NAME%s\n", flag)
	return nil
}

// authorizeIngress is the aws command for the ports.
func authorizeIngress(ec2 instance, endpoint string, gate, tunnel uint16, sequence []string) string {
	var b strings.Builder
	group := ec2.SecurityGroup
	if group == "" {
		group = "sg-..."
	}
	b.WriteString("aws ec2 authorize-security-group-ingress --group-id " + group)
	if ec2.Region != "" {
		b.WriteString(" --region " + ec2.Region)
	}
	b.WriteString(" --ip-permissions")
	ranges := "IpRanges=[{CidrIp=0.0.0.0/0}]"
	if a, err := netip.ParseAddrPort(endpoint); err != nil || a.Addr().Is6() { // a name may lead to both
		ranges += ",Ipv6Ranges=[{CidrIpv6=::/0}]"
	}
	permit := func(proto, port string) {
		fmt.Fprintf(&b, " 'IpProtocol=%s,FromPort=%s,ToPort=%s,%s'", proto, port, port, ranges)
	}
	permit("tcp", strconv.Itoa(int(gate)))
	permit("udp", strconv.Itoa(int(tunnel)))
	for _, p := range sequence {
		permit("tcp", p)
	}
	return b.String()
}
