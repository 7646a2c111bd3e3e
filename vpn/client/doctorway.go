package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"syscall"
	"time"

	"perimeterd/knock"
	"perimeterd/vpn"
)

// How long the doctor waits for what.
const (
	withoutKnock  = 900 * time.Millisecond // the kernel sends its second SYN after a second
	afterKnock    = 4 * time.Second        // for each kind; a second token goes out meanwhile
	gatePatience  = 5 * time.Second
	tokenInterval = 4 * time.Millisecond
	connectAgain  = 400 * time.Millisecond // more than most round trips
)

// opened is how a gate was reached.
type opened struct {
	open   bool  // before any knock
	token  error // nil: it opened
	ports  error // of the sequence; nil: it opened
	others bool  // tokens of other times opened
	took   time.Duration
}

var (
	errNotTried = errors.New("not tried")
	errNone     = errors.New("the profile has none")
)

// way examines the way to the gate, endpoint after endpoint, until one answers.
func (d *Doctor) way(ctx context.Context, tokens *Tokens) {
	for i, endpoint := range d.Profile.Endpoints {
		if d.severity = Problem; i < len(d.Profile.Endpoints)-1 {
			d.severity = Warning // the next one may do
		}
		if ctx.Err() == nil && d.endpoint(ctx, endpoint, tokens) {
			return
		}
	}
	if err := d.Profile.checkDates(d.Now()); err != nil { // nobody can say whether the clock is to blame
		d.dates(err, false)
	}
}

// dates says what this clock makes of the certificate, and how sure that is.
func (d *Doctor) dates(err error, clockRight bool) {
	leaf := d.Profile.typed.identity.Leaf
	var refused *RefusedError
	code, fix := CodeNotYet, ""
	if errors.As(err, &refused) && refused.Code == "expired" {
		code = CodeExpired
	}
	text := err.Error()
	if clockRight && code == CodeNotYet {
		text, fix = "it is valid from "+leaf.NotBefore.Local().Format(time.DateTime)+" on, and the clock is right", "wait, or ask the operator for another"
	}
	d.found(Problem, "certificate", code, text, fix)
}

// endpoint says whether a gate answered there, in whatever way.
func (d *Doctor) endpoint(ctx context.Context, endpoint string, tokens *Tokens) bool {
	resolving, cancel := context.WithTimeout(ctx, gatePatience)
	addrs, err := resolve(resolving, endpoint)
	cancel()
	if err != nil {
		if !hasRoute() {
			d.noNetwork(endpoint)
			return false
		}
		d.found(d.severity, "network", CodeNoName, fmt.Sprintf("%s: %v", endpoint, err), "ask the operator whether the name is right; if other names resolve no more here, this machine's name server is to blame")
		return false
	}
	var reachable []netip.AddrPort
	for _, a := range addrs {
		source := sourceTowards(a)
		if source.IsValid() {
			reachable = append(reachable, a)
			d.well("network", "a route to %s (%v) from %v", endpoint, a.Addr(), source)
		}
	}
	if len(reachable) == 0 {
		d.noNetwork(endpoint)
		return false
	}
	conn, how, err := d.knock(ctx, endpoint, reachable, tokens)
	if conn == nil {
		d.closed(endpoint, how, err)
		return false
	}
	d.gate = conn.RemoteAddr().(*net.TCPAddr).AddrPort()
	d.gate = netip.AddrPortFrom(d.gate.Addr().Unmap(), d.gate.Port())
	d.talk(ctx, conn, how, tokens)
	return true
}

func (d *Doctor) noNetwork(endpoint string) {
	fix := "connect to a network"
	if hasRoute() {
		fix = "this network leads elsewhere, but not there: ask who runs it, or try another"
	}
	d.found(d.severity, "network", CodeNoNetwork, "no route to "+endpoint, fix)
}

