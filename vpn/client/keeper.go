package client

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"perimeterd/vpn"
)

// What a keeper does when.
const (
	beat           = 250 * time.Millisecond // between two looks at the tunnel
	dataPatience   = 600 * time.Millisecond // data unanswered for so long: shake hands
	answerPatience = 500 * time.Millisecond // an initiation unanswered for so long: knock, and ask the gate
	lull           = 2                      // beats without data after a beat with many: see whether a handshake is answered
	many           = 16 << 10               // bytes in a beat, from which on silence is strange
	firstTry       = 6 * time.Second        // on a stream: UDP is tried again after so long; the device makes no handshake before
	tryEvery       = 30 * time.Second       // and from then on
	askPatience    = 5 * time.Second        // for the gate's answer by TLS
	probePatience  = 2 * time.Second        // the proxy unreachable for so long: UDP seems blocked
	probeEvery     = 30 * time.Second
	keepPause      = 10 * time.Second // at least, between two writings of what the session opened
	reviveLimit    = 4                // revivals in vain before a new session is asked for
	longestPause   = time.Minute
	refusedPause   = 10 * time.Minute // where only a person can help

	renewalRefusedPause = 6 * time.Hour
	renewalFailedPause  = 5 * time.Minute
)

// Keeper holds a tunnel up: it follows a changed network, renews the session before its end, and asks for a new one when
// the gate has forgotten this one.
type Keeper struct {
	Options
	Timeout time.Duration // for a session to come up
	Now     func() time.Time

	mu      sync.Mutex
	profile *Profile // in the place of Options.Profile, since it was renewed; nil: it was not
	tunnel  *Tunnel
	state   string
	data    string
	since   time.Time
	problem string
	renewal string        // why the certificate is not renewed, though it soon ends
	hurry   bool          // somebody waits for the tunnel: try at once
	changed chan struct{} // closed at the next change of state and data; nil while nobody waits

	visited visited
}

// Start opens the first session. Stop must follow, if it returned nil.
func (k *Keeper) Start(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, k.Timeout)
	defer cancel()
	t, err := Open(ctx, k.options(), nil)
	if err != nil {
		return err
	}
	k.adopt(t)
	k.visited.begin(t.visited)
	return nil
}

func (k *Keeper) adopt(t *Tunnel) (old *Tunnel) {
	k.mu.Lock()
	defer k.mu.Unlock()
	old, k.tunnel = k.tunnel, t
	if k.data != DataBlocked { // another session does not open a way
		k.data = DataUnknown
	}
	k.state, k.problem, k.since = Up, "", k.Now()
	k.noteLocked()
	return old
}

// noteLocked tells those who wait of a change of state or data.
func (k *Keeper) noteLocked() {
	if k.changed != nil {
		close(k.changed)
		k.changed = nil
	}
}

// Await returns when the tunnel is up and, as far as is known, data pass; with sure, when they have passed or their way has proven
// itself otherwise. When ctx ends before, or the gate refuses, it says why.
func (k *Keeper) Await(ctx context.Context, sure bool) error {
	for first := true; ; first = false {
		k.mu.Lock()
		state, data, problem := k.state, k.data, k.problem
		if k.changed == nil {
			k.changed = make(chan struct{})
		}
		changed := k.changed
		good := state == Up && (data == DataConfirmed || data == DataUnknown && (!sure || k.tunnel.proven))
		k.hurry = k.hurry || first && (state == Retrying || data == DataBlocked)
		k.mu.Unlock()
		switch {
		case good:
			return nil
		case state == Refused:
			return errors.New(problem)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			if problem == "" {
				problem = data
			} else if data == DataBlocked {
				problem += " (" + data + ")"
			}
			return fmt.Errorf("the tunnel is %s: %s", state, problem)
		}
	}
}

// Leave takes the tunnel down here. The session stands, and is kept for the next time.
func (k *Keeper) Leave() {
	k.mu.Lock()
	t, up := k.tunnel, k.state == Up
	k.mu.Unlock()
	select {
	case <-k.visited.changed:
		if up {
			k.keep(t)
		}
	default:
	}
	t.Close()
}

