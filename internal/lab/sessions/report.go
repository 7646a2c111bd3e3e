//go:build linux

package main

import (
	"fmt"
	"strings"

	"perimeterd/internal/lab/bench"
)

// report is what was measured, in rows.
type report struct {
	*bench.Run
	rows   []row
	broken []error // promises
}

type row struct{ what, value string }

func (r *report) row(what, format string, a ...any) {
	r.rows = append(r.rows, row{what, fmt.Sprintf(format, a...)})
	fmt.Printf("%s: %s\n", what, r.rows[len(r.rows)-1].value)
}

// title begins a part of the table.
func (r *report) title(format string, a ...any) {
	r.rows = append(r.rows, row{"**" + fmt.Sprintf(format, a...) + "**", ""})
	fmt.Printf("\n%s\n", fmt.Sprintf(format, a...))
}

// promise notes one that was not kept.
func (r *report) promise(kept bool, format string, a ...any) {
	if !kept {
		r.broken = append(r.broken, fmt.Errorf(format, a...))
	}
}

func (r *report) section() string {
	var b strings.Builder
	fmt.Fprintf(&b, `## Sessions

%s

Every client walks the whole path: a token from a state file with that many users, TLS, a request with the handshake in it,
WireGuard (wireguard-go, one device each), TCP through one TUN device, the proxy, HTTPS from a cloud host. Clients, daemon and
cloud share the machine.

| | |
|---|---|
`, r.Origin())
	for _, row := range r.rows {
		fmt.Fprintf(&b, "| %s | %s |\n", row.what, row.value)
	}
	return b.String()
}
