package client

import (
	"slices"
	"sync"
)

// maxVisited bounds how many destinations are remembered, and maxVisitedName how long each is: a name of the DNS and a port.
const (
	maxVisited     = 32
	maxVisitedName = 253 + len(":65535")
)

// visited are destinations, as clients write them, to which the proxy has opened a tunnel whose client greeted a TLS server, the latest first.
type visited struct {
	mu      sync.Mutex
	names   []string
	changed chan struct{} // gets a word when there is another, or one less
}

func (o *visited) has(name string) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.Contains(o.names, name)
}

func (o *visited) add(name string) {
	if len(name) > maxVisitedName {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	i := slices.Index(o.names, name)
	if i >= 0 {
		o.names = slices.Delete(o.names, i, i+1)
	}
	o.names = slices.Insert(o.names, 0, name)
	o.names = o.names[:min(len(o.names), maxVisited)]
	if i < 0 {
		o.tell()
	}
}

func (o *visited) remove(name string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if i := slices.Index(o.names, name); i >= 0 {
		o.names = slices.Delete(o.names, i, i+1)
		o.tell()
	}
}

// tell is for who holds the lock.
func (o *visited) tell() {
	select {
	case o.changed <- struct{}{}:
	default:
	}
}

// begin takes what was kept, and tells of changes from then on.
func (o *visited) begin(names []string) {
	for _, name := range slices.Backward(names) {
		o.add(name)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.changed = make(chan struct{}, 1)
}

func (o *visited) list() []string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.Clone(o.names)
}
