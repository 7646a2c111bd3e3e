package main

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"perimeterd/configs"
	"perimeterd/firewall"
	"perimeterd/internal/identity"
	"perimeterd/knock"
)

// door is what the kernel says now.
type door interface {
	Present() (bool, error)
	Windows() ([]firewall.Window, error)
	Spent(knock.Token) (bool, error)
}

// explainer puts packets of one source into words.
type explainer struct {
	c      *configs.Config
	door   door
	source netip.Addr
	users  []identity.User
	master []byte
	server knock.ServerID

	seen  map[knock.Token]bool
	steps map[knock.Transition]uint32 // next state, by state and port
	pause []time.Duration             // between two knocks, by a state's class
	state uint32                      // of the automaton, as the kernel's progress has it
	path  []knock.Port
	last  time.Time
}

func (x *explainer) begin() {
	x.seen, x.steps = map[knock.Token]bool{}, map[knock.Transition]uint32{}
	list, _, pause := knock.Compile(x.c.Firewall.Sequences)
	x.pause = pause
	for _, s := range list {
		x.steps[knock.Transition{State: s.State, Port: s.Port}] = s.Next
	}
}

// explain says what a packet is and what became of it.
func (x *explainer) explain(a firewall.Arrival) string {
	cfg := x.c.Firewall
	port := knock.Port{Proto: a.Proto, Number: a.Destination.Port()}
	_, knocks, _ := knock.Compile(cfg.Sequences)
	switch {
	case a.Proto == knock.TCP && slices.Contains(cfg.GatePorts, port.Number):
		return fmt.Sprintf("gate %d/tcp: a connection begins: %s", port.Number, x.passage(a))
	case a.Proto == knock.UDP && port.Number == cfg.TunnelPort && a.Length == knock.TokenSize:
		return "token: " + x.token(a)
	case a.Proto == knock.UDP && port.Number == cfg.TunnelPort:
		return fmt.Sprintf("tunnel %d/udp: %s: %s", port.Number, wireGuard(a), x.passage(a))
	case slices.Contains(knocks, port):
		return "sequence: " + x.knock(a, port)
	}
	text := fmt.Sprintf("%s: not one of our ports; passed on to the host", name(port))
	switch {
	case !a.Passed && cfg.Mode == firewall.Host:
		text = fmt.Sprintf("%s: dropped: firewall.allow does not name it", name(port))
	case !a.Delivered:
		text = fmt.Sprintf("%s: not one of our ports; the host's own firewall dropped it", name(port))
	}
	if x.state != 0 {
		x.reset()
		text += "; the sequence begins anew: nothing else may come between its knocks"
	}
	return text
}

func name(p knock.Port) string {
	if p.Proto == knock.UDP {
		return fmt.Sprintf("%d/udp", p.Number)
	}
	return fmt.Sprintf("%d/tcp", p.Number)
}

// wireGuard names a message by type and size (WireGuard's paper, 5.4).
func wireGuard(a firewall.Arrival) string {
	kind := byte(0)
	if len(a.Payload) > 0 {
		kind = a.Payload[0]
	}
	switch {
	case kind == 1 && a.Length == 148:
		return "a WireGuard handshake begins"
	case kind == 2 && a.Length == 92:
		return "the answer to a WireGuard handshake of ours"
	case kind == 3 && a.Length == 64:
		return "a WireGuard cookie"
	}
	return fmt.Sprintf("%d bytes that are neither a token nor WireGuard's", a.Length)
}

// passage is what became of a packet to the gate or the tunnel.
func (x *explainer) passage(a firewall.Arrival) string {
	window, left := x.window(a.At)
	switch {
	case a.Delivered && window != "":
		return fmt.Sprintf("let in; window of %s, %v left", window, left)
	case a.Delivered && slices.ContainsFunc(x.c.Firewall.Trusted, func(p netip.Prefix) bool { return p.Contains(x.source) }):
		return "let in; knock.trusted has its network"
	case a.Delivered && a.Proto == knock.UDP:
		return "let in; it belongs to a live tunnel"
	case a.Delivered:
		if there, err := x.door.Present(); err == nil && !there {
			return "the nftables table is not there, so the gate is deaf: `systemctl restart perimeterd`"
		}
		return "let in; its window is closed by now"
	case a.Passed:
		return "we let it in, and another firewall of this host dropped it: `perimeterd check` says which rule to add"
	case window != "":
		return fmt.Sprintf("dropped, although a window of %s is open (%v left): it came before the knock was through, or a rule ahead of ours dropped it (`nft list ruleset`)", window, left)
	}
	return "dropped: no window is open; a knock must come first"
}

// window is whose window is open for the source, and how long from then on.
func (x *explainer) window(at time.Time) (whose string, left time.Duration) {
	windows, err := x.door.Windows()
	if err != nil {
		return "", 0
	}
	for _, w := range windows {
		if w.Source == x.source {
			whose = "the shared sequence"
			for _, u := range x.users {
				if u.Credential == w.Credential {
					whose = u.Name
				}
			}
			left = max(left, w.Expires.Sub(at).Round(time.Second))
		}
	}
	return whose, left
}

// searched is how many steps around now a token is looked for.
const searched = 20

