package firewall

import (
	"fmt"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"perimeterd/knock"
)

// A configuration on trial takes itself back: the base chains go to its rules only while an element of the set trial lives,
// which the kernel expires. So the last good rules come back on time whatever becomes of this process. With an allow list
// that the operator cuts himself off by, of a table in guard mode:
//
//	set trial { type nf_proto; size 65536; flags timeout; }
//	chain input {
//		type filter hook input priority filter - 5; policy accept;
//		meta nfproto @trial goto trial
//		goto input_good
//	}
//	chain trial {
//		jump input_next
//		drop
//	}
//
// The chains of the next configuration and the sets that it decides end in _next. Windows, tokens and sessions are common.

// next is a configuration on trial.
type next struct {
	cfg   Config
	until time.Time
}

const (
	goodSuffix = "_good"
	nextSuffix = "_next"
)

// trialState lies above every state of an automaton and below its classes, so that progress under one configuration means
// nothing under the other.
const trialState = 1 << (knock.ClassShift - 1)

// Try makes the kernel judge by trial until the time given, and by good from then on. Apply ends it before. Windows that
// open meanwhile are no longer than good would have them, since they outlive the trial.
func (f *Firewall) Try(good, trial Config, until time.Time) error {
	if life := time.Until(until); life < time.Second {
		return fmt.Errorf("a trial of %v is too short to confirm it: take a minute", life)
	}
	if trial.Mode != Guard && trial.Mode != Host {
		return fmt.Errorf("firewall.mode %q: want %q or %q", trial.Mode, Guard, Host)
	}
	trial.Window = min(trial.Window, good.Window)
	f.mu.Lock()
	defer f.mu.Unlock()
	_, err := f.replaceLocked(good, &next{trial, until})
	return err
}

// rulingLocked is the configuration that the kernel judges by.
func (f *Firewall) rulingLocked(now time.Time) Config {
	if f.next != nil && now.Before(f.next.until) {
		return f.next.cfg
	}
	return f.cfg
}

// buildTrial writes both configurations, and what chooses between them.
func (b *builder) buildTrial(good Config, next next, now time.Time) {
	trial := &nftables.Set{Name: "trial", KeyType: nftables.TypeNFProto, HasTimeout: true, Size: setSize} // so that nobody thinks it full
	b.set(trial)
	b.base = goodSuffix
	b.build(good)
	b.base, b.suffix = nextSuffix, nextSuffix
	b.build(next.cfg)

	choose := func(hook, trial string) {
		b.conn.AddRule(&nftables.Rule{Table: b.table, Chain: b.names[hook], Exprs: join(
			load(expr.MetaKeyNFPROTO, regKey), b.lookup("trial"), verdict(expr.VerdictGoto, trial))})
		b.conn.AddRule(&nftables.Rule{Table: b.table, Chain: b.names[hook], Exprs: verdict(expr.VerdictGoto, hook+goodSuffix)})
	}
	// What the rules leave undecided is not the policy's to decide, which is the good configuration's.
	policy := accept()
	if next.cfg.Mode == Host {
		policy = drop()
	}
	b.base, b.suffix = "", ""
	b.chain("trial")
	b.rule("trial", verdict(expr.VerdictJump, "input"+nextSuffix))
	b.rule("trial", policy)
	choose("input", "trial")
	choose("output", "output"+nextSuffix)

	b.conn.FlushSet(trial)
	if life := next.until.Sub(now); life >= time.Millisecond {
		err := b.conn.SetAddElements(trial, []nftables.SetElement{
			{Key: []byte{unix.NFPROTO_IPV4}, Timeout: life}, {Key: []byte{unix.NFPROTO_IPV6}, Timeout: life}})
		if err != nil && b.err == nil {
			b.err = err
		}
	}
}

// state numbers a state of the automaton as this configuration's.
func (b *builder) state(s uint32) uint32 {
	if b.suffix == "" || s == 0 || s&knock.Complete != 0 {
		return s
	}
	return s | trialState
}
