package identity

import (
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// External is what an existing authority brings along, and the built-in one does not need.
type External struct {
	CRL     string // file; empty: nobody asks what the authority revoked
	Allowed string // file of subjects; empty: the store says by name who may come in
}

// external judges certificates that the store does not know, by files that Follow keeps reading.
type external struct {
	files       External
	authorities []*x509.Certificate
	crl, list   watched
	trust       atomic.Pointer[trust] // written by whoever calls look, one at a time

	mu     sync.Mutex
	faults map[*watched][]string // what is wrong with a file as it is now
}

// trust is what was good of the files. It is never changed, only replaced.
type trust struct {
	crls    map[string]*crl // by authorityKey; nil where External.CRL is empty
	allowed *allowed        // nil where External.Allowed is empty
}

// NewExternalVerifier trusts the authorities in caPath, a PEM bundle, with their CRLs and their list. A file that is missing
// or bad is no error: nobody comes in by it, Problems says why, and Follow takes it up as soon as it is good.
func NewExternalVerifier(caPath string, files External, users *Users, now func() time.Time) (*Verifier, error) {
	v, certs, err := newVerifier(caPath, users, now)
	if err != nil {
		return nil, err
	}
	x := &external{files: files, authorities: certs, crl: watched{path: files.CRL}, list: watched{path: files.Allowed}, faults: map[*watched][]string{}}
	t := &trust{}
	if files.CRL != "" {
		t.crls = map[string]*crl{}
	}
	if files.Allowed != "" {
		t.allowed = &allowed{}
	}
	x.trust.Store(t)
	v.external = x
	x.look(now(), true)
	return v, nil
}

// Listed says whether an external authority's list has a subject of that common name.
func (v *Verifier) Listed(name string) bool {
	if v.external == nil {
		return false
	}
	t := v.external.trust.Load()
	return t.allowed != nil && t.allowed.users[name]
}

// refuses judges a certificate by its chains, which end at an authority and were verified. An empty code lets it on.
func (x *external) refuses(chains [][]*x509.Certificate, now time.Time) (Code, string) {
	t := x.trust.Load()
	if t.crls != nil {
		if code, text := t.revoked(chains, now); code != "" {
			return code, text
		}
	}
	leaf := chains[0][0]
	d, err := subjectDN(leaf.RawSubject)
	if err != nil {
		return BadName, err.Error()
	}
	if t.allowed != nil && !t.allowed.subjects[d.key()] {
		return NotAllowed, fmt.Sprintf("its subject %q is not on the list of who may come in: ask the operator", nameText(leaf.RawSubject))
	}
	name, err := d.commonName()
	if err == nil {
		err = CheckName("common name", name)
	}
	if err != nil {
		return BadName, err.Error() + ": ask the operator for a certificate that names a user so"
	}
	return "", ""
}

// revoked asks the CRL of every issuer, on every chain: one that somebody revoked is no good by a detour either.
func (t *trust) revoked(chains [][]*x509.Certificate, now time.Time) (Code, string) {
	missing := ""
	for _, chain := range chains {
		if len(chain) < 2 {
			missing = "it is an authority's itself, of which no CRL tells"
		}
		for i, c := range chain[:len(chain)-1] {
			list := t.crls[authorityKey(chain[i+1])]
			if list != nil {
				if since, revoked := list.revoked[serialKey(c.SerialNumber)]; revoked {
					what := "it"
					if i > 0 {
						what = "the authority " + nameText(c.RawSubject) + " above it"
					}
					return RevokedCert, fmt.Sprintf("%s was revoked by %s on %s: ask the operator", what, list.issuer, since.Format(time.RFC3339))
				}
			}
			switch {
			case list == nil:
				missing = "the gate has no CRL of its issuer " + nameText(c.RawIssuer)
			case !list.current(now):
				missing = fmt.Sprintf("the gate's CRL of its issuer %s expired on %s", list.issuer, list.nextUpdate.Format(time.RFC3339))
			}
		}
	}
	if missing != "" {
		return NoCRL, missing + ", so nobody knows whether it was revoked: ask the operator"
	}
	return "", ""
}

// look reads the files that changed. At once is for a start; after it, a change is taken up when the file rests.
func (x *external) look(now time.Time, atOnce bool) {
	if data, err, changed := x.crl.changed(now, atOnce); changed {
		x.fault(&x.crl, x.takeCRLs(data, err, now))
	}
	if data, err, changed := x.list.changed(now, atOnce); changed {
		x.fault(&x.list, x.takeList(data, err))
	}
}

func (x *external) fault(w *watched, bad []error) {
	w.failed = len(bad) > 0
	x.mu.Lock()
	defer x.mu.Unlock()
	delete(x.faults, w)
	for _, err := range bad {
		text := err.Error()
		if !strings.HasPrefix(text, w.path) {
			text = w.path + ": " + text
		}
		x.faults[w] = append(x.faults[w], text)
	}
}

// takeCRLs puts each good CRL in its predecessor's place. What it cannot read leaves the others' and the predecessor.
func (x *external) takeCRLs(data []byte, err error, now time.Time) []error {
	if err != nil {
		return []error{unreadable(err)}
	}
	good, bad := parseCRLs(data, x.authorities, now)
	old := x.trust.Load()
	next := &trust{crls: maps.Clone(old.crls), allowed: old.allowed}
	for key, c := range good {
		switch was := old.crls[key]; {
		case was == nil:
		case c.thisUpdate.Before(was.thisUpdate):
			bad = append(bad, fmt.Errorf("the CRL of %s of %s is older than the one in force, of %s, which stays: "+
				"write the newest there, or restart the daemon if the older one is meant",
				c.issuer, c.thisUpdate.Format(time.RFC3339), was.thisUpdate.Format(time.RFC3339)))
			continue
		case !c.current(now) && was.current(now):
			bad = append(bad, fmt.Errorf("the CRL of %s of %s expired already, on %s: issue a new one",
				c.issuer, c.thisUpdate.Format(time.RFC3339), c.nextUpdate.Format(time.RFC3339)))
			continue
		}
		next.crls[key] = c
	}
	if !maps.Equal(next.crls, old.crls) {
		x.trust.Store(next)
	}
	return bad
}

// takeList takes a list whole or not at all.
func (x *external) takeList(data []byte, err error) []error {
	if err != nil {
		return []error{unreadable(err)}
	}
	list, err := parseAllowed(x.list.path, data)
	if err != nil {
		return []error{err}
	}
	x.trust.Store(&trust{crls: x.trust.Load().crls, allowed: list})
	return nil
}

func unreadable(err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return errors.New("no such file: write it there, or name another in [identity]")
	case errors.Is(err, fs.ErrPermission):
		return errors.New("permission denied: the daemon's user must be able to read it")
	}
	return err
}

