//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"perimeterd/internal/lab"
	"perimeterd/internal/lab/roster"
)

// batch is how many knock at a time, half of each kind.
const batch = 32

// tally is what became of the knocks so far.
type tally struct {
	tokens, tokensOpened       int
	sequences, sequencesOpened int
	openBefore                 int // the door was open before the knock
}

func (t tally) since(before tally) tally {
	return tally{t.tokens - before.tokens, t.tokensOpened - before.tokensOpened,
		t.sequences - before.sequences, t.sequencesOpened - before.sequencesOpened, t.openBefore - before.openBefore}
}

func (t tally) print(before tally, took time.Duration) {
	t = t.since(before)
	fmt.Printf("in %v: %d of %d tokens opened, %d of %d sequences; %d found the door open\n",
		took.Round(time.Second), t.tokensOpened, t.tokens, t.sequencesOpened, t.sequences, t.openBefore)
}

// check allows for one knock of a thousand that a loaded machine loses.
func (t tally) check(before tally) error {
	t = t.since(before)
	if lost := t.tokens - t.tokensOpened + t.sequences - t.sequencesOpened; lost*1000 > t.tokens+t.sequences || t.openBefore > 0 {
		return fmt.Errorf("%d knocks opened nothing, %d found the door open", lost, t.openBefore)
	}
	return nil
}

// crowd knocks, each from an address of its own.
type crowd struct {
	to     netip.Addr
	users  *roster.Roster
	k      *lab.Knocker
	source func() netip.Addr
	rate   int
	tally  tally
}

// Source ports of the SYN before a knock and of those after it.
const before, after = 9999, 10000

type visitor struct {
	source   netip.Addr
	knock    lab.Knock
	token    bool
	answered <-chan uint16
	forget   func()
}

// knock has n knock at the crowd's rate. A SYN goes ahead, which must stay unanswered, and others follow, until one is.
func (c *crowd) knock(ctx context.Context, n int) error {
	next := time.Now()
	for done := 0; done < n; {
		size := min(batch, n-done)
		if err := c.batch(ctx, size); err != nil {
			return err
		}
		done += size
		next = next.Add(time.Duration(size) * time.Second / time.Duration(c.rate))
		select {
		case <-time.After(time.Until(next)):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

func (c *crowd) batch(ctx context.Context, size int) error {
	gate := netip.AddrPortFrom(c.to, c.users.Config.Firewall.GatePorts[0])
	syn := func(v *visitor, port uint16) error {
		return c.k.Send(lab.SYN4(netip.AddrPortFrom(v.source, port), gate), c.to)
	}
	visitors := make([]*visitor, 0, size)
	defer func() {
		for _, v := range visitors {
			v.forget()
		}
	}()
	rounds := 1
	for i := range size {
		v := &visitor{source: c.source(), token: i%2 == 0}
		if v.token {
			token, err := c.users.Next(ctx)
			if err != nil {
				return err
			}
			v.knock = c.users.TokenKnock(v.source, c.to, token)
			c.tally.tokens++
		} else {
			v.knock = c.users.SequenceKnock(v.source, c.to)
			c.tally.sequences++
		}
		v.answered, v.forget = c.k.Expect(v.source, 0)
		visitors, rounds = append(visitors, v), max(rounds, len(v.knock.Packets))
		if err := syn(v, before); err != nil {
			return err
		}
	}
	for step := range rounds {
		for _, v := range visitors {
			if step < len(v.knock.Packets) {
				if err := c.k.Send(v.knock.Packets[step], c.to); err != nil {
					return err
				}
			}
		}
		time.Sleep(2 * time.Millisecond) // or packets of one source could overtake each other on two CPUs
	}
	var errs []error
	for _, v := range visitors {
		errs = append(errs, syn(v, after))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	for _, v := range visitors {
		if err := c.await(ctx, v, func() error { return syn(v, after) }); err != nil {
			return err
		}
	}
	return nil
}

// await counts what becomes of a visitor, for a second at most.
func (c *crowd) await(ctx context.Context, v *visitor, again func() error) error {
	for range 50 {
		select {
		case port := <-v.answered:
			switch {
			case port == before:
				c.tally.openBefore++
			case v.token:
				c.tally.tokensOpened++
			default:
				c.tally.sequencesOpened++
			}
			return nil
		case <-time.After(20 * time.Millisecond):
			if err := again(); err != nil {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}