// hasRoute asks the routes for the way to somewhere far, and the interfaces for a network: nothing is sent.
func hasRoute() bool {
	for _, far := range []string{"1.1.1.1:53", "[2606:4700:4700::1111]:53"} {
		if sourceTowards(netip.MustParseAddrPort(far)).IsValid() {
			return true
		}
	}
	interfaces, _ := net.Interfaces()
	for _, i := range interfaces {
		if i.Flags&(net.FlagLoopback|net.FlagPointToPoint) != 0 || i.Flags&net.FlagRunning == 0 { // a tunnel is no network
			continue
		}
		addrs, _ := i.Addrs()
		for _, a := range addrs {
			if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().IsGlobalUnicast() {
				return true
			}
		}
	}
	return false
}

// knock opens the door, one kind of knock after the other, so that it shows which of them does.
func (d *Doctor) knock(ctx context.Context, endpoint string, addrs []netip.AddrPort, tokens *Tokens) (net.Conn, opened, error) {
	start := time.Now()
	how := opened{token: errNotTried, ports: errNotTried}
	conn, err := connect(ctx, addrs[0], withoutKnock)
	if err == nil {
		how.open, how.took = true, time.Since(start)
		return conn, how, nil
	}
	if errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.EPERM) {
		return nil, how, err
	}
	try := func(p Profile, t *Tokens) (net.Conn, error) {
		start = time.Now()
		trying, cancel := context.WithTimeout(ctx, afterKnock)
		defer cancel()
		p.Endpoints = []string{endpoint}
		conn, err := (&Dialer{Profile: &p, Tokens: t, Now: d.Now}).Dial(trying)
		how.took = time.Since(start)
		return conn, err
	}
	switch {
	case len(d.Profile.typed.secret) == 0:
		how.token = errNone
	case tokens != nil:
		p := *d.Profile
		p.Sequence, p.typed.sequence = nil, nil
		if conn, how.token = try(p, tokens); how.token == nil {
			return conn, how, nil
		}
	}
	if how.ports = errNone; len(d.Profile.typed.sequence) > 0 {
		p := *d.Profile
		p.typed.secret = nil
		if conn, how.ports = try(p, &Tokens{}); how.ports == nil {
			return conn, how, nil
		}
	}
	err = errors.Join(how.token, how.ports)
	if errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.EPERM) || len(d.Profile.typed.secret) == 0 {
		return nil, how, err
	}
	if conn, e := d.otherTimes(ctx, addrs[0]); e == nil {
		how.others = true
		return conn, how, nil
	}
	return nil, how, err
}

func connect(ctx context.Context, to netip.AddrPort, patience time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return (&net.Dialer{}).DialContext(ctx, "tcp", to.String())
}

// otherTimes knocks as of earlier times, the earliest first: minutes, as clocks drift, and hours, as time zones are mistaken. Which of
// them opened the gate's own clock says. Tokens of times to come stay here: the right clock, behind a network that swallows
// knocks, would give whoever is on the way what opens the gate later.
func (d *Doctor) otherTimes(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	udp, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(to.Addr(), d.Profile.TunnelPort)))
	if err != nil {
		return nil, err
	}
	defer udp.Close()
	ctx, cancel := context.WithTimeout(ctx, afterKnock)
	defer cancel()
	go func() {
		t := d.Profile.typed
		for _, step := range earlierSteps(d.Now(), t.step) {
			token := knock.NewToken(t.secret, t.serverID, step, uint8(rand.IntN(knock.Indexes)))
			udp.Write(token[:]) // one that does not leave opens nothing
			if !sleepUntil(ctx, time.Now().Add(tokenInterval)) {
				return
			}
		}
	}()
	for {
		conn, err := connect(ctx, to, connectAgain)
		if err == nil || ctx.Err() != nil {
			return conn, err
		}
	}
}