// Problem is what an operator should look at.
type Problem struct {
	Text string
	Soon bool // nobody is kept out by it yet
}

// Problems are those of an external authority's files now, the worst first: what a monitor should cry about.
func (v *Verifier) Problems() (all []Problem) {
	x := v.external
	if x == nil {
		return nil
	}
	t, now := x.trust.Load(), v.now()
	add := func(soon bool, format string, a ...any) { all = append(all, Problem{fmt.Sprintf(format, a...), soon}) }
	x.mu.Lock()
	for _, w := range []*watched{&x.crl, &x.list} {
		for _, text := range x.faults[w] {
			add(false, "%s", text+x.goesOn(w, t, now))
		}
	}
	x.mu.Unlock()
	if t.crls != nil {
		for _, a := range x.distinct() {
			name, list := nameText(a.RawSubject), t.crls[authorityKey(a)]
			switch {
			case list == nil:
				add(false, "%s: no CRL of %s: nobody comes in with a certificate that it issued: write its CRL there (easyrsa gen-crl)", x.crl.path, name)
			case !list.current(now):
				add(false, "%s: the CRL of %s expired on %s: nobody comes in with a certificate that it issued: write a new one there (easyrsa gen-crl)",
					x.crl.path, name, list.nextUpdate.Format(time.RFC3339))
			default:
				if when := list.expires(now); when != "" {
					add(true, "%s: the CRL of %s expires within %s, on %s; then nobody comes in with a certificate that it issued: write a new one there (easyrsa gen-crl)",
						x.crl.path, name, when, list.nextUpdate.Format(time.RFC3339))
				}
			}
		}
	}
	if t.allowed != nil {
		for _, text := range t.allowed.nameless {
			add(true, "%s", text)
		}
		if t.allowed.subjects != nil && len(t.allowed.subjects) == 0 {
			add(false, "%s: no subject in it: nobody comes in", x.list.path)
		}
	}
	slices.SortStableFunc(all, func(a, b Problem) int {
		switch {
		case a.Soon == b.Soon:
			return 0
		case a.Soon:
			return 1
		}
		return -1
	})
	return all
}

