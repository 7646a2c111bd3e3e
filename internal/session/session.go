// Package session holds who is inside: the sessions, the events that begin and end them, and the one store through which
// both pass. Everything downstream (tunnel peers, admitted addresses, proxied connections) acts on events from here and on
// nothing else, so that revocation, expiry, restart and other nodes all enter at the same top.
package session

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"net/netip"
	"time"
)

// A Key is a WireGuard key, public or preshared (Curve25519 point or 256 random bits).
type Key [32]byte

// ID names a session: 128 random bits, so that no session can be guessed.
type ID [16]byte

// NewID draws a random ID.
func NewID() (id ID) {
	rand.Read(id[:]) // never fails since Go 1.24
	return id
}

// ParseID reads what ID.String wrote.
func ParseID(s string) (id ID, err error) {
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != len(id) {
		return ID{}, errors.New("session id: want 32 hexadecimal digits")
	}
	return ID(b), nil
}

func (id ID) String() string { return hex.EncodeToString(id[:]) }

// MarshalText writes the ID as hexadecimal.
func (id ID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

// UnmarshalText is the inverse of MarshalText.
func (id *ID) UnmarshalText(b []byte) (err error) { *id, err = ParseID(string(b)); return err }

// Session is one tunnel of one certificate. It is a value: a copy is a snapshot, changed only through the store.
type Session struct {
	ID           ID
	User         string     // common name of the certificate
	Device       string     // device of the certificate, else the one the client named; may be empty
	Groups       []string   // the user's groups when the session began
	Credential   uint32     // the user's stable number in kernel maps
	Certificate  [32]byte   // SHA-256 of the public key (SubjectPublicKeyInfo) of the certificate, or of the first one where it was renewed
	Chain        [][]byte   // the certificate and what led to its authority, DER: whether it would be let in now can be asked
	PublicKey    Key        // of the client
	PresharedKey Key        // secret: never logged, never listed
	Address      netip.Addr // tunnel address, unique among live sessions
	Outer        netip.Addr // where the request came from
	Created      time.Time
	Expires      time.Time
	KeyExchange  string // of the TLS connection that the preshared key travelled in, as crypto/tls names it
	PostQuantum  bool   // whether that withstands a quantum computer
	Seen         Seen   // as last noted; zero: its client has not proven its key yet
}

// Seen is where a session's client was when it last completed a handshake.
type Seen struct {
	Endpoint  netip.AddrPort // outer, UDP
	Handshake time.Time
	Stamp     [12]byte // of the latest handshake initiation from it, TAI64N: one that is no later is a replay
}

// Reason says why a session ended.
type Reason string

// Reasons are stable: logs, metrics and the audit show them.
const (
	Deleted  Reason = "deleted"  // by its owner
	Expired  Reason = "expired"  // Expires passed
	Replaced Reason = "replaced" // the certificate opened more than session.devices
	Revoked  Reason = "revoked"  // user, device or certificate revoked, or not let in any more
	Kicked   Reason = "kicked"   // by an operator
	Changed  Reason = "changed"  // the user's groups or settings did: his next session has the new ones
)

// Release is an address that a session gave back by ending.
type Release struct {
	Address      netip.Addr
	User, Device string        // who had it last
	Ago          time.Duration // at least: neither a restart nor the wall clock makes it more
}

// KeyMemory is how long the key of an ended session is refused. Recorded handshake initiations of it must be worth nothing
// by then: who takes initiations refuses those that are InitiationAge old.
const (
	KeyMemory     = 30 * 24 * time.Hour
	InitiationAge = 20 * 24 * time.Hour
)

// Event is a change of the set of live sessions. Ended is empty when the session begins.
type Event struct {
	Session Session
	Ended   Reason
}

var (
	// ErrNotFound is returned for an id that names no live session.
	ErrNotFound = errors.New("no such session")
	// ErrKeyBound is returned when a public key was used by another certificate before: a key belongs to one, and for
	// KeyMemory after its session's end.
	ErrKeyBound = errors.New("this WireGuard key belongs to another certificate")
	// ErrKeyUsed is returned when a public key had a session that ended. Adding a key again would forget its replay
	// timestamp, and an old recorded handshake would move the endpoint.
	ErrKeyUsed = errors.New("this WireGuard key had a session that ended")
	// ErrAddressTaken is returned when a live session already holds the address.
	ErrAddressTaken = errors.New("this tunnel address is taken by a live session")
)

// Store is the one way in and out. Implementations must pass storetest.
//
// Watchers run in the order of the changes, one at a time, before Put or End returns: when Put returns nil, the tunnel
// knows the peer; when End returns, nothing of the session is left. A watcher must not call Put or End.
type Store interface {
	// Put begins a session, durably. Errors: ErrKeyBound, ErrKeyUsed, ErrAddressTaken, or of the medium.
	Put(Session) error
	// End ends a live session, durably. Errors: ErrNotFound, or of the medium; a session whose end could not be written
	// is ended in memory all the same (closed is the failure mode).
	End(ID, Reason) error
	// Note remembers where clients were seen, so that their tunnels come back after a restart. It is no event, and passes over
	// sessions that ended meanwhile. Errors: of the medium; what was noted is seen by readers all the same.
	Note(map[ID]Seen) error
	// Get, ByAddress, List, Of and Len see live sessions only. They never block on the medium.
	Get(ID) (Session, bool)
	ByAddress(netip.Addr) (Session, bool)
	List() []Session
	Of(certificate [32]byte) []Session // oldest first
	Len() int
	// Released lists the addresses that nobody holds now and somebody did, longest ago first.
	Released() ([]Release, error)
	// Watch calls fn for every live session now, as a begin, then for every event. Several may watch.
	Watch(fn func(Event))
	// Expire ends every session whose Expires is not after now, or whose life as it was at Put has passed, whatever the wall
	// clock says since. It returns when the next one is due by that clock (zero: none).
	Expire(now time.Time) (next time.Time)
}
