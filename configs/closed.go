package configs

import "fmt"

// refuseMissing refuses every key that asks for something this version does not do. To ignore it would leave a door open
// that the operator believes closed, or closed that he believes open. A feature that arrives takes its line out.
func (p *parser) refuseMissing() {
	r := &p.raw
	for _, c := range []struct {
		key    string
		value  any
		closed bool   // the value is one that needs nothing
		way    string // out
	}{
		{"store.etcd", r.Store.Etcd, len(r.Store.Etcd) == 0, "leave it empty: the state stays on this host"},
	} {
		if c.closed {
			continue
		}
		value := ""
		if c.value != "" {
			value = fmt.Sprintf(" %q", c.value)
		}
		p.bad(c.key, "%s%s: not in this version: %s", c.key, value, c.way)
	}
}