// keep writes the session down, so that the tunnel comes up in one round trip the next time.
func (k *Keeper) keep(t *Tunnel) {
	if err := t.keep(k.options().Profile, k.visited.list()); err != nil {
		k.Log.Warn("the session is not kept for the next time", "error", err)
	}
}

// Stop takes the tunnel down, here and at the gate.
func (k *Keeper) Stop() {
	if err := dropKept(k.options().Profile); err != nil {
		k.Log.Warn("a session that ends is still kept", "error", err)
	}
	k.mu.Lock()
	t := k.tunnel
	k.mu.Unlock()
	closed := make(chan struct{})
	go func() { t.Close(); close(closed) }()
	ctx, cancel := context.WithTimeout(context.Background(), endPatience)
	defer cancel()
	if err := EndSession(ctx, k.options().Profile, k.Tokens, t.Session.ID); err != nil {
		k.Log.Warn("the gate was not told; the session expires by itself", "session", t.Session.ID, "error", err)
	}
	<-closed
}

// Run keeps the tunnel until ctx ends.
func (k *Keeper) Run(ctx context.Context) error {
	tick := time.NewTicker(beat)
	defer tick.Stop()
	t := k.tunnel
	k.keep(t)
	v := vitals{renewAt: renewTime(k.since, t.Session.Expires)}
	failures := 0
	began := time.Now()
	place := newPlace(t.Gate, k.Now(), 0)
	var probeAt time.Time
	stopAsking := func() {}
	var asking chan error // gets the gate's answer about the session
	var tryAt time.Time   // UDP, while there is a stream
	var flow flow
	var known time.Time // when the gate said that the session stands; zero: it has not, or a handshake came since
	refused := false
	keep, keepAt := k.visited.changed, time.Time{} // nil: it was kept a moment ago
	var renewing chan error                        // gets what became of the certificate's renewal
	var renewalAt time.Time                        // none before
	var renewedFor *Tunnel                         // with each session of an old certificate the gate may ask for a renewal
	for {
		now := k.Now()
		due := !now.Before(k.options().Profile.RenewFrom()) || t.Session.Renew && renewedFor != t
		if renewing == nil && !now.Before(renewalAt) && due {
			result := make(chan error, 1)
			renewing = result
			go func() {
				ctx, cancel := context.WithTimeout(ctx, k.Timeout)
				defer cancel()
				result <- k.Renew(ctx)
			}()
		}
		if k.unconfirmed(t) && !now.Before(probeAt) {
			probeAt = now.Add(probeEvery)
			go k.probe(ctx, t)
		}
		var answer error
		answered := false
		select {
		case <-ctx.Done():
			return nil
		case answer = <-asking:
			asking, answered = nil, true
		case err := <-renewing:
			renewing, renewalAt = nil, k.Now().Add(renewalPause(err, k.options().Profile.Expires().Sub(k.Now())))
			if err == nil {
				renewedFor = t
				k.keep(t)
			} else if ctx.Err() == nil {
				k.unrenewed(err)
			}
			continue
		case <-keep:
			keep, keepAt = nil, k.Now().Add(keepPause)
			if !refused {
				k.keep(t)
			}
			continue
		case <-tick.C:
			if keep == nil && !k.Now().Before(keepAt) {
				keep = k.visited.changed
			}
		}
		v.now = k.Now()
		v.moved = place.moved(v.now, time.Since(began))
		if refused && !v.moved {
			continue
		}
		refused = false
		v.answered = t.Stats().LastHandshake
		v.unheard = t.wire.unheard()
		v.cut = t.wire.broken.Load()
		v.stopped = flow.stopped(t.wire.heard.Load())
		switch {
		case !t.wire.onStream():
			tryAt = time.Time{}
		case tryAt.IsZero():
			tryAt = v.now.Add(firstTry)
		case !v.now.Before(tryAt):
			tryAt = v.now.Add(tryEvery)
			t.tryUDP(k.Tokens, k.Profile.TunnelPort)
		}
		if i := t.wire.initiation.Load(); i != nil {
			v.asked = i.at
		}
		if k.hurried() {
			v.nextTry, probeAt = time.Time{}, time.Time{}
		}
		if v.young && !k.unconfirmed(t) {
			v.young, v.nextTry, failures = false, time.Time{}, 0
		}
		switch {
		case !answered || ctx.Err() != nil:
		case forgotten(answer):
			k.Log.Info("the gate does not know this session any more: asking for a new one", "session", t.Session.ID)
			v.renewAt, v.nextTry, v.lost = v.now, time.Time{}, true
		case certificateRefused(answer) && k.reload():
			v.nextTry = time.Time{}
		case certificateRefused(answer):
			refused = true
			k.refuse(answer)
			continue
		case answer != nil:
			k.trouble(fmt.Errorf("the gate answers neither by UDP nor by TCP: %w", answer))
		case !t.wire.onStream(): // UDP answers, or the gate has no streams
			known = v.now
		}
		if !v.asked.After(v.answered) && v.unheard.IsZero() {
			known = time.Time{}
		} else if !known.IsZero() && v.now.Sub(known) > answerPatience {
			known = time.Time{}
			k.blocked(t)
		}
		act := v.decide()
		if act == shake {
			switch fresh, err := t.initiateAgain(); {
			case err == nil && fresh:
			case v.stopped && v.unheard.IsZero(): // no reason to knock: other data will show it
				act = nothing
				go k.probe(ctx, t)
			default: // too early after the last one
				act = revive
			}
		}
		switch act {
		case healthy:
			v.revived, failures, v.nextTry, probeAt = 0, 0, time.Time{}, time.Time{}
			k.trouble(nil)
		case revive:
			v.nextTry = v.now.Add(pause(v.revived, longestPause))
			v.revived++
			t.wire.broken.Store(false)
			if v.moved {
				t.wire.leave() // it is of the old network
				k.Log.Info("the network changed: knocked again", "error", t.revive(k.Tokens, k.Profile.TunnelPort))
			} else {
				k.silent()
			}
			if asking != nil && v.moved {
				stopAsking()
				asking = nil
			}
			if asking == nil {
				reply := make(chan error, 1)
				asking = reply
				var mine context.Context
				mine, stopAsking = context.WithTimeout(ctx, askPatience)
				go func() {
					defer stopAsking()
					reply <- t.ask(mine, k.options())
				}()
			}
		case renew:
			failures++
			opening, cancel := context.WithTimeout(ctx, k.Timeout)
			fresh, err := Open(opening, k.options(), t)
			cancel()
			if err != nil {
				if certificateRefused(err) && k.reload() {
					break
				}
				if certificateRefused(err) {
					refused = true
					k.refuse(err)
					break
				}
				longest := longestPause
				if permanent(err) {
					longest = refusedPause
					failures = max(failures, 9)
				}
				v.nextTry = k.Now().Add(pause(failures, longest))
				switch {
				case ctx.Err() != nil:
				case v.renewAt.After(v.now) || v.asked.After(v.answered) || !v.unheard.IsZero() || v.lost:
					k.trouble(err)
				default:
					k.worry(fmt.Errorf("the session ends soon, and a new one does not come up: %w", err))
				}
				break
			}
			k.adopt(fresh).Close()
			k.keep(fresh)
			k.Log.Info("new session", "session", fresh.Session.ID, "address", fresh.Session.Address, "expires", fresh.Session.Expires)
			t, place, probeAt, asking, known = fresh, newPlace(fresh.Gate, k.Now(), time.Since(began)), time.Time{}, nil, time.Time{}
			// A session whose packets do not come back is no reason to ask for the next one at once.
			v = vitals{renewAt: renewTime(k.Now(), t.Session.Expires), nextTry: k.Now().Add(pause(failures, longestPause)), young: true}
		}
	}
}

