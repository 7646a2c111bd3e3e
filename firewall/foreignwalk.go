package firewall

import (
	"fmt"
	"strings"

	"perimeterd/knock"
)

// truth has three values: a rule's condition may hang on what is not known here.
type truth int

const (
	no truth = iota
	perhaps
	yes
)

func (t truth) not() truth { return yes - t }

// probe is a stranger's first packet to a port.
type probe struct {
	port knock.Port
	six  bool
	dev  string
	mark uint32
}

// fate is what can become of a packet in a chain.
type fate struct {
	accepted, dropped truth  // yes: by a rule that surely matches, perhaps: by one that may
	falls             truth  // it can leave the chain without a verdict
	returned          bool   // by a rule that may match
	where             string // it was dropped
}

// end notes a verdict that is reached with a probability.
func (f *fate) end(accept bool, t truth, where string) {
	if accept {
		f.accepted = max(f.accepted, t)
		return
	}
	if t >= f.dropped {
		f.dropped, f.where = t, where
	}
}

// walker follows one packet at a time through chains.
type walker struct {
	chains map[string]*foreignChain
	sets   map[string][]any

	p              probe
	done           map[string]fate // of chains, for this packet
	remarked       string          // the chain that wrote the mark
	remarkedSurely bool
}

func (w *walker) begin(p probe) {
	w.p, w.done, w.remarked, w.remarkedSurely = p, map[string]fate{}, "", false
}

// maxDepth is how deep the kernel lets chains jump (linux/netfilter/nf_tables.h: NFT_JUMP_STACK_SIZE).
const maxDepth = 16

func (w *walker) chain(key string, depth int) (f fate) {
	if known, ok := w.done[key]; ok {
		return known
	}
	f.falls = yes
	c := w.chains[key]
	if c == nil || depth > maxDepth {
		return f
	}
	for _, rule := range c.rules {
		if w.rule(c, rule, depth, &f) {
			break
		}
	}
	if f.returned {
		f.falls = max(f.falls, perhaps)
	}
	w.done[key] = f
	return f
}

// rule tells whether the packet surely goes no further in the chain.
func (w *walker) rule(c *foreignChain, rule []map[string]any, depth int, f *fate) (ends bool) {
	t, port := yes, false
	for _, e := range rule {
		for kind, arg := range e {
			v, _ := arg.(map[string]any)
			switch kind {
			case "match":
				t = min(t, w.match(c, v))
				port = port || isPort(v["left"])
			case "xt":
				switch name, _ := v["name"].(string); {
				case v["type"] == "target" && name == "REJECT":
					f.end(false, t, "by a rule of chain "+c.Name)
					if t == yes {
						f.falls = no
						return true
					}
				case v["type"] == "target", name == "comment":
				case (name == "conntrack" || name == "state") && !port:
					t = no // in practice: RELATED,ESTABLISHED or INVALID
				case name == "conntrack" || name == "state": // in practice: a port, and NEW
				default:
					t = min(t, perhaps)
				}
			case "limit", "quota", "ct count", "set", "queue":
				t = min(t, perhaps)
			case "mangle":
				if isMark(v["key"]) && t != no {
					if new, known := w.marked(v["value"]); !known || new != w.p.mark {
						w.remarked, w.remarkedSurely = c.Name, w.remarkedSurely || t == yes && known
					}
				}
			case "vmap":
				if t != no && w.vmap(c, v, t, depth, f) {
					return true
				}
			default:
				if t != no && w.verdict(c, kind, v, t, depth, f) {
					return true
				}
			}
			if t == no {
				return false
			}
		}
	}
	return false
}