// token says whose a token is, of when, and what it did.
func (x *explainer) token(a firewall.Arrival) string {
	if !x.c.Knock.Tokens {
		return "tokens are turned off here (knock.tokens)"
	}
	if len(a.Payload) < knock.TokenSize {
		return "its packet is cut short"
	}
	t := knock.Token(a.Payload[:knock.TokenSize])
	again := x.seen[t]
	if len(x.seen) < 1<<16 { // an outsider sends what he likes
		x.seen[t] = true
	}
	length := x.c.Firewall.Step
	current := knock.StepAt(a.At, length)
	u, epoch, step, ok := x.owner(t, current)
	if !ok {
		return fmt.Sprintf("nobody here has this one: it is for another server, of a profile from before an `init`, or of a clock that is more than %v wrong",
			(searched * length).Round(time.Minute))
	}
	whose := "of " + u.Name
	ago := step - current
	switch {
	case !u.Active():
		return whose + ", who is revoked: it opens nothing"
	case epoch != u.Epoch:
		return whose + ", made with an old profile: it opens nothing; send the newest one"
	case ago < -1 || ago > 1:
		wrong := "slow"
		if ago > 0 {
			wrong = "fast"
		}
		return fmt.Sprintf("%s for step t%s: the clock there is about %v %s (or here: it is %s): it opens nothing; set the clock, or knock with the sequence",
			whose, strings.Replace(fmt.Sprintf("%+d", ago), "-", "−", 1), (time.Duration(max(ago, -ago)) * length), wrong, a.At.UTC().Format("15:04:05 MST"))
	case again:
		return whose + ", spent already: the same packet came before; it opens nothing"
	}
	spent, err := x.door.Spent(t)
	if err != nil {
		return whose + ": " + err.Error()
	}
	windows, err := x.door.Windows()
	if err != nil {
		return whose + ": " + err.Error()
	}
	for _, w := range windows {
		if w.Source == x.source && w.Credential == u.Credential && !w.Sequence && w.Expires.Sub(a.At) > x.c.Firewall.Window-time.Second {
			return fmt.Sprintf("%s: opened for %v", whose, x.c.Firewall.Window)
		}
	}
	if spent {
		return whose + ", spent already: someone knocked with it before; it opens nothing"
	}
	return whose + ", and it opened nothing: the daemon did not load it (`perimeterd status`), or a rule ahead of ours dropped it (`nft list ruleset`)"
}

// owner looks through everybody's tokens, those of the present first, those of earlier epochs last.
func (x *explainer) owner(t knock.Token, current int64) (u identity.User, epoch uint32, step int64, ok bool) {
	for _, old := range []bool{false, true} {
		for away := range int64(searched + 1) {
			for _, u := range x.users {
				first, last := u.Epoch, u.Epoch
				if old && u.Epoch == 0 {
					continue
				}
				if old {
					first, last = u.Epoch-min(u.Epoch, 3), u.Epoch-1
				}
				for epoch := first; epoch <= last; epoch++ {
					secret := knock.Secret(x.master, u.Name, epoch)
					for _, step := range []int64{current - away, current + away} {
						for i := range uint8(knock.Indexes) {
							if knock.NewToken(secret, x.server, step, i) == t {
								return u, epoch, step, true
							}
						}
					}
				}
			}
		}
	}
	return identity.User{}, 0, 0, false
}

func (x *explainer) reset() { x.state, x.path = 0, nil }

// knock follows the automaton as the kernel does.
func (x *explainer) knock(a firewall.Arrival, p knock.Port) string {
	pause := x.pause[x.state&knock.ClassMask>>knock.ClassShift]
	late := x.state != 0 && a.At.Sub(x.last) > pause
	if late {
		x.reset()
	}
	next, known := x.steps[knock.Transition{State: x.state, Port: p}]
	was := x.path
	text := ""
	switch {
	case !a.Passed && x.c.Firewall.Mode != firewall.Host: // host mode drops a knock when it has counted
		return name(p) + " arrived and was dropped ahead of us: another firewall's rule (`nft list ruleset`)"
	case !known:
		x.reset()
		expected := "is the first of no sequence"
		if len(was) > 0 {
			expected = fmt.Sprintf("does not follow %v", was)
		}
		text = fmt.Sprintf("%s %s: back to the start", name(p), expected)
	case next == x.state:
		text = fmt.Sprintf("%s again: that changes nothing", name(p))
	case next&knock.Complete != 0:
		x.path = append(slices.Clone(x.path), p)
		text = fmt.Sprintf("%s, %s", name(p), x.position())
		x.reset()
		if w, left := x.window(a.At); w != "" {
			text += fmt.Sprintf(": opened, %v left", left)
		} else {
			text += ", and it opened nothing: the knocks came too fast (20 a second), or the daemon has another configuration (`perimeterd check`)"
		}
	default:
		x.state, x.path = next, append(slices.Clone(x.path), p)
		text = fmt.Sprintf("%s, %s", name(p), x.position())
	}
	x.last = a.At
	if late {
		text += fmt.Sprintf("; more than %v had gone since the one before, so it began anew", pause)
	}
	return text
}

// position names the sequences that begin with the path.
func (x *explainer) position() string {
	var of []string
	for _, s := range x.c.Firewall.Sequences {
		if len(s.Ports) >= len(x.path) && slices.Equal(s.Ports[:len(x.path)], x.path) {
			of = append(of, fmt.Sprintf("%d of %q", len(s.Ports), s.Name))
		}
	}
	return fmt.Sprintf("knock %d of %s", len(x.path), strings.Join(of, " or "))
}
