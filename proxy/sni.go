package proxy

import (
	"errors"
	"strings"

	"golang.org/x/crypto/cryptobyte"
)

// maxHello bounds a ClientHello, bytes. The largest in use, with two post-quantum key shares and a ticket, is a fifth.
const maxHello = 16 << 10

var (
	errMore     = errors.New("the ClientHello goes on")
	errNotTLS   = errors.New("not a TLS ClientHello")
	errHelloBig = errors.New("the ClientHello is too large")
)

// serverName reads the SNI from the first bytes of a TLS connection: "" when the ClientHello has none, errMore when it is
// not whole yet. It may be split over any number of records. Of an encrypted ClientHello the outer name is what is seen.
func serverName(b []byte) (string, error) {
	var hello []byte
	for s := cryptobyte.String(b); ; {
		var kind uint8
		var version, length uint16
		r := s
		switch {
		case len(s) > 0 && s[0] != 22 || len(s) > 1 && s[1] != 3: // a handshake record, of any version there has been
			return "", errNotTLS
		case !r.ReadUint8(&kind) || !r.ReadUint16(&version) || !r.ReadUint16(&length):
			return "", errMore
		case length == 0 || length > 1<<14:
			return "", errNotTLS
		}
		part := r[:min(len(r), int(length))]
		if hello == nil {
			hello = part[:len(part):len(part)] // nearly always the whole
		} else {
			hello = append(hello, part...)
		}
		s = r[len(part):]
		if len(hello) > 0 && hello[0] != 1 {
			return "", errNotTLS
		}
		if len(hello) >= 4 {
			n := int(hello[1])<<16 | int(hello[2])<<8 | int(hello[3])
			if n > maxHello {
				return "", errHelloBig
			}
			if len(hello) > 4+n {
				return "", errNotTLS // nothing may follow before the server has spoken, but early data, which is no handshake
			}
			if len(hello) == 4+n && len(part) == int(length) {
				return helloServerName(hello[4:])
			}
		}
		if len(part) < int(length) {
			return "", errMore
		}
	}
}

// helloServerName reads the body of a ClientHello (RFC 8446, 4.1.2; RFC 6066, 3).
func helloServerName(b []byte) (string, error) {
	s := cryptobyte.String(b)
	var id, suites, methods, extensions cryptobyte.String
	if !s.Skip(2+32) || !s.ReadUint8LengthPrefixed(&id) || !s.ReadUint16LengthPrefixed(&suites) ||
		!s.ReadUint8LengthPrefixed(&methods) {
		return "", errNotTLS
	}
	if s.Empty() { // extensions came with TLS 1.2
		return "", nil
	}
	if !s.ReadUint16LengthPrefixed(&extensions) || !s.Empty() {
		return "", errNotTLS
	}
	name := ""
	seen := map[uint16]bool{}
	for !extensions.Empty() {
		var kind uint16
		var body cryptobyte.String
		if !extensions.ReadUint16(&kind) || !extensions.ReadUint16LengthPrefixed(&body) || seen[kind] {
			return "", errNotTLS
		}
		seen[kind] = true
		if kind != 0 {
			continue
		}
		var list, host cryptobyte.String
		var nameType uint8
		// One name of the one type there is: servers differ on which of several they take.
		if !body.ReadUint16LengthPrefixed(&list) || !body.Empty() || !list.ReadUint8(&nameType) || nameType != 0 ||
			!list.ReadUint16LengthPrefixed(&host) || host.Empty() || !list.Empty() {
			return "", errNotTLS
		}
		name = string(host)
	}
	return name, nil
}

// checkName compares a ClientHello's SNI with the destination. "" means that they agree. An address has no SNI.
func checkName(sni string, to Destination) Reason {
	switch {
	case to.Addr.IsValid() && sni == "":
		return ""
	case to.Addr.IsValid():
		return SNIMismatch
	case sni == "":
		return SNIMissing
	case strings.ToLower(sni) != to.Name: // both ASCII: a canonical name has nothing else
		return SNIMismatch
	}
	return ""
}