// verdict carries out a statement that ends or leaves the chain. Others do not matter.
func (w *walker) verdict(c *foreignChain, kind string, arg map[string]any, t truth, depth int, f *fate) (ends bool) {
	switch kind {
	case "accept", "drop", "reject":
		f.end(kind == "accept", t, "by a rule of chain "+c.Name)
		if t == yes {
			f.falls = no
		}
	case "return":
		f.returned = true
	case "jump", "goto":
		target, _ := arg["target"].(string)
		sub := w.chain(c.Family+" "+c.Table+" "+target, depth+1)
		f.end(true, min(t, sub.accepted), "")
		if sub.dropped != no {
			f.end(false, min(t, sub.dropped), sub.where)
		}
		if sub.falls == no && t == yes {
			f.falls = no
			return true
		}
		return kind == "goto" && t == yes
	default:
		return false
	}
	return t == yes
}

func (w *walker) vmap(c *foreignChain, v map[string]any, t truth, depth int, f *fate) (ends bool) {
	data := v["data"]
	if m, ok := data.(map[string]any); ok {
		data = m["set"]
	} else if name, ok := data.(string); ok {
		data = w.sets[c.Family+" "+c.Table+" "+strings.TrimPrefix(name, "@")]
	}
	list, _ := data.([]any)
	for _, pair := range list {
		kv, ok := pair.([]any)
		if !ok || len(kv) != 2 {
			continue
		}
		m := min(t, w.match(c, map[string]any{"op": "==", "left": v["key"], "right": kv[0]}))
		verdicts, _ := kv[1].(map[string]any)
		for kind, arg := range verdicts {
			target, _ := arg.(map[string]any)
			if m != no && w.verdict(c, kind, target, m, depth, f) {
				return true
			}
		}
	}
	return false
}

// match judges one comparison.
func (w *walker) match(c *foreignChain, m map[string]any) truth {
	value, t := w.value(m["left"])
	if t != yes {
		return t
	}
	t = w.holds(c, value, m["right"])
	if m["op"] == "!=" {
		return t.not()
	}
	if op := m["op"]; op != "==" && op != "in" {
		return perhaps
	}
	return t
}

// stranger is the source address of a packet that is of no network that a rule names.
const stranger = "a stranger's"

// value is what the packet has at an expression. No: the packet has nothing of the kind, so the rule does not match
// whatever the comparison; perhaps: it is not known.
func (w *walker) value(left any) (any, truth) {
	m, _ := left.(map[string]any)
	for kind, arg := range m {
		a, _ := arg.(map[string]any)
		key, _ := a["key"].(string)
		switch kind {
		case "meta":
			switch key {
			case "l4proto":
				return w.protocol(), yes
			case "iifname", "iif":
				if w.p.dev == "" {
					return nil, perhaps
				}
				return w.p.dev, yes
			case "nfproto":
				return map[bool]string{false: "ipv4", true: "ipv6"}[w.p.six], yes
			case "protocol":
				return map[bool]string{false: "ip", true: "ip6"}[w.p.six], yes
			case "pkttype":
				return "host", yes
			case "mark":
				return float64(w.p.mark), yes
			}
		case "ct":
			switch key {
			case "state":
				return "new", yes
			case "status":
				return "none", yes // neither translated nor seen before
			}
		case "fib":
			if a["result"] == "type" {
				return "local", yes
			}
			return true, yes // a route back exists
		case "payload":
			return w.field(a)
		case "&":
			parts, _ := arg.([]any)
			if len(parts) == 2 {
				v, t := w.value(parts[0])
				mask, ok := parts[1].(float64)
				if n, is := v.(float64); is && ok && t == yes {
					return float64(uint32(n) & uint32(mask)), yes
				}
				if v == "syn" && t == yes && strings.Contains(fmt.Sprint(parts[1]), "syn") {
					return v, yes
				}
				return nil, min(t, perhaps)
			}
		}
	}
	return nil, perhaps
}

func (w *walker) protocol() string {
	if w.p.port.Proto == knock.UDP {
		return "udp"
	}
	return "tcp"
}

