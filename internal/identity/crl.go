package identity

import (
	"bytes"
	"cmp"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"strings"
	"time"
)

// clockSkew is how far the clock of an authority may be ahead of ours.
const clockSkew = 5 * time.Minute

// crl is a list of revoked certificates whose signature was checked.
type crl struct {
	issuer     string // for people
	thisUpdate time.Time
	nextUpdate time.Time
	revoked    map[string]time.Time // since when, by serialKey
}

// current says whether the list may still be gone by.
func (c *crl) current(now time.Time) bool { return now.Before(c.nextUpdate) }

// serialKey is a serial number as index.txt of an openssl authority has it, in lower case.
func serialKey(n *big.Int) string { return cmp.Or(hex.EncodeToString(n.Bytes()), "00") }

// authorityKey is the same for an authority's certificates of one name and one key: a renewed one goes on with its CRL.
func authorityKey(c *x509.Certificate) string {
	return string(c.RawSubject) + "\x00" + string(c.RawSubjectPublicKeyInfo)
}

// parseCRLs reads what identity.crl holds: CRLs in PEM, whatever stands between them, or in DER one after the other. It
// returns those that one of the authorities signed, by authorityKey, and an error for each other one. Expired ones are
// among the good: what became of them is the caller's to judge.
func parseCRLs(data []byte, authorities []*x509.Certificate, now time.Time) (good map[string]*crl, bad []error) {
	ders, bad := splitCRLs(data)
	good = map[string]*crl{}
	for _, der := range ders {
		c, key, err := parseCRL(der, authorities, now)
		switch {
		case err != nil:
			bad = append(bad, err)
		case good[key] == nil || !good[key].thisUpdate.After(c.thisUpdate):
			good[key] = c
		}
	}
	return good, bad
}

// splitCRLs returns each CRL's DER. pem.Decode passes over what it cannot read, so the beginnings are counted.
func splitCRLs(data []byte) (ders [][]byte, bad []error) {
	if begun := bytes.Count(data, []byte("-----BEGIN")); begun > 0 {
		whole := 0
		for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
			whole++
			if block.Type == "X509 CRL" {
				ders = append(ders, block.Bytes)
			} else {
				bad = append(bad, fmt.Errorf("a PEM block %q where only CRLs belong: take it out", block.Type))
			}
		}
		if whole < begun {
			bad = append(bad, fmt.Errorf("%d of %d CRLs in it are cut short or damaged: write the file again", begun-whole, begun))
		}
		return ders, bad
	}
	for len(data) > 0 {
		var der asn1.RawValue
		rest, err := asn1.Unmarshal(data, &der)
		if err != nil {
			return ders, append(bad, errors.New("cut short, or no CRL in PEM or DER: write the file again"))
		}
		ders, data = append(ders, der.FullBytes), rest
	}
	if len(ders) == 0 {
		bad = append(bad, errors.New("empty: write a CRL there"))
	}
	return ders, bad
}

func parseCRL(der []byte, authorities []*x509.Certificate, now time.Time) (c *crl, key string, err error) {
	list, err := x509.ParseRevocationList(der)
	if err != nil {
		if strings.Contains(err.Error(), "unsupported crl version") {
			err = errors.New("X.509 version 1: let `openssl ca -gencrl` write version 2, by `-crlexts` or crl_extensions in its configuration")
		}
		return nil, "", fmt.Errorf("a CRL that cannot be read: %w", err)
	}
	c = &crl{issuer: nameText(list.RawIssuer), thisUpdate: list.ThisUpdate, nextUpdate: list.NextUpdate}
	fail := func(format string, a ...any) (*crl, string, error) {
		return nil, "", fmt.Errorf("the CRL of %s of %s "+format, append([]any{c.issuer, c.thisUpdate.Format(time.RFC3339)}, a...)...)
	}
	signed := errors.New("") // why not, where an authority of that name is known
	known := false
	for _, a := range authorities {
		if !bytes.Equal(a.RawSubject, list.RawIssuer) {
			continue
		}
		known = true
		if signed = list.CheckSignatureFrom(a); signed == nil {
			key = authorityKey(a)
			break
		}
	}
	switch {
	case !known:
		return fail("is from an issuer that identity.ca does not hold: put the CRL of the CA there that issues the users' certificates")
	case signed != nil:
		return fail("is not signed by the CA of that name in identity.ca (%v): fetch it from the CA again", signed)
	case c.nextUpdate.IsZero():
		return fail("has no nextUpdate, so nobody could tell when it is out of date: issue it with one (openssl ca -gencrl -crldays 30)")
	case c.thisUpdate.After(now.Add(clockSkew)):
		return fail("is of the future; it is %s here: correct the clock that is wrong, and issue it again if it was the CA's", now.Format(time.RFC3339))
	}
	// RFC 5280, 5.2 and 5.3: what is critical and not understood makes a list unfit. A delta or partial list says so like that.
	for _, e := range list.Extensions {
		if e.Critical {
			return fail("has the critical extension %v, as partial lists have: issue a whole one", e.Id)
		}
	}
	c.revoked = make(map[string]time.Time, len(list.RevokedCertificateEntries))
	for _, r := range list.RevokedCertificateEntries {
		for _, e := range r.Extensions {
			if e.Critical {
				return fail("has an entry with the critical extension %v, as indirect lists have: issue a list of this CA's own certificates", e.Id)
			}
		}
		c.revoked[serialKey(r.SerialNumber)] = r.RevocationTime
	}
	return c, key, nil
}