// options are what to open with: the profile may be a renewed one.
func (k *Keeper) options() Options {
	k.mu.Lock()
	defer k.mu.Unlock()
	o := k.Options
	if k.profile != nil {
		o.Profile = k.profile
	}
	return o
}

// Renew gets a new certificate. The session goes on, and is the new certificate's.
func (k *Keeper) Renew(ctx context.Context) error {
	p, err := Renew(ctx, k.options().Profile, k.Tokens)
	if err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.profile, k.renewal = p, ""
	k.Log.Info("certificate renewed", "until", p.Expires())
	return nil
}

// unrenewed notes that the certificate will end, and says it once.
func (k *Keeper) unrenewed(err error) {
	ends := k.options().Profile.Expires()
	text := fmt.Sprintf("the certificate ends on %s, and is not renewed: %v", ends.Local().Format(time.DateTime), err)
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.renewal != text {
		k.renewal = text
		k.Log.Warn("certificate not renewed", "ends", ends, "error", err)
	}
}

// reload takes another certificate from the profile's file, where it has one by now: another process renewed it, or it was
// imported.
func (k *Keeper) reload() bool {
	old := k.options().Profile
	if old.file == "" {
		return false
	}
	p, err := LoadProfile(old.file)
	if err != nil || p.Certificate == old.Certificate || p.Name() != old.Name() || p.ServerID != old.ServerID {
		return false
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.profile, k.renewal = p, ""
	k.Log.Info("the profile has another certificate by now", "until", p.Expires())
	return true
}

// renewalPause is how long to wait with the next renewal after one that ended with err, where the certificate has so much left.
func renewalPause(err error, left time.Duration) time.Duration {
	var api *vpn.APIError
	switch {
	case err == nil:
		return min(time.Hour, left/3) // a certificate of minutes may be renewed at once
	case errors.As(err, &api) && (api.Code == vpn.CodeRenewed || api.Code == vpn.CodeYearOver || api.Code == vpn.CodeNotRenewable || api.Code == vpn.CodeNoSigner):
		return renewalRefusedPause // a person may help
	}
	return max(min(renewalFailedPause, left/10), time.Second)
}

func (k *Keeper) hurried() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	hurry := k.hurry
	k.hurry = false
	return hurry
}