// goesOn says what is gone by while a file is bad.
func (x *external) goesOn(w *watched, t *trust, now time.Time) string {
	var good []string
	switch {
	case w == &x.list && t.allowed.subjects == nil:
		return "; until then nobody comes in"
	case w == &x.list:
		return "; until then the last good list goes on"
	}
	for _, a := range x.distinct() {
		if c := t.crls[authorityKey(a)]; c != nil && c.current(now) {
			good = append(good, fmt.Sprintf("that of %s of %s goes on until %s", c.issuer, c.thisUpdate.Format(time.RFC3339), c.nextUpdate.Format(time.RFC3339)))
		}
	}
	if len(good) == 0 {
		return ""
	}
	return "; " + strings.Join(good, ", ")
}

// distinct is the authorities, one certificate of each name and key.
func (x *external) distinct() (list []*x509.Certificate) {
	seen := map[string]bool{}
	for _, a := range x.authorities {
		if key := authorityKey(a); !seen[key] {
			seen[key] = true
			list = append(list, a)
		}
	}
	return list
}

// expires says how near its end a CRL is, where somebody should hear of it. A mark that lies in the first half of a list's
// life is left out: one that is written anew every day would always be near its end.
func (c *crl) expires(now time.Time) string {
	left, life := c.nextUpdate.Sub(now), c.nextUpdate.Sub(c.thisUpdate)
	for _, mark := range []struct {
		before time.Duration
		text   string
	}{{time.Hour, "an hour"}, {24 * time.Hour, "a day"}, {7 * 24 * time.Hour, "a week"}} {
		if left <= mark.before && 2*mark.before <= life {
			return mark.text
		}
	}
	return ""
}

// CRL is one in force, for metrics. It is an alias so that who shows it need not know this package.
type CRL = struct {
	Issuer     string
	NextUpdate time.Time
}

// CRLs are those in force, expired ones included.
func (v *Verifier) CRLs() (all []CRL) {
	if v.external == nil {
		return nil
	}
	t := v.external.trust.Load()
	for _, a := range v.external.distinct() {
		if c := t.crls[authorityKey(a)]; c != nil {
			all = append(all, CRL{c.issuer, c.nextUpdate})
		}
	}
	return all
}

// describe logs what differs between two states of trust.
func (x *external) describe(log *slog.Logger, old, next *trust) {
	for _, a := range x.distinct() {
		key := authorityKey(a)
		if c := next.crls[key]; c != nil && (old == nil || old.crls[key] != c) {
			log.Info("CRL in force", "file", x.crl.path, "issuer", c.issuer, "this_update", c.thisUpdate, "next_update", c.nextUpdate, "revoked", len(c.revoked))
		}
	}
	if next.allowed != nil && next.allowed.subjects != nil && (old == nil || old.allowed != next.allowed) {
		log.Info("allowed list in force", "file", x.list.path, "users", len(next.allowed.users))
	}
}
