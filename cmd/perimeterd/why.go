package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"perimeterd/configs"
	"perimeterd/internal/audit"
	"perimeterd/internal/control"
	"perimeterd/internal/identity"
	"perimeterd/internal/session"
	"perimeterd/proxy"
)

// shown is how many refusals why shows of a user or a session.
const shown = 10

func newWhyCommand() *cobra.Command {
	since := "30d"
	cmd := &cobra.Command{
		Use:   "why USER|SESSION|REFUSAL",
		Short: "Explain refusals: a user's last ones, those of a session and its end, or one by its id",
		Long: `Examples:
  perimeterd why alice              how alice stands, and what she was refused last, or failed
  perimeterd why 5f3a...            a session: when, from where, why it ended
  perimeterd why KIKGRA74PM         one refusal: the proxy's answer and the log name it so

It reads the audit, so it also knows what was before the daemon's last start. A knock that opens nothing is nobody's:
perimeterd watch IP shows those of an address as they arrive.`,
		Args: oneArgument("user, session or refusal", "alice"),
		RunE: func(cmd *cobra.Command, args []string) error {
			from, err := parseMoment("--since", since, time.Now())
			if err != nil {
				return err
			}
			p, err := findPaths(cmd)
			if err != nil {
				return err
			}
			files, err := auditFiles(cmd.Context(), p)
			if err != nil {
				return err
			}
			y := &why{ctx: cmd.Context(), paths: p, files: files, since: from}
			err = y.explain(args[0])
			if _, e := io.WriteString(cmd.OutOrStdout(), y.text.String()); err == nil {
				err = e
			}
			return err
		},
	}
	cmd.Flags().StringVar(&since, "since", since, "how far back a user's refusals are looked for")
	return cmd
}

// why collects an explanation.
type why struct {
	ctx   context.Context
	paths configs.Paths
	files fs.FS
	since time.Time
	text  strings.Builder
}

// refusalForm is how the proxy and the gate name refusals.
var refusalForm = regexp.MustCompile(`^[A-Z2-7]{10}$`)

func (y *why) explain(what string) error {
	if id, err := session.ParseID(what); err == nil {
		return y.session(id)
	}
	if refusalForm.MatchString(what) {
		if found, err := y.refusal(what); found || err != nil {
			return err
		}
	}
	return y.user(what)
}

func (y *why) say(format string, a ...any) { fmt.Fprintf(&y.text, format+"\n", a...) }

// refusal explains one record by its id.
func (y *why) refusal(id string) (found bool, err error) {
	var r audit.Record
	err = audit.Backward(y.files, audit.Filter{ID: id}, func(of *audit.Record) { r, found = *of, true }, func() bool { return found })
	if err != nil || !found {
		return false, err
	}
	y.say("%s  %s", moment(r.Time), outcome(&r))
	if r.User != "" {
		who := "user " + r.User
		if r.Device != "" {
			who += ", device " + r.Device
		}
		if r.Kind == audit.CertificateRefused {
			who += ", as the certificate claims"
		}
		y.say("  %s", who)
	}
	from := "from " + r.Source
	if r.Session != "" {
		from += ", session " + r.Session
	}
	y.say("  %s", from)
	if text := wayOut(&r); text != "" {
		y.say("  %s", text)
	}
	if r.Detail != "" {
		y.say("  %s", r.Detail)
	}
	if r.Kind == audit.ProxyRefused && r.User != "" && proxyDecides(proxy.Reason(r.Reason)) {
		y.say("  `perimeterd decide %s %s` says how it stands now", r.User, r.Destination)
	}
	return true, nil
}

// proxyDecides tells reasons that come from the configuration.
func proxyDecides(r proxy.Reason) bool {
	return slices.Contains([]proxy.Reason{proxy.NoRule, proxy.DeniedByRule, proxy.TLSRequired, proxy.Private, proxy.Shared, proxy.Reserved, proxy.IPv6Off}, r)
}

