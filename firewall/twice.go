package firewall

import "time"

// A knock is sent again where no answer has come yet, be it lost or on its way, and networks double datagrams by themselves. What
// follows its first copy on the same way within doubledWithin is no replay to tell of.
const doubledWithin = 2 * time.Second

// openedLately remembers the latest openings; who knocks among more than these is told of a second copy.
type openedLately struct {
	list [256]Opening
	next int
}

func (l *openedLately) add(o Opening) {
	l.list[l.next] = o
	l.next = (l.next + 1) % len(l.list)
}

// doubles says whether o is a second copy of the datagram that opened.
func (l *openedLately) doubles(o Opening) bool {
	for _, first := range l.list[:] {
		if first.Token == o.Token && first.Source == o.Source && first.Port == o.Port && o.Port != 0 && o.At.Sub(first.At) < doubledWithin {
			return true
		}
	}
	return false
}