// silent notes that nothing comes back, and nobody knows yet why.
func (k *Keeper) silent() {
	k.mu.Lock()
	known := k.state == Retrying // and what is said already says more
	k.mu.Unlock()
	if !known {
		k.trouble(errors.New("nothing comes back through the tunnel: knocking, and asking the gate"))
	}
}

// blocked notes that the gate knows the session, and no handshake gets through.
func (k *Keeper) blocked(t *Tunnel) {
	k.trouble(fmt.Errorf("the gate answers by TCP and knows the session, but not by UDP port %d: a network on the way seems to block it", t.Gate.Port()))
	k.mu.Lock()
	defer k.mu.Unlock()
	k.data = DataBlocked
	k.noteLocked()
}

// refuse notes that only another certificate helps. The interface stays: without it, what programs send to the proxy
// would leave outside the tunnel.
func (k *Keeper) refuse(err error) {
	if err := dropKept(k.options().Profile); err != nil {
		k.Log.Warn("a session that was refused is still kept", "error", err)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.state, k.problem, k.data = Refused, err.Error(), DataUnknown
	k.Log.Error("the gate refuses this profile: nothing more is tried", "error", err)
	k.noteLocked()
}

// trouble notes why the tunnel does not work, and says it once.
func (k *Keeper) trouble(err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	was := k.problem
	if err == nil {
		k.state, k.problem = Up, ""
	} else {
		k.state, k.problem = Retrying, err.Error()
		if k.data == DataConfirmed {
			k.data = DataUnknown
		}
	}
	k.noteLocked()
	if was != k.problem {
		if err == nil {
			k.Log.Info("the tunnel works again")
		} else {
			k.Log.Warn("the tunnel does not work", "error", err)
		}
	}
}

// worry notes what is wrong while the tunnel works.
func (k *Keeper) worry(err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.problem != err.Error() {
		k.problem = err.Error()
		k.Log.Warn("the tunnel works still", "error", err)
	}
}

func (k *Keeper) unconfirmed(t *Tunnel) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.tunnel == t && k.state == Up && k.data != DataConfirmed
}

func (k *Keeper) probe(ctx context.Context, t *Tunnel) {
	ctx, cancel := context.WithTimeout(ctx, probePatience)
	defer cancel()
	err := t.Probe(ctx)
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.tunnel != t || errors.Is(ctx.Err(), context.Canceled) {
		return
	}
	was := k.data
	if k.data = DataConfirmed; err != nil {
		k.data = DataBlocked
	}
	k.noteLocked()
	if k.data == DataBlocked && was != k.data {
		k.Log.Warn(fmt.Sprintf("the proxy does not answer through the tunnel: UDP port %d seems blocked on the way", t.Gate.Port()), "error", err)
	}
}