// outcome is a refusal, or what became of a connection, in one line.
func outcome(r *audit.Record) string {
	what := r.Destination
	if r.Method != "" {
		what = r.Method + " " + what
	}
	rule := ""
	if r.Rule > 0 {
		rule = fmt.Sprintf(" (proxy.rule %d)", r.Rule)
	}
	switch r.Kind {
	case audit.HandshakeFailed:
		return "at the gate, the TLS handshake failed"
	case audit.CertificateRefused:
		return "at the gate, the certificate was refused: " + r.Reason
	case audit.RequestRefused:
		return fmt.Sprintf("at the gate, %s was refused: %s", what, r.Reason)
	case audit.ProxyRefused:
		return fmt.Sprintf("at the proxy, %s was refused: %s%s", strings.TrimSpace(what), r.Reason, rule)
	case audit.Connection:
		text := fmt.Sprintf("at the proxy, %s was let through: %s%s", what, r.Reason, rule)
		if r.Dialed == "" {
			text = fmt.Sprintf("at the proxy, %s was allowed%s, and failed: %s", what, rule, r.Reason)
		}
		if r.End != "" {
			text += fmt.Sprintf("; after %v it ended: %s", (time.Duration(r.DurationMS) * time.Millisecond).Round(time.Second), r.End)
		}
		return text
	}
	return string(r.Kind)
}

// wayOut is what a person can do about a record.
func wayOut(r *audit.Record) string {
	switch r.Kind {
	case audit.ProxyRefused:
		return proxy.Reason(r.Reason).Sentence()
	case audit.Connection:
		if r.Reason != string(proxy.Allowed) {
			return proxy.Reason(r.Reason).Sentence()
		}
	case audit.HandshakeFailed:
		return "A client without a certificate of this gate's authority, or no TLS client at all. A new profile helps: `perimeterd user add`."
	}
	return ""
}

var refusals = []audit.Kind{audit.CertificateRefused, audit.RequestRefused, audit.ProxyRefused}

// session explains a session.
func (y *why) session(id session.ID) error {
	var began, ended, kicked *audit.Record
	var connections int
	var up, down int64
	var refused latest
	count := 0
	err := audit.Backward(y.files, audit.Filter{Session: id.String()}, func(r *audit.Record) {
		of := *r
		count++
		switch r.Kind {
		case audit.SessionBegan:
			began = &of
		case audit.SessionEnded:
			ended = &of
		case audit.Operator:
			kicked = &of
		case audit.Connection:
			connections, up, down = connections+1, up+r.Up, down+r.Down
		case audit.ProxyRefused, audit.RequestRefused:
			refused.add(of)
		}
	}, func() bool { return began != nil })
	if err != nil {
		return err
	}
	if count == 0 {
		return fmt.Errorf("session %v: the audit has no record of it: it is older than log.audit_keep, or of another bastion", id)
	}
	of := began
	if of == nil {
		of = ended
	}
	if of != nil {
		device := ""
		if of.Device != "" {
			device = ", device " + of.Device
		}
		y.say("session %v of %s%s", id, of.User, device)
	} else {
		y.say("session %v", id)
	}
	if began != nil {
		y.say("  began  %s from %s, with the tunnel address %s, until %s at most", moment(began.Time), began.Source, began.Address, moment(began.Expires))
	} else {
		y.say("  its beginning is not in the audit any more")
	}
	switch live, known := y.live(id.String()); {
	case ended != nil:
		y.say("  ended  %s after %v: %s: %s", moment(ended.Time), (time.Duration(ended.DurationMS) * time.Millisecond).Round(time.Second), ended.Reason, endSentence(ended.Reason))
		if kicked != nil {
			y.say("         by %s", kicked.By)
		}
	case live:
		y.say("  it lives")
	case began != nil && time.Now().After(began.Expires):
		y.say("  its time was over at %s, while no daemon ran to record it", moment(began.Expires))
	case known:
		y.say("  it does not live, and its end was not recorded: `perimeterd audit query --kind records-lost --kind daemon-started` may say why")
	default:
		y.say("  no end is recorded; the daemon is not running, and takes it up again when it starts")
	}
	y.say("  connections through the proxy: %d, %s up, %s down; refused: %d", connections, size(up), size(down), refused.count)
	y.list(&refused)
	return nil
}

// live asks the daemon whether a session lives; known is whether it answered.
func (y *why) live(id string) (live, known bool) {
	all, err := control.NewClient(y.paths.ControlSocket()).Sessions(y.ctx)
	return slices.ContainsFunc(all, func(s control.Session) bool { return s.ID.String() == id }), err == nil
}

func endSentence(reason string) string {
	switch session.Reason(reason) {
	case session.Deleted:
		return "its owner ended it"
	case session.Expired:
		return "its time was over, by session.max or the certificate's end"
	case session.Replaced:
		return "the same certificate began more sessions than session.devices"
	case session.Revoked:
		return "the user, the device or the certificate was revoked, or is not let in any more"
	case session.Kicked:
		return "an operator ended it; the user may begin another"
	case session.Changed:
		return "the user's groups or settings changed; the next session has the new ones"
	}
	return "a reason that this version does not know"
}