// earlierSteps are those of the gate where this clock is up to ten minutes fast, or some half hours; in the order of time.
func earlierSteps(now time.Time, length time.Duration) (steps []int64) {
	here := knock.StepAt(now, length)
	for halves := time.Duration(28); halves > 0; halves-- {
		at := knock.StepAt(now.Add(-halves*30*time.Minute), length)
		steps = append(steps, at-1, at, at+1)
	}
	for n := max(3, int64(10*time.Minute/length)); n > 2; n-- {
		steps = append(steps, here-n)
	}
	slices.Sort(steps)
	steps = slices.Compact(steps)
	return slices.DeleteFunc(steps, func(step int64) bool { return step > here-3 })
}

// closed says why there is no connection.
func (d *Doctor) closed(endpoint string, how opened, err error) {
	knocked := how.token != errNotTried || how.ports != errNotTried
	switch {
	case errors.Is(err, syscall.EPERM):
		d.found(d.severity, "network", CodeLocalDrop, "a firewall on this machine drops what is sent to "+endpoint, "let TCP and UDP out to it")
	case errors.Is(err, syscall.ECONNREFUSED) && knocked:
		d.found(d.severity, "gate", CodeGateDown, fmt.Sprintf("after the knock %s refuses connections: nothing listens there", endpoint),
			"ask the operator whether perimeterd runs")
	case errors.Is(err, syscall.ECONNREFUSED):
		d.found(d.severity, "gate", CodeGateDown, fmt.Sprintf("%s refuses connections before any knock: no perimeterd guards it, and nothing listens", endpoint),
			"ask the operator whether this is the right address, and whether perimeterd runs")
	case errors.Is(err, syscall.EHOSTUNREACH):
		d.found(d.severity, "network", CodeNoNetwork, fmt.Sprintf("the way to %s ends in this network: host unreachable", endpoint), "connect to another network")
	default:
		var tried []string
		if !errors.Is(how.token, errNone) && !errors.Is(how.token, errNotTried) {
			tried = append(tried, fmt.Sprintf("tokens to UDP port %d, of this time (%s) and earlier ones", d.Profile.TunnelPort, d.Now().Format("15:04:05 MST")))
		}
		if !errors.Is(how.ports, errNone) {
			tried = append(tried, "the sequence")
		}
		text := endpoint + " answers nothing"
		for i, t := range tried {
			text += []string{" after ", ", nor after "}[min(i, 1)] + t
		}
		if len(tried) == 0 {
			text += ", and no knock could be sent"
		}
		d.found(d.severity, "knock", CodeUnanswered, text, "the bastion is down or elsewhere, a network on the way blocks these ports, this clock is slow, or the profile is revoked or replaced: "+
			"look at the clock, try another network; the operator sees with `perimeterd watch` what arrives of your address")
	}
}

// talk authenticates on a connection, and says what the knock, the gate, the clock, the certificate and UDP are worth.
func (d *Doctor) talk(ctx context.Context, conn net.Conn, how opened, tokens *Tokens) {
	g, err := d.authenticate(ctx, conn)
	if g != nil {
		defer g.Close()
	}
	var list []vpn.SessionReply
	sent := d.Now()
	if err == nil {
		asking, cancel := context.WithTimeout(ctx, gatePatience)
		err = g.do(asking, http.MethodGet, vpn.SessionPath, nil, &list)
		cancel()
	}
	var off time.Duration
	known := g != nil && !g.date.IsZero()
	if known {
		now := d.Now()
		off = clockOffset(sent, now, g.date)
		seconds := off.Seconds()
		d.report.Offset = &seconds
	}
	tolerance := clockTolerance
	if len(d.Profile.typed.secret) > 0 {
		tolerance = min(tolerance, d.Profile.typed.step)
	}
	wrong := known && off.Abs() >= tolerance
	d.knocked(how, wrong, refusal(err) != nil)

	d.answered(err, g != nil)
	switch {
	case !known:
	case wrong:
		d.found(Problem, "clock", CodeClock, fmt.Sprintf("this clock is %v by the gate's", spell(off)), "set it, and keep it by a time server: knocks follow it, and so do AWS's signatures")
	default:
		d.well("clock", "%v by the gate's", spell(off))
	}
	d.certificate(err, known && !wrong || how.token == nil)
	if err != nil {
		if d.doubt {
			d.passes(false)
		}
		return
	}
	d.well("gate", "%s accepts the certificate of %s", d.gate, d.Profile.Name())
	d.session(ctx, g, list, how)
}

