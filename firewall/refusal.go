package firewall

import (
	"net/netip"
	"time"
)

// RefusalKind says why a packet opened nothing. Kinds are stable: the table's log prefixes are these words.
type RefusalKind string

// The reasons that the table tells. Of each it tells a few a second at most, whoever sends how much.
const (
	TokenRefused  RefusalKind = "token-refused"  // no token of now: a guess, one long spent, or a clock that is wrong
	TokenReplayed RefusalKind = "token-replayed" // a token of now that was spent before (or the set of spent ones is full)
	SequenceReset RefusalKind = "sequence-reset" // it had begun, and another of the knock ports came
	WindowsFull   RefusalKind = "windows-full"   // the knock was right, and the set had no room
)

// Refusal is a packet that opened nothing. Its source is a claim.
type Refusal struct {
	Kind     RefusalKind
	Source   netip.Addr
	Port     uint16 // the source's; 0: not known
	Sequence bool   // with WindowsFull: knocked by a sequence, not by a token
	At       time.Time
}

// refusalOf is what a prefix of the log says of a packet; the group may carry what another tool logs.
func refusalOf(prefix string, o Opening) (r Refusal, ok bool) {
	switch kind := RefusalKind(prefix); kind {
	case TokenRefused, TokenReplayed, SequenceReset, WindowsFull:
		return Refusal{kind, o.Source, o.Port, kind == WindowsFull && o.Sequence, o.At}, true
	}
	return Refusal{}, false
}
