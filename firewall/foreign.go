package firewall

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"

	"perimeterd/knock"
)

// Obstacle is what another tool's tables do to packets that ours would accept. An accept in one table does not override a
// drop in another.
type Obstacle struct {
	Chain string // family, table and chain
	What  string // what happens there, to which ports
	Way   string // out: the commands for the tool that owns the chain
	Sure  bool   // false: it hangs on rules that cannot be read, or on settings elsewhere
}

func (o Obstacle) String() string { return fmt.Sprintf("chain %s %s: %s", o.Chain, o.What, o.Way) }

// ForeignRules asks nft for every table of this network namespace but ours, as the JSON texts of libnftables-json(5). Ours
// is left out since it can hold a hundred thousand tokens, which are nobody's business.
func ForeignRules(ctx context.Context) (texts [][]byte, err error) {
	list, err := nftJSON(ctx, "list", "tables")
	if err != nil {
		return nil, err
	}
	objects, err := parseRules(list)
	if err != nil {
		return nil, err
	}
	for _, o := range objects {
		if t := o.Table; t != nil && !(t.Family == "inet" && t.Name == TableName) {
			text, err := nftJSON(ctx, "list", "table", t.Family, t.Name)
			if err != nil {
				return nil, err
			}
			texts = append(texts, text)
		}
	}
	return texts, nil
}