// passes ends the doubt about UDP.
func (d *Doctor) passes(udp bool) {
	switch {
	case !udp:
		d.found(Warning, "udp", CodeUDP, fmt.Sprintf("UDP port %d of %v does not answer: a network on the way seems to block it; the tunnel's packets go by TLS, which is slower", d.Profile.TunnelPort, d.gate.Addr()),
			"try another network, or ask who runs this one to let it out")
	case d.doubt:
		d.found(Warning, "knock", CodeTokens, "the sequence opened the gate, and the token did not, although UDP passes: it was lost, or another machine with this profile had spent it", "")
	}
	d.doubt = false
}

// clockTolerance is what AWS's signatures tolerate.
const clockTolerance = 5 * time.Minute

// clockOffset is how far this clock is ahead of the gate's, which tells whole seconds: what may be due to that and to the
// time that the answer took is no offset.
func clockOffset(sent, received, gate time.Time) time.Duration {
	early, late := gate, gate.Add(time.Second)
	switch {
	case sent.After(late):
		return sent.Sub(late)
	case received.Before(early):
		return received.Sub(early)
	}
	return 0
}

func spell(off time.Duration) string {
	off = off.Round(time.Second)
	switch {
	case off > 0:
		return off.String() + " fast"
	case off < 0:
		return (-off).String() + " slow"
	}
	return "right"
}

// refusal is the gate's, of the certificate; nil: it is another error, or none.
func refusal(err error) error {
	if err == nil || certificateRefused(err) {
		return err
	}
	if explained := explainTLS(err); certificateRefused(explained) {
		return explained
	}
	return nil
}

// authenticate is handshake at this doctor's time; where the gate's certificate does not hold then, at one when it does: the
// gate's own clock then says which of the two is wrong. The connection that is returned with an error is for its date.
func (d *Doctor) authenticate(ctx context.Context, conn net.Conn) (*gateConn, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*gatePatience)
	defer cancel()
	g, err := d.handshake(ctx, conn, d.Now())
	var unverified *tls.CertificateVerificationError
	var invalid x509.CertificateInvalidError
	if !errors.As(err, &unverified) || !errors.As(err, &invalid) || invalid.Reason != x509.Expired {
		return g, err
	}
	again, e := connect(ctx, d.gate, gatePatience)
	if e != nil {
		return nil, err
	}
	leaf := unverified.UnverifiedCertificates[0]
	g, e = d.handshake(ctx, again, leaf.NotBefore.Add(time.Second))
	if e != nil {
		return nil, err
	}
	e = g.do(ctx, http.MethodGet, vpn.SessionPath, nil, nil)
	if !g.date.IsZero() && !g.date.Before(leaf.NotBefore) && !g.date.After(leaf.NotAfter) {
		return g, e // by its own clock it holds
	}
	return g, err
}

// handshake is Profile's, at any time, and with crypto/tls's own errors.
func (d *Doctor) handshake(ctx context.Context, conn net.Conn, at time.Time) (*gateConn, error) {
	ctx, cancel := context.WithTimeout(ctx, gatePatience)
	defer cancel()
	c := tls.Client(conn, d.Profile.tlsConfig(func() time.Time { return at }))
	if err := c.HandshakeContext(ctx); err != nil {
		conn.Close()
		return nil, err
	}
	return newGateConn(c, d.Profile.ServerID), nil
}

