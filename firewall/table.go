package firewall

import (
	"net/netip"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"perimeterd/knock"
)

// Timeouts that the sets carry; where the configuration differs, the rule that adds says so itself. So a set's
// definition never changes, and no apply ever has to replace one and lose what it holds.
const (
	windowTimeout   = time.Minute
	progressTimeout = 10 * time.Second
	tokenTimeout    = 90 * time.Second
	spentTimeout    = 3 * time.Minute
)

// MaxStep is the longest token step: spent tokens are remembered for spentTimeout, and a token lives four steps.
const MaxStep = spentTimeout / 4

const (
	setSize   = 65536
	tokenSize = 1 << 20
)

// notPublic4 are the destinations that the daemon never connects to (RFC 6890 and RFC 5771), unless in the set reach.
var notPublic4 = prefixes("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
	"192.0.0.0/24", "192.168.0.0/16", "198.18.0.0/15", "224.0.0.0/3")

// notPublic6 is everything outside 2000::/3, and in it what hides other addresses or is documentation.
var notPublic6 = prefixes("::/3", "2001::/32", "2001:db8::/32", "2002::/16", "4000::/2", "8000::/1")

func prefixes(list ...string) (out []netip.Prefix) {
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

// builder collects the table of doc.go for one batch.
type builder struct {
	conn  *nftables.Conn
	table *nftables.Table
	sets  map[string]*nftables.Set
	names map[string]*nftables.Chain
	err   error
	// On trial, the chains and the configured sets of the next configuration carry nextSuffix. The rules of a base chain that
	// the configuration decides stand in a chain of their own then, for goodSuffix or nextSuffix.
	suffix, base string
}

func newTable() *nftables.Table {
	return &nftables.Table{Family: nftables.TableFamilyINet, Name: TableName}
}

func (b *builder) set(s *nftables.Set) {
	s.Table = b.table
	if err := b.conn.AddSet(s, nil); err != nil && b.err == nil {
		b.err = err
	}
	b.sets[s.Name] = s
}

func (b *builder) chain(name string) {
	name = b.local(name)
	b.names[name] = b.conn.AddChain(&nftables.Chain{Name: name, Table: b.table})
}

// local is what a chain is called in the configuration that is being built.
func (b *builder) local(chain string) string {
	switch chain {
	case "input", "output":
		return chain + b.base
	case "forward":
		return chain
	}
	return chain + b.suffix
}

func (b *builder) goTo(chain string) match { return verdict(expr.VerdictGoto, b.local(chain)) }
func (b *builder) jump(chain string) match { return verdict(expr.VerdictJump, b.local(chain)) }

// configured are the sets whose elements the configuration decides: each configuration has its own.
var configured = []string{"step", "knockports", "trusted4", "trusted6", "reach"}

// named is a set as the configuration that is being built knows it.
func (b *builder) named(set string) *nftables.Set {
	if slices.Contains(configured, set) {
		set += b.suffix
	}
	return b.sets[set]
}

func (b *builder) rule(chain string, parts ...match) {
	b.conn.AddRule(&nftables.Rule{Table: b.table, Chain: b.names[b.local(chain)], Exprs: join(parts...)})
}

// declareSets adds every set, so that rules may name them in any order.
func (b *builder) declareSets() {
	ip4, ip6, mark, port := nftables.TypeIPAddr, nftables.TypeIP6Addr, nftables.TypeMark, nftables.TypeInetService
	concat := nftables.MustConcatSetType
	sources := func(name string, key nftables.SetDatatype, isMap bool, timeout time.Duration) {
		s := &nftables.Set{Name: name, KeyType: key, KeyByteOrder: network, HasTimeout: true, Dynamic: true, Size: setSize, Timeout: timeout}
		if isMap {
			s.IsMap, s.DataType = true, mark
		}
		b.set(s)
	}
	sources("open4", ip4, true, windowTimeout)
	sources("open6", ip6, true, windowTimeout)
	sources("seq4", ip4, true, windowTimeout)
	sources("seq6", ip6, true, windowTimeout)
	// No Concatenation here: its flag is for intervals, and nft, whose listing an operator may load, leaves it off.
	b.set(&nftables.Set{Name: "peer4", KeyType: concat(ip4, port), HasTimeout: true, Size: setSize})
	b.set(&nftables.Set{Name: "peer6", KeyType: concat(ip6, port), HasTimeout: true, Size: setSize})
	b.set(&nftables.Set{Name: "admitted", KeyType: ip4, KeyByteOrder: network, HasTimeout: true, Size: setSize})
	b.set(&nftables.Set{Name: "service", KeyType: concat(ip4, port), HasTimeout: true, Size: setSize})
	// The kernel has these two already, made with the typeof that nft lists and loads again: see tokenSets.
	tok := nftables.TypeInteger
	tok.Bytes = knock.TokenSize
	b.set(&nftables.Set{Name: "tokens", KeyType: tok, DataType: mark, IsMap: true, HasTimeout: true, Size: tokenSize, Timeout: tokenTimeout})
	b.set(&nftables.Set{Name: "spent", KeyType: tok, HasTimeout: true, Dynamic: true, Size: tokenSize, Timeout: spentTimeout})
	sources("progress4", ip4, true, progressTimeout)
	sources("progress6", ip6, true, progressTimeout)
	sources("pace4", ip4, false, progressTimeout)
	sources("pace6", ip6, false, progressTimeout)
}

func (b *builder) declareConfigured() {
	mark, port, protocol := nftables.TypeMark, nftables.TypeInetService, nftables.TypeInetProto
	concat := nftables.MustConcatSetType
	b.set(&nftables.Set{Name: "step" + b.suffix, KeyType: concat(mark, protocol, port), DataType: mark, IsMap: true, Size: setSize})
	b.set(&nftables.Set{Name: "knockports" + b.suffix, KeyType: concat(protocol, port), Size: setSize})
	b.set(&nftables.Set{Name: "trusted4" + b.suffix, KeyType: nftables.TypeIPAddr, KeyByteOrder: network, Interval: true})
	b.set(&nftables.Set{Name: "trusted6" + b.suffix, KeyType: nftables.TypeIP6Addr, KeyByteOrder: network, Interval: true})
	b.set(&nftables.Set{Name: "reach" + b.suffix, KeyType: concat(nftables.TypeIPAddr, port), Concatenation: true, Interval: true})
}

// declareHook adds a chain that the kernel calls. On trial it only chooses whose rules are gone through, which stand in a
// chain of their own.
func (b *builder) declareHook(name string, hook *nftables.ChainHook, policy nftables.ChainPolicy) {
	if b.suffix == "" {
		b.names[name] = b.conn.AddChain(&nftables.Chain{Name: name, Table: b.table, Hooknum: hook,
			Priority: nftables.ChainPriorityRef(-5), Type: nftables.ChainTypeFilter, Policy: &policy})
	}
	if b.local(name) != name {
		b.chain(name)
	}
}

func (b *builder) declareChains(cfg Config) {
	policy := nftables.ChainPolicyAccept
	if cfg.Mode == Host {
		policy = nftables.ChainPolicyDrop
	}
	b.declareHook("input", nftables.ChainHookInput, policy)
	for _, name := range []string{"gate", "token", "refused", "open", "knock", "knock_step", "knock_hit", "seq_open", "seq_opened", "stray", "tunnel"} {
		b.chain(name)
	}
	if cfg.Mode == Host {
		b.chain("host")
	}
	if b.suffix == "" { // nothing that could be on trial changes it
		b.declareHook("forward", nftables.ChainHookForward, nftables.ChainPolicyAccept)
	}
	b.declareHook("output", nftables.ChainHookOutput, nftables.ChainPolicyAccept)
	b.chain("egress")
}

// ports matches the key against one port or several.
func (b *builder) ports(list []uint16) match {
	if len(list) == 1 {
		return equal(network.PutUint16(list[0]))
	}
	var elements []nftables.SetElement
	for _, p := range list {
		elements = append(elements, nftables.SetElement{Key: network.PutUint16(p)})
	}
	m, err := b.anonymous(&nftables.Set{KeyType: nftables.TypeInetService}, elements)
	if err != nil && b.err == nil {
		b.err = err
	}
	return m
}

func (b *builder) networks(key nftables.SetDatatype, list []netip.Prefix) match {
	m, err := b.anonymous(&nftables.Set{KeyType: key, Interval: true}, ranges(list))
	if err != nil && b.err == nil {
		b.err = err
	}
	return m
}

// both adds a rule for each address family's map.
func (b *builder) both(chain, prefix string, parts func(set string) match) {
	b.rule(chain, source4(), parts(prefix+"4"))
	b.rule(chain, source6(), parts(prefix+"6"))
}

// build writes the rules of doc.go, and the elements that the configuration decides.
func (b *builder) build(cfg Config) {
	b.declareConfigured()
	b.declareChains(cfg)
	b.inputRules(cfg)
	b.gateRules()
	b.knockRules(cfg)
	b.tunnelRules(cfg)
	if cfg.Mode == Host {
		b.hostRules(cfg)
	}
	b.outputRules(cfg)
	b.fill(cfg)
}

func (b *builder) inputRules(cfg Config) {
	b.rule("input", load(expr.MetaKeyIIF, regKey), equal(native.PutUint32(1)), accept()) // lo is 1 in every namespace
	b.rule("input", load(expr.MetaKeyIIFNAME, regKey), equal(device(cfg.Interface)), b.goTo("tunnel"))
	b.rule("input", in4(16, cfg.Network), drop())
	b.rule("input", in4(12, cfg.Network), drop())
	tcpPort := join(proto(unix.IPPROTO_TCP), dport())
	b.rule("input", tcpPort, b.ports(cfg.GatePorts), b.goTo("gate"))
	port, length := network.PutUint16(cfg.TunnelPort), network.PutUint16(8+knock.TokenSize)
	b.rule("input", proto(unix.IPPROTO_UDP), transport(2, 4, regKey), equal(append(port, length...)), b.goTo("token"))
	b.rule("input", proto(unix.IPPROTO_UDP), dport(), equal(port), b.goTo("gate"))
	b.rule("input", ctState(expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED), accept())
	b.rule("input", load(expr.MetaKeyL4PROTO, regKey), transport(2, 2, regKey2), b.lookup("knockports"), b.goTo("knock"))
	b.rule("input", tcpSYN(expr.CmpOpEq), b.jump("stray"))
	b.rule("input", proto(unix.IPPROTO_UDP), b.jump("stray"))
	if cfg.Mode == Host {
		b.rule("input", b.goTo("host"))
	}
}

func (b *builder) gateRules() {
	pass := join(setMark(GateMark), accept())
	b.rule("gate", ctState(expr.CtStateBitESTABLISHED), pass)
	b.rule("gate", ctState(expr.CtStateBitINVALID), drop())
	// Kernel 6.1 lets a map be looked up only for its data, so this takes the credential for a moment.
	for _, windows := range []string{"open", "seq"} {
		b.both("gate", windows, func(set string) match { return join(b.markFrom(set), pass) })
	}
	b.both("gate", "trusted", func(set string) match { return join(b.lookup(set), pass) })
	udp := proto(unix.IPPROTO_UDP)
	b.rule("gate", ipv4(), udp, saddr4(), transport(0, 2, regKey2), b.lookup("peer4"), pass)
	b.rule("gate", ipv6(), udp, saddr6(), transport(0, 2, regPort), b.lookup("peer6"), pass)
	b.rule("gate", drop())
}

func (b *builder) knockRules(cfg Config) {
	log := logTo(cfg.LogGroup, "")
	tell := func(kind RefusalKind) match { return logTo(cfg.LogGroup, string(kind)) }
	full := join(match{rate(1, expr.LimitTimeSecond, 5)}, tell(WindowsFull))
	reset := join(match{rate(5, expr.LimitTimeSecond, 5)}, tell(SequenceReset))
	over := rate(5, expr.LimitTimeSecond, 5)
	over.Over = true
	window := differing(cfg.Window, windowTimeout)
	_, _, pauses := knock.Compile(cfg.Sequences)
	del := func(set string) match { return b.markInto(dynsetDelete, set, 0) }

	b.rule("token", ctState(expr.CtStateBitINVALID), drop())
	b.rule("token", fibDestination(), differs(native.PutUint32(unix.RTN_LOCAL)), drop())
	b.rule("token", token(), b.lookup("spent"), b.goTo("refused"))
	b.rule("token", token(), b.markFrom("tokens"),
		token(), b.limited(dynsetAdd, "spent", rate(1, expr.LimitTimeDay, 1)), b.goTo("open"))
	b.rule("token", b.goTo("refused"))

	b.rule("refused", match{over}, drop())
	b.rule("refused", token(), b.markFrom("tokens"), tell(TokenReplayed), drop())
	b.rule("refused", tell(TokenRefused), drop())

	b.both("open", "open", del)
	b.both("open", "open", func(set string) match { return join(b.markInto(dynsetAdd, set, window), log, drop()) })
	b.rule("open", full)
	b.rule("open", drop())

	b.rule("knock", ctState(expr.CtStateBitINVALID), returns())
	b.rule("knock", tcpSYN(expr.CmpOpNeq), returns())
	b.both("knock", "pace", func(set string) match {
		return join(b.limited(dynsetUpdate, set, rate(20, expr.LimitTimeSecond, 20)), b.goTo("knock_step"))
	})

	b.rule("knock_step", setMark(0))
	b.both("knock_step", "progress", b.markFrom)
	b.both("knock_step", "progress", del)
	b.rule("knock_step", load(expr.MetaKeyMARK, regKey), load(expr.MetaKeyL4PROTO, regKey2), transport(2, 2, regKey3), b.markFrom("step"), b.goTo("knock_hit"))
	b.rule("knock_step", load(expr.MetaKeyMARK, regKey), differs(native.PutUint32(0)), reset)
	b.rule("knock_step", setMark(0))

	b.rule("knock_hit", load(expr.MetaKeyMARK, regKey), masked(native.PutUint32(knock.Complete)), differs(native.PutUint32(0)), b.goTo("seq_open"))
	for class, pause := range pauses {
		add := func(set string) match { return b.markInto(dynsetAdd, set, differing(pause, progressTimeout)) }
		if len(pauses) == 1 {
			b.both("knock_hit", "progress", add)
			break
		}
		ofClass := join(load(expr.MetaKeyMARK, regKey), masked(native.PutUint32(knock.ClassMask)), equal(native.PutUint32(uint32(class)<<knock.ClassShift)))
		b.rule("knock_hit", ofClass, source4(), add("progress4"))
		b.rule("knock_hit", ofClass, source6(), add("progress6"))
	}
	b.rule("knock_hit", setMark(0))

	b.both("seq_open", "seq", del)
	b.both("seq_open", "seq", func(set string) match { return join(b.markInto(dynsetAdd, set, window), b.goTo("seq_opened")) })
	b.rule("seq_open", full)
	b.rule("seq_open", setMark(0))

	b.rule("seq_opened", match{rate(50, expr.LimitTimeSecond, 100)}, log)
	b.rule("seq_opened", setMark(0))

	b.both("stray", "progress", del)
}

// differing is what a rule must say about a timeout: nothing where the set says the same.
func differing(want, sets time.Duration) time.Duration {
	if want == sets {
		return 0
	}
	return want
}

func (b *builder) tunnelRules(cfg Config) {
	server := cfg.Server().As4()
	admitted := join(source4(), b.lookup("admitted"))
	b.rule("tunnel", ipv4(), daddr4(), differs(server[:]), drop())
	b.rule("tunnel", admitted, proto(unix.IPPROTO_TCP), dport(), b.ports(cfg.InnerPorts), accept())
	b.rule("tunnel", ipv4(), proto(unix.IPPROTO_TCP), saddr4(), transport(2, 2, regKey2), b.lookup("service"), accept())
	b.rule("tunnel", admitted, proto(unix.IPPROTO_ICMP), transport(0, 1, regKey), equal([]byte{8}), accept()) // RFC 792: echo
	b.rule("tunnel", admitted, ctState(expr.CtStateBitESTABLISHED), accept())
	b.rule("tunnel", drop())
}

func (b *builder) outputRules(cfg Config) {
	if b.suffix == "" {
		b.rule("forward", load(expr.MetaKeyIIFNAME, regKey), equal(device(cfg.Interface)), drop())
		b.rule("forward", load(expr.MetaKeyOIFNAME, regKey), equal(device(cfg.Interface)), drop())
	}
	toTunnel := join(load(expr.MetaKeyOIFNAME, regKey), equal(device(cfg.Interface)))
	b.rule("output", toTunnel, ipv4(), daddr4(), b.notIn("admitted"), drop())
	b.rule("output", toTunnel, ipv6(), drop())
	b.rule("output", load(expr.MetaKeySKGID, regKey), equal(native.PutUint32(cfg.GID)), tcpSYN(expr.CmpOpEq), b.goTo("egress"))

	b.rule("egress", ipv4(), proto(unix.IPPROTO_TCP), daddr4(), transport(2, 2, regKey2), b.lookup("reach"), accept())
	b.rule("egress", fibDestination(), differs(native.PutUint32(unix.RTN_UNICAST)), rejectX())
	b.rule("egress", toTunnel, rejectX())
	b.rule("egress", ipv4(), daddr4(), b.networks(nftables.TypeIPAddr, notPublic4), reject4())
	if cfg.EgressIPv6 {
		b.rule("egress", ipv6(), daddr6(), b.networks(nftables.TypeIP6Addr, notPublic6), reject6())
	} else {
		b.rule("egress", ipv6(), reject6())
	}
}
