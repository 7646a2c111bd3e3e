package audit

import (
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// Kind is what a record is about. Kinds are stable.
type Kind string

// Kinds of records. Those of knocks have the names that internal/event gives them.
const (
	WindowOpened  Kind = "window-opened"
	TokenRefused  Kind = "token-refused"
	TokenReplayed Kind = "token-replayed"
	SequenceReset Kind = "sequence-reset"
	WindowsFull   Kind = "windows-full"

	HandshakeFailed    Kind = "handshake-failed"    // no TLS, or a certificate of nobody's authority
	CertificateRefused Kind = "certificate-refused" // in the TLS handshake; the user is what the certificate claims
	RequestRefused     Kind = "request-refused"     // by the session API
	CertificateRenewed Kind = "certificate-renewed"
	SessionBegan       Kind = "session-began"
	SessionEnded       Kind = "session-ended"
	Connection         Kind = "connection"    // through the proxy, written at its end
	ProxyRefused       Kind = "proxy-refused" // the proxy's answer was no

	Operator      Kind = "operator"      // an act on the control socket, or on the state of a stopped daemon
	Configuration Kind = "configuration" // another one was taken up, or not, without an operator's command: SIGHUP, the end of a trial
	DaemonStarted Kind = "daemon-started"
	DaemonStopped Kind = "daemon-stopped"

	// The chain's own.
	FileBegan    Kind = "file-began"
	FilesExpired Kind = "files-expired"
	RecordsLost  Kind = "records-lost"
	LeftOut      Kind = "left-out" // strangers, or refusals to one, caused more than is written
)

// Kinds lists them all.
func Kinds() []Kind {
	return []Kind{WindowOpened, TokenRefused, TokenReplayed, SequenceReset, WindowsFull, HandshakeFailed, CertificateRefused, RequestRefused,
		CertificateRenewed, SessionBegan, SessionEnded, Connection, ProxyRefused, Operator, Configuration, DaemonStarted, DaemonStopped, FileBegan, FilesExpired, RecordsLost, LeftOut}
}

// Record is one thing that happened. Fields that do not apply are empty. Texts of outsiders are made harmless by Add.
type Record struct {
	Seq  uint64    `json:"seq,omitempty"` // in the chain; 0 before it is in it
	Time time.Time `json:"time"`
	Kind Kind      `json:"kind"`

	ID      string `json:"id,omitempty"` // of a request, for `perimeterd why`
	User    string `json:"user,omitempty"`
	Device  string `json:"device,omitempty"`
	Session string `json:"session,omitempty"`
	Source  string `json:"source,omitempty"`  // ADDRESS or ADDRESS:PORT
	Address string `json:"address,omitempty"` // of the tunnel

	Method      string `json:"method,omitempty"`
	Destination string `json:"destination,omitempty"` // what was asked for: HOST:PORT at the proxy, a path at the gate
	Decision    string `json:"decision,omitempty"`    // allow, observe or deny; of an operator's act: done or failed
	Reason      string `json:"reason,omitempty"`      // stable
	Rule        int    `json:"rule,omitempty"`        // of [[proxy.rule]], from 1
	Status      int    `json:"status,omitempty"`      // HTTP
	Dialed      string `json:"dialed,omitempty"`
	Up          int64  `json:"up,omitempty"` // bytes to the destination
	Down        int64  `json:"down,omitempty"`
	DurationMS  int64  `json:"duration_ms,omitempty"`
	End         string `json:"end,omitempty"` // why a connection ended

	Action   string    `json:"action,omitempty"` // of an operator
	By       string    `json:"by,omitempty"`     // who that was: the name and number of his account on this host
	Sequence bool      `json:"sequence,omitempty"`
	Expires  time.Time `json:"expires,omitzero"`
	Detail   string    `json:"detail,omitempty"` // for people

	Count   uint64    `json:"count,omitempty"` // records that are not there: lost, or left out since the last that tells
	Since   time.Time `json:"since,omitzero"`  // when the first of them would have been written
	Through uint64    `json:"through,omitempty"`
	Prev    string    `json:"prev,omitempty"`
	Torn    []Torn    `json:"torn,omitempty"`
}

// Torn is the end of a file that a crash left.
type Torn struct {
	File   string `json:"file"`
	Bytes  int64  `json:"bytes"`
	SHA256 string `json:"sha256"`
}

// urgent records are on the disk before the next one is looked at.
func (r *Record) urgent() bool {
	switch r.Kind {
	case Operator, Configuration, DaemonStarted, DaemonStopped:
		return true
	case SessionEnded:
		return r.Reason == "revoked" || r.Reason == "kicked" || r.Reason == "changed"
	}
	return false
}

// maxText bounds a text of a record, bytes.
const maxText = 512

// clean makes every text one that is short and shows as what it is wherever it is printed.
func (r *Record) clean() {
	for _, s := range []*string{&r.ID, &r.User, &r.Device, &r.Session, &r.Source, &r.Address, &r.Method, &r.Destination, &r.Decision, &r.Reason,
		&r.Dialed, &r.End, &r.Action, &r.By, &r.Detail} {
		*s = clean(*s)
	}
}

func clean(s string) string {
	s = cut(s)
	if !utf8.ValidString(s) || strings.ContainsFunc(s, func(c rune) bool { return !unicode.IsPrint(c) }) {
		s = cut(strconv.Quote(s))
	}
	return s
}

func cut(s string) string {
	if len(s) <= maxText {
		return s
	}
	end := maxText - len("…")
	for end > 0 && !utf8.RuneStart(s[end]) {
		end--
	}
	return s[:end] + "…"
}