// knocked says which knock opened. The gate's judgement and the clock explain a token that did not; else it is in doubt
// whether UDP passes.
func (d *Doctor) knocked(how opened, clockWrong, refused bool) {
	var spent *ExhaustedError
	switch {
	case how.open:
		d.well("knock", "the gate's port is open already, from an earlier knock or for this network: no knock was tried")
	case how.token == nil:
		d.well("knock", "a token opens the gate (%d ms)", how.took.Milliseconds())
	case errors.Is(how.token, errNone):
		d.well("knock", "the sequence opens the gate (%d ms)", how.took.Milliseconds())
	case errors.Is(how.token, errNotTried):
		d.found(Warning, "knock", CodeTokens, "the sequence opens the gate; no token was sent, since its state cannot be kept", "see above")
	case errors.Is(how.token, syscall.EPERM):
		d.found(Problem, "knock", CodeLocalDrop, fmt.Sprintf("the sequence opens the gate; a firewall on this machine drops what is sent to UDP port %d", d.Profile.TunnelPort),
			"let UDP out to it: the tunnel's data go the same way")
	case errors.As(how.token, &spent):
		d.found(Warning, "knock", CodeTokens, "the sequence opens the gate; "+how.token.Error(), "")
	case refused:
		d.found(Warning, "knock", CodeTokens, "the sequence opens the gate, and the token does not", "it went with the certificate: see there")
	case clockWrong:
		d.found(Problem, "knock", CodeTokens, "the token opens nothing: it is of another time than the gate's", "set the clock")
	case how.others:
		d.found(Warning, "knock", CodeTokens, "the gate opened late, or for a token of another time", "run vpn doctor again")
	default:
		d.doubt = true
	}
}

// answered says what keeps the gate from speaking, which spoke TLS or did not.
func (d *Doctor) answered(err error, spoke bool) {
	var unverified *tls.CertificateVerificationError
	var invalid x509.CertificateInvalidError
	var api *vpn.APIError
	switch {
	case err == nil || refusal(err) != nil:
	case errors.As(err, &unverified) && errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		leaf := unverified.UnverifiedCertificates[0]
		d.found(Problem, "gate", CodeGateDates, fmt.Sprintf("the gate's certificate holds from %s to %s", leaf.NotBefore.Local().Format(time.DateTime), leaf.NotAfter.Local().Format(time.DateTime)),
			fmt.Sprintf("if it is really %s, tell the operator; else set the clock", d.Now().Format(time.DateTime)))
	case errors.As(err, &unverified):
		d.found(Problem, "gate", CodeGateOther, explainTLS(err).Error(), "compare networks, then ask the operator for a new profile")
	case errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded):
		d.found(Problem, "gate", CodeGateSilent, fmt.Sprintf("%s takes connections, and says nothing: the daemon there hangs, or a network on the way swallows what is larger than a SYN", d.gate),
			"tell the operator; on a tunnel or PPPoE line, lower the MTU")
	case errors.As(err, &api):
		d.found(Problem, "gate", CodeRefused, api.Message, api.Fix)
	default:
		if !spoke {
			err = fmt.Errorf("gate %v: %w", d.gate, explainTLS(err))
		}
		d.found(Problem, "gate", CodeGateOther, err.Error(), "")
	}
}

// certificate joins the gate's judgement and this clock's. Where the clock is right, both are.
func (d *Doctor) certificate(err error, clockRight bool) {
	leaf := d.Profile.typed.identity.Leaf
	dates := d.Profile.checkDates(d.Now())
	refused := refusal(err)
	switch {
	case refused != nil && dates == nil:
		d.found(Problem, "certificate", CodeRevoked, refused.Error(), "")
	case dates != nil && (err != nil || clockRight):
		d.dates(dates, clockRight)
	case dates != nil:
		d.well("certificate", "the gate accepts it; to this clock it is %s", map[bool]string{true: "not yet valid", false: "expired"}[d.Now().Before(leaf.NotBefore)])
	case d.Now().After(leaf.NotAfter.Add(-leaf.NotAfter.Sub(leaf.NotBefore) / 10)):
		d.found(Warning, "certificate", CodeEndsSoon, "it ends on "+leaf.NotAfter.Local().Format(time.DateTime), "vpn renew, or ask the operator for a new profile")
	default:
		d.well("certificate", "it ends on %s", leaf.NotAfter.Local().Format(time.DateTime))
	}
}
