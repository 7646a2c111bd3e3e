package knock

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
)

// IP protocol numbers (https://www.iana.org/assignments/protocol-numbers).
const (
	TCP = 6
	UDP = 17
)

// Port is one knock of a sequence.
type Port struct {
	Proto  uint8 // TCP or UDP
	Number uint16
}

func (p Port) String() string {
	if p.Proto == UDP {
		return strconv.Itoa(int(p.Number)) + "/udp"
	}
	return strconv.Itoa(int(p.Number))
}

// ParsePort reads "19044", "19044/tcp" and "19044/udp", and knockd's spelling of them with a colon.
func ParsePort(s string) (Port, error) {
	num, proto, found := strings.Cut(s, "/")
	if !found {
		num, proto, found = strings.Cut(s, ":")
	}
	p := Port{Proto: TCP}
	switch {
	case !found || strings.EqualFold(proto, "tcp"):
	case strings.EqualFold(proto, "udp"):
		p.Proto = UDP
	default:
		return Port{}, fmt.Errorf("port %q: protocol %q is neither tcp nor udp: write 19044 or 19044/udp", s, proto)
	}
	n, err := strconv.ParseUint(num, 10, 16)
	if err != nil || n == 0 {
		return Port{}, fmt.Errorf("port %q: want a number from 1 to 65535, as in 19044 or 19044/udp", s)
	}
	p.Number = uint16(n)
	return p, nil
}

// Sequence is a list of ports that opens a window.
type Sequence struct {
	Name       string
	Ports      []Port
	Credential uint32        // who it stands for, 1 to MaxCredential
	Timeout    time.Duration // between two knocks
}

// Equal tells whether two sequences open the same door for the same user.
func (s Sequence) Equal(o Sequence) bool {
	return s.Name == o.Name && s.Credential == o.Credential && s.Timeout == o.Timeout && slices.Equal(s.Ports, o.Ports)
}

// MinPorts is the shortest sequence, DefaultTimeout the pause it may make.
const (
	MinPorts       = 3
	DefaultTimeout = 10 * time.Second
)

// Validate refuses sequences that a scan could complete or that could not work beside each other. Taken are ports that
// services of this host use.
func Validate(seqs []Sequence, taken []Port) error {
	classes := 0
	for i, s := range seqs {
		bad := func(format string, a ...any) error {
			return fmt.Errorf("knock.sequence %q: %s", s.Name, fmt.Sprintf(format, a...))
		}
		if s.Name == "" {
			return fmt.Errorf("knock.sequence number %d has no name: give it one, the log shows it", i+1)
		}
		if len(s.Ports) < MinPorts {
			return bad("%s: fewer than %d, so a chance hit is likely: add more", list(s.Ports), MinPorts)
		}
		for j, p := range s.Ports {
			if slices.Contains(s.Ports[:j], p) {
				return bad("port %v stands in it twice; a repeated packet would be a knock: choose distinct ports", p)
			}
			if slices.Contains(taken, p) {
				return bad("port %v is used by a service here, whose traffic would be a knock: choose a free port", p)
			}
			if j > 0 && absDiff(p.Number, s.Ports[j-1].Number) == 1 {
				return bad("ports %v,%v are adjacent; a port scan would open it: choose ports in no order", s.Ports[j-1], p)
			}
		}
		if !slices.ContainsFunc(seqs[:i], func(o Sequence) bool { return o.Timeout == s.Timeout }) {
			if classes++; classes > maxClasses {
				return bad("timeout %v is the %dth of its kind; the kernel's states have room for %d: use the same for more of them", s.Timeout, classes, maxClasses)
			}
		}
		for _, o := range seqs[:i] {
			if o.Name == s.Name {
				return bad("the name is used twice: choose another")
			}
			short, long := o, s
			if len(short.Ports) > len(long.Ports) {
				short, long = long, short
			}
			if slices.Equal(short.Ports, long.Ports[:len(short.Ports)]) {
				return bad("%s of %q begin %q, which could never be completed: change one of them", list(short.Ports), short.Name, long.Name)
			}
		}
	}
	return nil
}

// list names ports in an error.
func list(ports []Port) string {
	if len(ports) == 0 {
		return "no ports"
	}
	var text []string
	for _, p := range ports {
		text = append(text, p.String())
	}
	return "ports " + strings.Join(text, ",")
}

func absDiff(a, b uint16) uint16 { return max(a, b) - min(a, b) }

// Complete is the bit that marks a state of the automaton as an opened window; the low bits are the credential.
const Complete = 1 << 31

// Transition is an element of the map `step`: in State, a packet to Port leads to Next.
type Transition struct {
	State uint32
	Port  Port
	Next  uint32
}

// States of the automaton carry the class of their timeout in the bits of ClassMask: the kernel adds an element with the
// timeout of its rule, so there is a rule for each.
const (
	ClassShift = 24
	ClassMask  = 0x7f << ClassShift
	maxClasses = 1 << 7
)

// Compile makes one automaton of all sequences: a trie whose root is state 0. Ports already hit on the way are
// self-loops, so a retransmitted SYN is no mistake; whatever has no transition leads back to the root. The sequences must
// have passed Validate. Steps and ports are sorted; timeouts are those of the classes, at least one. Where sequences begin
// alike, the longest of their timeouts counts.
func Compile(seqs []Sequence) (steps []Transition, ports []Port, timeouts []time.Duration) {
	type edge struct {
		state uint32
		port  Port
	}
	next, longest := map[edge]uint32{}, map[uint32]time.Duration{}
	states := uint32(0)
	for _, s := range seqs {
		state := uint32(0)
		for i, p := range s.Ports {
			to, known := next[edge{state, p}]
			switch {
			case i == len(s.Ports)-1:
				to = Complete | s.Credential
			case !known:
				states++
				to = states
				for _, hit := range s.Ports[:i+1] {
					next[edge{to, hit}] = to
				}
			}
			if i < len(s.Ports)-1 {
				longest[to] = max(longest[to], s.Timeout)
			}
			next[edge{state, p}] = to
			state = to
			if !slices.Contains(ports, p) {
				ports = append(ports, p)
			}
		}
	}
	timeouts = slices.Compact(slices.Sorted(maps.Values(longest)))
	if len(timeouts) == 0 {
		timeouts = []time.Duration{DefaultTimeout}
	}
	classed := func(state uint32) uint32 {
		if d, ok := longest[state]; ok {
			return state | uint32(slices.Index(timeouts, d))<<ClassShift
		}
		return state // the root, or complete
	}
	for e, to := range next {
		steps = append(steps, Transition{classed(e.state), e.port, classed(to)})
	}
	slices.SortFunc(steps, func(a, b Transition) int {
		return cmp.Or(cmp.Compare(a.State, b.State), comparePorts(a.Port, b.Port))
	})
	slices.SortFunc(ports, comparePorts)
	return steps, ports, timeouts
}

func comparePorts(a, b Port) int {
	return cmp.Or(cmp.Compare(a.Proto, b.Proto), cmp.Compare(a.Number, b.Number))
}
