package audit

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Text is a record in one line for people, in local time.
func (r *Record) Text() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s  %-19s", r.Time.Local().Format(time.DateTime), r.Kind)
	for i, value := range r.Row() {
		switch name := columns[i]; {
		case value == "", name == "time", name == "kind", name == "seq":
		case name == "user":
			fmt.Fprintf(&b, " %s", value)
		case strings.ContainsAny(value, " \"="):
			fmt.Fprintf(&b, " %s=%s", name, strconv.Quote(value))
		default:
			fmt.Fprintf(&b, " %s=%s", name, value)
		}
	}
	return strings.TrimRight(b.String(), " ")
}

var columns = []string{"seq", "time", "kind", "user", "device", "source", "session", "address", "action", "by", "method", "destination", "decision", "reason",
	"rule", "status", "dialed", "up", "down", "duration_ms", "end", "id", "sequence", "expires", "count", "since", "through", "detail"}

// Columns names what Row has: the fields of the JSON form but those that only Verify needs.
func Columns() []string { return append([]string{}, columns...) }

// Row is a record as a table has it. What does not apply is empty.
func (r *Record) Row() []string {
	moment := func(t time.Time) string {
		if t.IsZero() {
			return ""
		}
		return t.UTC().Format(time.RFC3339Nano)
	}
	count := func(n uint64) string {
		if n == 0 {
			return ""
		}
		return strconv.FormatUint(n, 10)
	}
	sequence := ""
	if r.Sequence {
		sequence = "true"
	}
	return []string{count(r.Seq), moment(r.Time), string(r.Kind), r.User, r.Device, r.Source, r.Session, r.Address, r.Action, r.By, r.Method, r.Destination,
		r.Decision, r.Reason, count(uint64(r.Rule)), count(uint64(r.Status)), r.Dialed, count(uint64(r.Up)), count(uint64(r.Down)), count(uint64(r.DurationMS)),
		r.End, r.ID, sequence, moment(r.Expires), count(r.Count), moment(r.Since), count(r.Through), r.Detail}
}