func nftJSON(ctx context.Context, args ...string) ([]byte, error) {
	out, err := exec.CommandContext(ctx, "nft", append([]string{"-j"}, args...)...).Output()
	var failed *exec.ExitError
	switch {
	case errors.Is(err, exec.ErrNotFound):
		return nil, errors.New("no program nft, so other tools' rules cannot be read: apt install nftables")
	case errors.As(err, &failed):
		return nil, fmt.Errorf("nft %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(failed.Stderr)))
	}
	return out, err
}

type object struct {
	Table *struct{ Family, Name string }
	Chain *foreignChain
	Rule  *struct {
		Family, Table, Chain string
		Expr                 []map[string]any
	}
	Set, Map *struct {
		Family, Table, Name string
		Elem                []any
	}
}

type foreignChain struct {
	Family, Table, Name string
	Type, Hook, Policy  string // empty for one that is only jumped to
	Prio                int
	rules               [][]map[string]any
}

func (c *foreignChain) key() string { return c.Family + " " + c.Table + " " + c.Name }

func parseRules(text []byte) ([]object, error) {
	var all struct{ Nftables []object }
	if err := json.Unmarshal(text, &all); err != nil {
		return nil, fmt.Errorf("nft's JSON: %w", err)
	}
	return all.Nftables, nil
}

// FindObstacles judges the tables that ForeignRules read: it follows a stranger's packet to each of the gate's ports and the
// tunnel's through every base chain on its way in, coming by one of the interfaces given. Where a rule hangs on something
// that it does not know, it follows both ways.
func FindObstacles(texts [][]byte, cfg Config, interfaces []string) (list []Obstacle, err error) {
	w := walker{chains: map[string]*foreignChain{}, sets: map[string][]any{}}
	var order []*foreignChain
	for _, text := range texts {
		objects, err := parseRules(text)
		if err != nil {
			return nil, err
		}
		for _, o := range objects {
			switch {
			case o.Chain != nil:
				w.chains[o.Chain.key()] = o.Chain
				order = append(order, o.Chain)
			case o.Rule != nil:
				if c := w.chains[o.Rule.Family+" "+o.Rule.Table+" "+o.Rule.Chain]; c != nil {
					c.rules = append(c.rules, o.Rule.Expr)
				}
			case o.Set != nil:
				w.sets[o.Set.Family+" "+o.Set.Table+" "+o.Set.Name] = o.Set.Elem
			case o.Map != nil:
				w.sets[o.Map.Family+" "+o.Map.Table+" "+o.Map.Name] = o.Map.Elem
			}
		}
	}
	for _, c := range order {
		if c.Type == "filter" && (c.Hook == "input" || c.Hook == "prerouting") {
			list = append(list, w.judge(c, cfg, interfaces)...)
		}
		list = append(list, w.marks(c)...)
	}
	return list, nil
}

// judge follows packets through a base chain.
func (w *walker) judge(c *foreignChain, cfg Config, interfaces []string) (list []Obstacle) {
	var ports []knock.Port
	for _, p := range cfg.GatePorts {
		ports = append(ports, knock.Port{Proto: knock.TCP, Number: p})
	}
	ports = append(ports, knock.Port{Proto: knock.UDP, Number: cfg.TunnelPort})
	if len(interfaces) == 0 {
		interfaces = []string{""}
	}
	var dropped []knock.Port
	sure, where, marked := true, "", false
	for _, port := range ports {
		for _, six := range []bool{false, true} {
			if c.Family == "ip" && six || c.Family == "ip6" && !six || !slices.Contains([]string{"ip", "ip6", "inet"}, c.Family) {
				continue
			}
			for _, dev := range interfaces {
				w.begin(probe{port: port, six: six, dev: dev, mark: c.mark()})
				f := w.chain(c.key(), 0)
				if f.falls != no {
					f.end(c.Policy != "drop", yes, "by its policy")
				}
				if f.dropped != no && f.accepted != yes && !slices.Contains(dropped, port) {
					dropped = append(dropped, port)
					sure, where = sure && f.accepted == no, f.where
				}
				if w.remarked != "" && c.mark() == GateMark && !marked {
					marked = true
					list = append(list, Obstacle{c.key(), "writes the packet's mark (chain " + w.remarked + ")",
						fmt.Sprintf("the gate's sockets take only packets with the mark %#x, so nobody would come in: let that rule pass over %s", GateMark, names(ports)), w.remarkedSurely})
				}
			}
		}
	}
	if len(dropped) > 0 {
		what, way := "drops "+names(dropped)+" "+where, w.way(c, dropped)
		if !sure {
			what = "may drop " + names(dropped) + " " + where + ", unless a rule that cannot be read from here lets it pass"
			way = "look at it with `" + w.look(c) + "`; if nothing there allows it, " + way
		}
		list = append(list, Obstacle{c.key(), what, way, sure})
	}
	return list
}

// mark is what the gate's packets carry when they come to the chain.
func (c *foreignChain) mark() uint32 {
	if c.Hook == "input" && c.Prio > -5 {
		return GateMark
	}
	return 0
}

func names(ports []knock.Port) string {
	var s []string
	for _, p := range ports {
		proto := "tcp"
		if p.Proto == knock.UDP {
			proto = "udp"
		}
		s = append(s, fmt.Sprintf("%d/%s", p.Number, proto))
	}
	return strings.Join(s, ", ")
}

// tool guesses who made a chain, by the names that the tools give theirs.
func (w *walker) tool(c *foreignChain) string {
	if strings.HasPrefix(c.Table, "firewalld") {
		return "firewalld"
	}
	for _, o := range w.chains {
		if o.Family != c.Family || o.Table != c.Table {
			continue
		}
		switch {
		case strings.HasPrefix(o.Name, "ufw"):
			return "ufw"
		case o.Name == "INPUT_ZONES" || o.Name == "IN_public":
			return "firewalld"
		}
	}
	if c.Table == "filter" && c.Name == "INPUT" && c.Family != "inet" {
		return "iptables"
	}
	return "nft"
}

func (w *walker) look(c *foreignChain) string {
	switch w.tool(c) {
	case "ufw":
		return "ufw status verbose"
	case "firewalld":
		return "firewall-cmd --list-all-zones"
	case "iptables":
		return iptables(c) + " -S"
	}
	return "nft list table " + c.Family + " " + c.Table
}

func iptables(c *foreignChain) string {
	if c.Family == "ip6" {
		return "ip6tables"
	}
	return "iptables"
}

// way is the commands that let the ports pass.
func (w *walker) way(c *foreignChain, ports []knock.Port) string {
	var commands []string
	tool := w.tool(c)
	for _, p := range ports {
		port := names([]knock.Port{p})
		number, proto, _ := strings.Cut(port, "/")
		switch tool {
		case "ufw":
			commands = append(commands, "ufw allow "+port)
		case "firewalld":
			commands = append(commands, "firewall-cmd --permanent --add-port="+port)
		case "iptables":
			commands = append(commands, fmt.Sprintf("%s -I %s -p %s --dport %s -j ACCEPT", iptables(c), c.Name, proto, number))
		default:
			commands = append(commands, fmt.Sprintf("nft insert rule %s %s dport %s accept", c.key(), proto, number))
		}
	}
	text := "`" + strings.Join(commands, "; ")
	switch tool {
	case "firewalld":
		return text + "; firewall-cmd --reload`"
	case "iptables":
		return text + "`, and where your rules are kept (iptables-persistent: `netfilter-persistent save`)"
	case "nft":
		return text + "`, and the same in /etc/nftables.conf or where that table comes from"
	}
	return text + "`"
}

// marks finds rules for which the gate's mark makes a difference, in chains that a reply of the gate's can meet. It carries
// the mark only where the host reflects marks.
func (w *walker) marks(c *foreignChain) (list []Obstacle) {
	for _, rule := range c.rules {
		for _, e := range rule {
			if m, ok := e["mangle"].(map[string]any); ok && isMark(m["key"]) {
				if v, ok := m["value"].(float64); ok && uint32(v) == GateMark {
					list = append(list, Obstacle{c.key(), fmt.Sprintf("gives packets the mark %#x", GateMark),
						"that mark opens the gate to whoever has it: take another there", true})
				}
			}
			m, ok := e["match"].(map[string]any)
			if !ok || c.Hook == "input" || !usesMark(m["left"]) {
				continue
			}
			w.begin(probe{mark: GateMark})
			with := w.match(c, m)
			w.begin(probe{})
			if with != w.match(c, m) {
				return append(list, Obstacle{c.key(), fmt.Sprintf("tells packets apart by bits of the mark that the gate's packets carry (%#x)", GateMark),
					"harmless while net.ipv4.tcp_fwmark_accept and net.ipv4.fwmark_reflect are 0: `sysctl net.ipv4.tcp_fwmark_accept net.ipv4.fwmark_reflect`", false})
			}
		}
	}
	return list
}