// field is the packet's value of a header field.
func (w *walker) field(a map[string]any) (any, truth) {
	protocol, _ := a["protocol"].(string)
	switch field, _ := a["field"].(string); protocol {
	case "tcp", "udp", "th":
		if protocol != "th" && protocol != w.protocol() {
			return nil, no
		}
		switch field {
		case "dport":
			return float64(w.p.port.Number), yes
		case "flags":
			return "syn", yes
		}
		return nil, perhaps
	case "ip", "ip6":
		if (protocol == "ip6") != w.p.six {
			return nil, no
		}
		switch field {
		case "protocol", "nexthdr":
			return w.protocol(), yes
		case "saddr":
			return stranger, yes
		}
		return nil, perhaps
	case "icmp", "icmpv6", "sctp", "dccp", "udplite", "igmp", "ah", "esp", "gre":
		return nil, no
	}
	return nil, perhaps
}

// holds tells whether a value is, or is in, what a rule names.
func (w *walker) holds(c *foreignChain, value, right any) truth {
	if list, ok := right.([]any); ok {
		return w.any(c, value, list)
	}
	m, ok := right.(map[string]any)
	if !ok {
		s, isText := right.(string)
		if isText && strings.HasPrefix(s, "@") {
			return w.any(c, value, w.sets[c.Family+" "+c.Table+" "+s[1:]])
		}
		if dev, ok := value.(string); ok && isText && strings.HasSuffix(s, "*") && strings.HasPrefix(dev, s[:len(s)-1]) {
			return yes
		}
		return same(value, right)
	}
	if list, ok := m["set"].([]any); ok {
		return w.any(c, value, list)
	}
	if e, ok := m["elem"].(map[string]any); ok {
		return w.holds(c, value, e["val"])
	}
	if r, ok := m["range"].([]any); ok && len(r) == 2 {
		n, isNumber := value.(float64)
		first, ok1 := r[0].(float64)
		last, ok2 := r[1].(float64)
		switch {
		case value == stranger:
			return no
		case !isNumber || !ok1 || !ok2:
			return perhaps
		case first <= n && n <= last:
			return yes
		}
		return no
	}
	if p, ok := m["prefix"].(map[string]any); ok && value == stranger {
		if p["len"] == float64(0) {
			return yes
		}
		return no
	}
	return perhaps
}

func (w *walker) any(c *foreignChain, value any, list []any) (t truth) {
	for _, r := range list {
		t = max(t, w.holds(c, value, r))
	}
	return t
}

// same compares scalars. Protocols have names and numbers.
func same(value, right any) truth {
	if v, ok := value.(string); ok {
		if n, isNumber := right.(float64); isNumber {
			right = map[float64]string{knock.TCP: "tcp", knock.UDP: "udp"}[n]
		}
		if v == right {
			return yes
		}
		return no
	}
	if value == right {
		return yes
	}
	return no
}

// marked is the mark after a rule wrote it.
func (w *walker) marked(value any) (mark uint32, known bool) {
	if n, ok := value.(float64); ok {
		return uint32(n), true
	}
	m, _ := value.(map[string]any)
	for op, arg := range m {
		parts, _ := arg.([]any)
		if len(parts) != 2 || !usesMark(parts[0]) {
			return 0, false
		}
		old, known := w.marked(parts[0])
		if isMark(parts[0]) {
			old, known = w.p.mark, true
		}
		n, ok := parts[1].(float64)
		switch {
		case !known || !ok:
			return 0, false
		case op == "|":
			return old | uint32(n), true
		case op == "^":
			return old ^ uint32(n), true
		case op == "&":
			return old & uint32(n), true
		}
	}
	return 0, false
}

func isMark(e any) bool {
	m, _ := e.(map[string]any)
	meta, _ := m["meta"].(map[string]any)
	return meta["key"] == "mark"
}

// usesMark tells whether an expression is the mark or bits of it.
func usesMark(e any) bool {
	if isMark(e) {
		return true
	}
	m, _ := e.(map[string]any)
	for _, arg := range m {
		if parts, ok := arg.([]any); ok && len(parts) == 2 && usesMark(parts[0]) {
			return true
		}
	}
	return false
}

func isPort(left any) bool {
	m, _ := left.(map[string]any)
	p, _ := m["payload"].(map[string]any)
	return p["field"] == "dport"
}
