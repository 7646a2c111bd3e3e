// Package vpn holds what the gate and its clients share: the types of the session API, the WireGuard bind that carries a
// handshake inside an HTTP request, and the pool of tunnel addresses. It is portable: nothing here needs Linux.
package vpn

import (
	"net/http"
	"net/netip"
	"time"
)

// DefaultPort is the gate's TCP port and the tunnel's and the token knock's UDP port.
const DefaultPort = 1194

// SessionPath is the session API's root. POST begins a session, GET lists the caller's, DELETE SessionPath/ID ends one,
// GET SessionPath/ID/wg-quick prints one as a wg-quick file with the PrivateKey left for the client to fill.
const SessionPath = "/v1/session"

// MaxBody bounds a request's body, bytes.
const MaxBody = 4096

// Lengths of WireGuard messages, bytes (https://www.wireguard.com/papers/wireguard.pdf, 5.4).
const (
	InitiationSize = 148
	ResponseSize   = 92
)

// SessionRequest is the body of POST SessionPath. []byte fields are standard base64 in JSON. Unknown fields are refused.
type SessionRequest struct {
	PublicKey  []byte `json:"public_key"`           // 32 bytes, Curve25519
	Initiation []byte `json:"initiation,omitempty"` // 148 bytes: a WireGuard handshake initiation for the server's static key
	Device     string `json:"device,omitempty"`     // a name that tells the user's devices apart in lists, at most 64 bytes
}

// SessionReply is the answer to POST, and each element of GET's list (there without keys' secrets: PresharedKey and
// Response are empty).
type SessionReply struct {
	ID              string         `json:"id"`
	User            string         `json:"user"`
	Device          string         `json:"device,omitempty"`
	Address         netip.Prefix   `json:"address"`           // the client's, a /32
	ServerPublicKey []byte         `json:"server_public_key"` // 32 bytes
	Endpoint        string         `json:"endpoint"`          // host:port, UDP
	PresharedKey    []byte         `json:"preshared_key,omitempty"`
	Response        []byte         `json:"response,omitempty"` // 92 bytes: the answer to Initiation, if that was valid
	Proxy           netip.AddrPort `json:"proxy"`              // inside the tunnel
	Console         netip.AddrPort `json:"console"`            // inside the tunnel
	MTU             int            `json:"mtu"`
	Keepalive       int            `json:"keepalive"` // seconds
	Expires         time.Time      `json:"expires"`
	PostQuantum     bool           `json:"post_quantum"`
	Streams         bool           `json:"streams,omitempty"` // the gate takes the tunnel's datagrams by TLS: see StreamPath
	Renew           bool           `json:"renew,omitempty"`   // the certificate's authority is on the way out: renew it now
}

// APIError is every refusal's body: {"error": {"code", "message", "fix"}}. Codes are stable; sentences are for people.
type APIError struct {
	Status     int    `json:"-"`
	Code       string `json:"code"`
	Message    string `json:"message"`
	Fix        string `json:"fix,omitempty"`
	RetryAfter int    `json:"-"` // seconds, with 429 and 503
}

func (e *APIError) Error() string {
	if e.Fix == "" {
		return e.Message
	}
	return e.Message + ": " + e.Fix
}

// ErrorReply wraps an APIError as it stands on the wire.
type ErrorReply struct {
	Error *APIError `json:"error"`
}

// Stable codes.
const (
	CodeBadRequest   = "bad_request"   // 400: not JSON, an unknown field, a wrong length
	CodeTooLarge     = "too_large"     // 413
	CodeForbidden    = "forbidden"     // 403: certificate not accepted any more
	CodeRevoked      = "revoked"       // 403
	CodeNotFound     = "not_found"     // 404: no such session of this caller
	CodeMethod       = "method"        // 405
	CodeKeyBound     = "key_bound"     // 409: the key belongs to another certificate, or its session ended
	CodePostQuantum  = "post_quantum"  // 403: require_post_quantum and a classical key exchange
	CodeTooEarly     = "too_early"     // 409: more than a third of the certificate's time is left
	CodeRenewed      = "renewed"       // 409: the certificate was renewed before, with another key
	CodeNotRenewable = "not_renewable" // 403: the signer does not know it, or not any more
	CodeYearOver     = "year_over"     // 403: renewals end a year after the enrolment
	CodeNoSigner     = "no_signer"     // 503: certificates are not renewed here
	CodeNoStream     = "no_stream"     // 503: tunnel.backend = "kernel" has no streams
	CodeLimit        = "session_limit" // 503
	CodePool         = "address_pool"  // 503
	CodeRate         = "rate"          // 429
	CodeInternal     = "internal"      // 500
)

// StatusOf is the HTTP status that belongs to a code.
func StatusOf(code string) int {
	switch code {
	case CodeBadRequest:
		return http.StatusBadRequest
	case CodeTooLarge:
		return http.StatusRequestEntityTooLarge
	case CodeForbidden, CodeRevoked, CodePostQuantum, CodeNotRenewable, CodeYearOver:
		return http.StatusForbidden
	case CodeNotFound:
		return http.StatusNotFound
	case CodeMethod:
		return http.StatusMethodNotAllowed
	case CodeKeyBound, CodeTooEarly, CodeRenewed:
		return http.StatusConflict
	case CodeLimit, CodePool, CodeNoSigner, CodeNoStream:
		return http.StatusServiceUnavailable
	case CodeRate:
		return http.StatusTooManyRequests
	}
	return http.StatusInternalServerError
}
