package identity

import (
	"cmp"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// dn is a distinguished name as a certificate has it, the most general part first. A part is a set of attributes, as a rule
// of one.
type dn [][]attribute

type attribute struct{ oid, value string }

const oidCommonName = "2.5.4.3"

// subjectDN reads a certificate's subject or issuer, DER.
func subjectDN(raw []byte) (d dn, err error) {
	var seq pkix.RDNSequence
	if rest, err := asn1.Unmarshal(raw, &seq); err != nil || len(rest) > 0 {
		return nil, errors.New("its subject is damaged")
	}
	for _, set := range seq {
		var part []attribute
		for _, a := range set {
			value, ok := a.Value.(string)
			if !ok {
				return nil, fmt.Errorf("attribute %v of its subject is no text", a.Type)
			}
			part = append(part, attribute{a.Type.String(), value})
		}
		d = append(d, part)
	}
	return d, nil
}

// nameText is a subject or issuer for people, in the order and with the escapes of RFC 4514; parseDN reads it back.
func nameText(raw []byte) string {
	var seq pkix.RDNSequence
	if _, err := asn1.Unmarshal(raw, &seq); err != nil {
		return "a name that is damaged"
	}
	return seq.String()
}

// key is the same for two names that are equal, and for no others. Values are compared byte by byte, whatever kind of
// ASN.1 string holds them; of a part of several attributes the order says nothing.
func (d dn) key() string {
	var b []byte
	text := func(s string) { b = append(binary.AppendUvarint(b, uint64(len(s))), s...) }
	for _, part := range d {
		b = binary.AppendUvarint(b, uint64(len(part)))
		for _, a := range slices.SortedFunc(slices.Values(part), func(x, y attribute) int {
			return cmp.Or(cmp.Compare(x.oid, y.oid), cmp.Compare(x.value, y.value))
		}) {
			text(a.oid)
			text(a.value)
		}
	}
	return string(b)
}

func (d dn) reversed() dn {
	r := slices.Clone(d)
	slices.Reverse(r)
	return r
}

// commonName is the one common name in d. None, or several, name nobody.
func (d dn) commonName() (string, error) {
	var names []string
	for _, part := range d {
		for _, a := range part {
			if a.oid == oidCommonName {
				names = append(names, a.value)
			}
		}
	}
	if len(names) != 1 {
		return "", fmt.Errorf("its subject has %d common names %q, and one must say who the user is", len(names), names)
	}
	return names[0], nil
}

// parseDN reads one name in any of the forms in which OpenSSL and OpenVPN print it:
//
//	/C=US/O=x/CN=alice         openssl -nameopt compat, OpenVPN before 2.3; the certificate's order
//	C=US, O=x, CN=alice        OpenVPN since 2.3, openssl since 1.1; the certificate's order, but people also write LDAP's
//	CN=alice,O=x,C=US          openssl -nameopt RFC2253, RFC 4514; the last part first
//
// Either is true for the second, where both orders are meant: the caller takes d and its reverse. The first two leave
// separators in values as they are ("O=Foo, Inc., CN=alice"), so one separates only where another attribute follows it.
func parseDN(s string) (d dn, either bool, err error) {
	slash := strings.HasPrefix(s, "/")
	s = strings.TrimPrefix(s, "/")
	spaced := false
	for part := []attribute(nil); ; {
		name, rest, ok := cutType(s)
		if !ok {
			return nil, false, fmt.Errorf("%q is no TYPE=VALUE: write the subject as `openssl x509 -noout -subject` prints it, as in \"CN=alice\"", s)
		}
		oid, err := oidOf(name)
		if err != nil {
			return nil, false, err
		}
		value, end, rest, err := cutValue(rest, slash)
		if err != nil {
			return nil, false, fmt.Errorf("%s: %w", name, err)
		}
		if value == "" || !utf8.ValidString(value) {
			return nil, false, fmt.Errorf("%s has the value %q: want text in UTF-8", name, value)
		}
		part = append(part, attribute{oid, value})
		if end != '+' {
			d, part = append(d, part), nil
		}
		if end == 0 {
			break
		}
		spaced = spaced || end == ',' && rest[0] == ' '
		s = rest
	}
	if !slash && !spaced {
		slices.Reverse(d)
	}
	return d, !slash && spaced, nil
}

// cutType reads "TYPE =".
func cutType(s string) (name, rest string, ok bool) {
	s = strings.TrimLeft(s, " ")
	n := strings.IndexFunc(s, func(r rune) bool {
		return !('a' <= r|0x20 && r|0x20 <= 'z' || '0' <= r && r <= '9' || r == '.' || r == '-')
	})
	if n <= 0 {
		return "", "", false
	}
	rest, ok = strings.CutPrefix(strings.TrimLeft(s[n:], " "), "=")
	return s[:n], rest, ok
}

// cutValue reads a value up to its end and says what ended it: '+', ',' or '/', and 0 for the end of the line.
func cutValue(s string, slash bool) (value string, end byte, rest string, err error) {
	separator := byte(',')
	if slash {
		separator = '/'
	} else {
		s = strings.TrimLeft(s, " ")
		if strings.HasPrefix(s, `"`) {
			return cutQuoted(s[1:])
		}
	}
	var b []byte
	fixed := 0 // of b: spaces up to here were escaped
	i := 0
scan:
	for i < len(s) {
		switch c := s[i]; {
		case c == '\\':
			char, n, err := unescape(s[i:], slash)
			if err != nil {
				return "", 0, "", err
			}
			b = append(b, char)
			i, fixed = i+n, len(b)
			continue
		case c == separator || c == '+':
			if _, _, ok := cutType(s[i+1:]); ok {
				end, rest = c, s[i+1:]
				break scan
			}
			if strings.TrimSpace(s[i+1:]) == "" {
				return "", 0, "", fmt.Errorf("%q is its last character: remove it, or write \\%c if it is meant", c, c)
			}
		case c == '#' && i > 0 && s[i-1] == ' ':
			return "", 0, "", errors.New(`" #" in a value: a comment has a line of its own; write \# if it is meant`)
		}
		b = append(b, s[i])
		i++
	}
	if slash {
		return string(b), end, rest, nil
	}
	for len(b) > fixed && b[len(b)-1] == ' ' {
		b = b[:len(b)-1]
	}
	if len(b) > 0 && b[0] == '#' && s[0] == '#' {
		value, err = decodeHex(string(b[1:]))
		return value, end, rest, err
	}
	return string(b), end, rest, nil
}

// cutQuoted reads what follows an opening quote, as openssl -nameopt oneline writes it.
func cutQuoted(s string) (value string, end byte, rest string, err error) {
	var b []byte
	for i := 0; i < len(s); {
		switch s[i] {
		case '\\':
			char, n, err := unescape(s[i:], false)
			if err != nil {
				return "", 0, "", err
			}
			b = append(b, char)
			i += n
		case '"':
			rest := strings.TrimLeft(s[i+1:], " ")
			if rest == "" {
				return string(b), 0, "", nil
			}
			if _, _, ok := cutType(rest[1:]); ok && (rest[0] == ',' || rest[0] == '+') {
				return string(b), rest[0], rest[1:], nil
			}
			return "", 0, "", fmt.Errorf("%q follows the closing quote, where only another attribute may", rest)
		default:
			b = append(b, s[i])
			i++
		}
	}
	return "", 0, "", errors.New("a quote is opened and not closed")
}

// unescape reads what a backslash at the start of s stands for, and its length. OpenSSL's form with slashes escapes bytes
// as \xC3 and leaves a backslash as it is; the others follow RFC 4514, 3.
func unescape(s string, slash bool) (char byte, n int, err error) {
	digits := 1
	if slash {
		if len(s) > 1 && (s[1] == '/' || s[1] == '+') {
			return s[1], 2, nil
		}
		if len(s) < 4 || s[1] != 'x' {
			return '\\', 1, nil
		}
		digits = 2
	} else if len(s) > 1 && strings.IndexByte(` ,+"\<>;=#/`, s[1]) >= 0 {
		return s[1], 2, nil
	}
	if len(s) >= digits+2 {
		if v, err := strconv.ParseUint(s[digits:digits+2], 16, 8); err == nil {
			return byte(v), digits + 2, nil
		}
	}
	if slash {
		return '\\', 1, nil
	}
	return 0, 0, fmt.Errorf("%q is no escape: write \\\\ for a backslash", s[:min(len(s), 3)])
}

// decodeHex reads a value that is written as its BER encoding (RFC 4514, 2.4).
func decodeHex(s string) (string, error) {
	raw, err := hex.DecodeString(s)
	if err != nil {
		return "", fmt.Errorf(`"#%s": hexadecimal digits follow a "#"; write \# if it is meant`, s)
	}
	var v any
	if rest, err := asn1.Unmarshal(raw, &v); err != nil || len(rest) > 0 {
		return "", fmt.Errorf(`"#%s" encodes no value: write it as text`, s)
	}
	text, ok := v.(string)
	if !ok {
		return "", fmt.Errorf(`"#%s" encodes no text: nobody can be let in by it`, s)
	}
	return text, nil
}

// attributeTypes are the names that OpenSSL, RFC 4514 and Windows print, in lower case.
var attributeTypes = map[string]string{
	"cn": oidCommonName, "commonname": oidCommonName,
	"sn": "2.5.4.4", "surname": "2.5.4.4",
	"serialnumber": "2.5.4.5",
	"c":            "2.5.4.6", "countryname": "2.5.4.6",
	"l": "2.5.4.7", "localityname": "2.5.4.7",
	"st": "2.5.4.8", "s": "2.5.4.8", "stateorprovincename": "2.5.4.8",
	"street": "2.5.4.9", "streetaddress": "2.5.4.9",
	"o": "2.5.4.10", "organizationname": "2.5.4.10",
	"ou": "2.5.4.11", "organizationalunitname": "2.5.4.11",
	"title": "2.5.4.12", "t": "2.5.4.12",
	"description":      "2.5.4.13",
	"businesscategory": "2.5.4.15",
	"postalcode":       "2.5.4.17",
	"name":             "2.5.4.41",
	"gn":               "2.5.4.42", "g": "2.5.4.42", "givenname": "2.5.4.42",
	"initials": "2.5.4.43", "i": "2.5.4.43",
	"generationqualifier": "2.5.4.44",
	"dnqualifier":         "2.5.4.46",
	"pseudonym":           "2.5.4.65",
	"role":                "2.5.4.72",
	"emailaddress":        "1.2.840.113549.1.9.1", "email": "1.2.840.113549.1.9.1", "e": "1.2.840.113549.1.9.1",
	"unstructuredname": "1.2.840.113549.1.9.2",
	"uid":              "0.9.2342.19200300.100.1.1", "userid": "0.9.2342.19200300.100.1.1",
	"mail": "0.9.2342.19200300.100.1.3",
	"dc":   "0.9.2342.19200300.100.1.25", "domaincomponent": "0.9.2342.19200300.100.1.25",
}

func oidOf(name string) (string, error) {
	if oid, known := attributeTypes[strings.ToLower(name)]; known {
		return oid, nil
	}
	digits := name
	if len(name) > 4 && strings.EqualFold(name[:4], "oid.") {
		digits = name[4:]
	}
	parts := strings.Split(digits, ".")
	for i, p := range parts {
		n, err := strconv.ParseUint(p, 10, 31)
		if err != nil || len(parts) < 2 {
			return "", fmt.Errorf("%q is no type of attribute that is known here: correct it, or write its number, as in 2.5.4.3 for CN; "+
				"a separator that belongs to the value before it is written with a \\ in front", name)
		}
		parts[i] = strconv.FormatUint(n, 10)
	}
	return strings.Join(parts, "."), nil
}
