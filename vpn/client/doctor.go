package client

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"
)

// Doctor walks the way from this machine to the cloud, one step after the other, and says of each whether it is well. It
// ends no session, replaces none, and leaves the tunnel as it is: where that is down, it asks the gate for a session of its own, if
// the certificate has no other, and ends it.
type Doctor struct {
	Profile      *Profile
	Now          func() time.Time // the wall clock
	Environ      []string         // of the shell whose programs are to use the proxy
	Echo         string           // a URL that answers with the address it sees, in text
	Destinations []string         // HOST:PORT to reach through the proxy
	Found        func(Finding)    // is told each at once; nil: nobody watches

	report   Report
	severity string         // of what is wrong with the endpoint that is tried
	gate     netip.AddrPort // that answered
	proxies  []string       // that lead into the tunnel; none: it is down
	doubt    bool           // the gate opened, and not to the token: does UDP pass?
}

// EchoURL is what AWS itself says of an address.
const EchoURL = "https://checkip.amazonaws.com/"

// What a finding says of its step.
const (
	Well    = "ok"
	Warning = "warning" // it works, and there is something to know
	Problem = "problem"
)

// Finding is what was found at one step.
type Finding struct {
	Status string `json:"status"`         // ok, warning, problem
	Step   string `json:"step"`           // state, certificate, network, knock, gate, clock, session, udp, tunnel, proxy, egress, environment, keys, aws
	Code   string `json:"code,omitempty"` // of a warning or a problem; stable
	Text   string `json:"text"`
	Fix    string `json:"fix,omitempty"` // what to do
}

func (f Finding) String() string {
	s := fmt.Sprintf("%-8s %s: %s", f.Status, f.Step, f.Text)
	if f.Fix != "" {
		s += ": " + f.Fix
	}
	return s
}

// Codes of findings.
const (
	CodeState        = "state"            // the state directory cannot be written
	CodeNoNetwork    = "no-network"       // no route to the gate
	CodeNoName       = "no-name"          // its name does not resolve
	CodeLocalDrop    = "local-firewall"   // this machine drops its own packets
	CodeUnanswered   = "knock-unanswered" // no knock of any kind opens
	CodeTokens       = "tokens"           // the token was not sent, or the sequence had to open
	CodeGateDown     = "gate-down"        // the door opens, or is not there, and nothing listens
	CodeGateSilent   = "gate-silent"      // the door opens, and nobody speaks
	CodeGateOther    = "gate-other"       // somebody else speaks
	CodeGateDates    = "gate-certificate" // the gate's certificate has ended
	CodeRefused      = "refused"          // the gate refuses for another reason, which the text says
	CodeExpired      = "certificate-expired"
	CodeEndsSoon     = "certificate-ends-soon"
	CodeNotYet       = "certificate-not-yet-valid"
	CodeRevoked      = "certificate-revoked"
	CodeClock        = "clock-off"
	CodeUDP          = "udp-blocked"
	CodeNoData       = "no-data"         // the tunnel is up, and nothing comes through
	CodeTunnel       = "tunnel"          // its process has a problem, which the text says
	CodeProxyRefused = "proxy-refused"   // the proxy refuses a destination, and says why
	CodeUnreachable  = "unreachable"     // the proxy lets it pass, and the destination does not answer as it should
	CodeEgress       = "egress-other"    // the cloud sees another address than the profile promises
	CodeEgressUnseen = "egress-unknown"  // it could not be asked
	CodeBypass       = "proxy-bypass"    // programs of this shell use another proxy
	CodeLeak         = "no-proxy-leak"   // NO_PROXY sends AWS's names past the proxy
	CodeVariables    = "proxy-variables" // they contradict each other
	CodeKeys         = "plain-keys"      // AWS keys in plain text
)

// Report is all that was found.
type Report struct {
	Profile  string    `json:"profile"`
	Healthy  bool      `json:"healthy"` // no problem; there may be warnings
	Offset   *float64  `json:"clock_offset_seconds,omitempty"`
	Findings []Finding `json:"findings"`
}

func (d *Doctor) found(status, step, code, text, fix string) {
	f := Finding{status, step, code, text, fix}
	if status == Well {
		f.Code = ""
	}
	d.report.Findings = append(d.report.Findings, f)
	if d.Found != nil {
		d.Found(f)
	}
}

func (d *Doctor) well(step, format string, a ...any) {
	d.found(Well, step, "", fmt.Sprintf(format, a...), "")
}

// Examine looks at everything that can be looked at.
func (d *Doctor) Examine(ctx context.Context) Report {
	d.report = Report{Profile: d.Profile.Name(), Healthy: true}
	tokens := d.state()
	d.way(ctx, tokens)
	d.inside(ctx)
	for _, f := range append(environment(d.Environ, d.proxies...), plainKeys(d.Environ)...) {
		d.found(f.Status, f.Step, f.Code, f.Text, f.Fix)
	}
	for _, f := range d.report.Findings {
		d.report.Healthy = d.report.Healthy && f.Status != Problem
	}
	return d.report
}

// state tries the directory that remembers spent tokens. Nil tokens: it cannot.
func (d *Doctor) state() *Tokens {
	dir, err := makeDir()
	if err == nil {
		err = tryWrite(dir)
	}
	var tokens *Tokens
	if err == nil {
		tokens, err = NewTokens(d.Profile)
	}
	if err != nil {
		d.found(Problem, "state", CodeState, "token knocks, renewals and the tunnel's process cannot keep their state: "+unwritable(err).Error(), "")
		return nil
	}
	d.well("state", "%s can be written", dir)
	return tokens
}

// tryWrite fails where the disk is full: an empty file would still fit.
func tryWrite(dir string) error {
	f, err := os.CreateTemp(dir, ".try-*")
	if err != nil {
		return err
	}
	if _, err = f.Write(make([]byte, 4096)); err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close(), os.Remove(f.Name()))
}
