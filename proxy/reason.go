package proxy

import "net/http"

// Reason is why a request was decided as it was, or why a tunnel ended. Reasons are stable: the log, the reply, metrics
// and `perimeterd why` show them.
type Reason string

// Reasons of decisions.
const (
	Allowed        Reason = "allowed"         // a rule allows it
	NoRule         Reason = "no-rule"         // nothing allows it
	DeniedByRule   Reason = "denied-by-rule"  // a deny rule names it
	TLSRequired    Reason = "tls-required"    // allowed, but only as TLS in a tunnel
	NoSession      Reason = "no-session"      // the source address has no live session, or another one than at accept
	TooMany        Reason = "too-many"        // the user's connections are used up
	Full           Reason = "full"            // everybody's are
	Malformed      Reason = "malformed"       // the request is not well-formed, or is ambiguous
	BadDestination Reason = "bad-destination" // the destination is not in the one form that is understood
	BadScheme      Reason = "bad-scheme"      // a URL of another scheme than http
	HeadTooLarge   Reason = "head-too-large"  // more than 16 KiB
	HeadTimeout    Reason = "head-timeout"    // 10 s passed without a whole request
)

// Reasons to refuse an address, whatever a rule says. Those of the first group stand even against allow_private.
const (
	OwnAddress  Reason = "own-address"
	Loopback    Reason = "loopback"
	Metadata    Reason = "metadata" // link-local or a cloud's instance metadata
	Unspecified Reason = "unspecified"
	Multicast   Reason = "multicast"

	Private  Reason = "private"
	Shared   Reason = "shared" // 100.64.0.0/10
	Reserved Reason = "reserved"
	IPv6Off  Reason = "ipv6-off"
)

// Reasons of failure on the way to an allowed destination.
const (
	DNSNotFound    Reason = "dns-not-found"
	DNSFailed      Reason = "dns-failed"
	DNSTimeout     Reason = "dns-timeout"
	ConnectTimeout Reason = "connect-timeout"
	ConnectRefused Reason = "connect-refused"
	ConnectFailed  Reason = "connect-failed"
	UpstreamFailed Reason = "upstream-failed" // plain HTTP: the server's answer is broken or missing
)

// Reasons to reset a tunnel by its first bytes.
const (
	NotTLS      Reason = "not-tls"      // no ClientHello
	SNIMismatch Reason = "sni-mismatch" // a ClientHello for another name
	SNIMissing  Reason = "sni-missing"
	SNITimeout  Reason = "sni-timeout" // no whole ClientHello in 10 s
)

// Reasons for a connection's end. A session's end has its own (session.Reason), which is used as it is.
const (
	Closed        Reason = "closed" // both sides have finished
	ClientReset   Reason = "client-reset"
	ServerReset   Reason = "server-reset"
	Idle          Reason = "idle"
	Lifetime      Reason = "lifetime"
	PolicyChanged Reason = "policy-changed"
	Shutdown      Reason = "shutdown"
	HandedOver    Reason = "handed-over" // to the next process, which writes the line of its end
)

// Status is the HTTP status that belongs to a refusal. Never 407: there is no password to give.
func (r Reason) Status() int {
	switch r {
	case Malformed, BadDestination:
		return http.StatusBadRequest
	case HeadTimeout:
		return http.StatusRequestTimeout
	case HeadTooLarge:
		return http.StatusRequestHeaderFieldsTooLarge
	case TooMany:
		return http.StatusTooManyRequests
	case Full:
		return http.StatusServiceUnavailable
	case DNSTimeout, ConnectTimeout:
		return http.StatusGatewayTimeout
	case DNSNotFound, DNSFailed, ConnectRefused, ConnectFailed, UpstreamFailed:
		return http.StatusBadGateway
	}
	return http.StatusForbidden
}

// Sentence says a refusal to a person.
func (r Reason) Sentence() string {
	switch r {
	case NoRule:
		return "No rule allows you this destination. Ask the operator to add it."
	case DeniedByRule:
		return "A rule denies this destination. Ask the operator for an exception if it is your own."
	case TLSRequired:
		return "This destination is allowed only over TLS. Use https."
	case NoSession:
		return "Your address has no live session. Bring the tunnel up again."
	case TooMany:
		return "You have too many connections open. Close some, then try again."
	case Full:
		return "The proxy has as many connections open as it may. Try again in a moment."
	case Malformed:
		return "The request is not well-formed."
	case BadDestination:
		return "The destination is not well-formed. Write a name or an address, and a port."
	case BadScheme:
		return "Only http URLs can be asked for directly. For https, use CONNECT."
	case HeadTooLarge:
		return "The request's head is larger than 16 KiB."
	case HeadTimeout:
		return "The request did not arrive in time."
	case OwnAddress, Loopback, Metadata, Unspecified, Multicast:
		return "This destination is never reachable through the proxy."
	case Private, Shared, Reserved:
		return "This destination is a private or reserved address. The operator can allow it with proxy.allow_private."
	case IPv6Off:
		return "The proxy leaves over IPv4 only."
	case DNSNotFound:
		return "The name does not exist, or has no address of a kind that is dialed here."
	case DNSFailed:
		return "The name could not be resolved."
	case DNSTimeout:
		return "The name server did not answer in time."
	case ConnectTimeout:
		return "The destination did not answer in time."
	case ConnectRefused:
		return "The destination refused the connection."
	case ConnectFailed:
		return "The destination could not be reached."
	case UpstreamFailed:
		return "The destination gave no proper answer."
	}
	return "The connection was refused."
}