// user explains how a user stands.
func (y *why) user(name string) error {
	known, err := y.standing(name)
	if err != nil {
		y.say("%s: %v", name, err)
	}
	var refused latest
	var ended audit.Record
	if err := audit.Backward(y.files, audit.Filter{User: name, Since: y.since, Kinds: append(refusals, audit.SessionEnded, audit.Connection)}, func(r *audit.Record) {
		switch {
		case r.Kind == audit.Connection && (r.Dialed != "" || r.Reason == string(proxy.Allowed)): // it went well
		case r.Kind != audit.SessionEnded:
			refused.add(*r)
		case r.Seq > ended.Seq:
			ended = *r
		}
	}, func() bool { return refused.count >= shown }); err != nil {
		return err
	}
	if !known && refused.count == 0 && ended.Seq == 0 {
		return fmt.Errorf("%q is no user, session or refusal that is known here: `perimeterd user list` and `perimeterd sessions` list them", name)
	}
	if ended.Seq > 0 {
		y.say("  session %s: ended at %s: %s: %s", ended.Session, moment(ended.Time), ended.Reason, endSentence(ended.Reason))
	}
	if refused.count == 0 {
		y.say("  nothing was refused, and nothing failed, since %s", moment(y.since))
		return nil
	}
	y.say("  refused or failed last:")
	y.list(&refused)
	return nil
}

// latest keeps the newest records of those added, and counts all.
type latest struct {
	count int
	list  []audit.Record // newest first
}

func (l *latest) add(r audit.Record) {
	l.count++
	i, _ := slices.BinarySearchFunc(l.list, r.Seq, func(a audit.Record, seq uint64) int { return cmp.Compare(seq, a.Seq) })
	l.list = slices.Insert(l.list, i, r)
	l.list = l.list[:min(len(l.list), shown)]
}

// standing says what the users and the live sessions have of a name.
func (y *why) standing(name string) (known bool, err error) {
	err = withUsers(y.ctx, y.paths, func(us users) error {
		all, err := us.ListUsers(y.ctx)
		if err != nil {
			return err
		}
		i := slices.IndexFunc(all, func(u identity.User) bool { return u.Name == name })
		if known = i >= 0; !known {
			y.say("%s: not among the users", name)
			return nil
		}
		u, state := all[i], "active"
		if !u.Active() {
			state = "revoked at " + moment(u.Revoked)
		}
		groups := "in no group"
		if len(u.Groups) > 0 {
			groups = "in " + strings.Join(u.Groups, ", ")
		}
		y.say("%s: %s, %s", name, state, groups)
		for _, d := range u.Devices {
			switch {
			case !d.Revoked.IsZero():
				y.say("  device %s: revoked at %s", d.Name, moment(d.Revoked))
			case !d.Active(time.Now()):
				y.say("  device %s: its certificate expired at %s: `perimeterd user add %s --device %s` makes a new one", d.Name, moment(d.NotAfter), name, d.Name)
			default:
				y.say("  device %s: good until %s", d.Name, moment(d.NotAfter))
			}
		}
		return nil
	})
	sessions, e := control.NewClient(y.paths.ControlSocket()).Sessions(y.ctx)
	for _, s := range sessions {
		if s.User == name {
			known = true
			y.say("  session %v: inside since %s, from %v, with the tunnel address %v", s.ID, moment(s.Created), s.Outer, s.Address)
		}
	}
	if errors.Is(e, control.ErrNotRunning) {
		y.say("  the daemon is not running: nobody new comes in")
	}
	return known, err
}

// list prints refusals, the newest first.
func (y *why) list(refused *latest) {
	for i := range refused.list {
		r := &refused.list[i]
		text := wayOut(r)
		if text == "" {
			text = r.Detail
		}
		y.say("    %s  %s  %s", moment(r.Time), r.ID, outcome(r))
		y.say("%s%s", strings.Repeat(" ", 4+len(time.DateTime)+2+10+2), text)
	}
	if more := refused.count - len(refused.list); more > 0 {
		y.say("    and %d more: `perimeterd audit query` has them", more)
	}
}

func moment(t time.Time) string { return t.Local().Format(time.DateTime) }

// size is a number of bytes for people.
func size(n int64) string {
	const unit = 1000
	if n < unit {
		return fmt.Sprintf("%d B", n)
	}
	f, i := float64(n)/unit, 0
	for ; f >= unit; i++ {
		f /= unit
	}
	return fmt.Sprintf("%.1f %cB", f, "kMGTPE"[i])
}
