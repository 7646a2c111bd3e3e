package console

import (
	"context"
	"log/slog"
	"maps"
	"slices"
	"time"
)

// A set is filling when it is 80 % full, and well again below 70 %: what hovers about one mark is said once. A full set
// refuses what should be added: the door stays closed to those who knock.
const (
	alarmAbove = 0.8
	alarmBelow = 0.7
	alarmEvery = 10 * time.Second
)

func ratio(f Fill) float64 { return float64(f.Elements) / float64(f.Size) }

// Alarm warns before a set of the firewall's table is full.
type Alarm struct {
	sets    Sets
	log     *slog.Logger
	filling map[string]bool
	failed  string // what reading them failed with last
}

// NewAlarm makes an Alarm; Run looks.
func NewAlarm(sets Sets, log *slog.Logger) *Alarm {
	return &Alarm{sets: sets, log: log, filling: map[string]bool{}}
}

// Run looks at the sets every ten seconds, until ctx ends.
func (a *Alarm) Run(ctx context.Context) error {
	tick := time.NewTicker(alarmEvery)
	defer tick.Stop()
	for {
		a.look()
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func (a *Alarm) look() {
	fill, err := a.sets.Fill()
	if err != nil {
		if err.Error() != a.failed {
			a.failed = err.Error()
			a.log.Error("sets of the nftables table not read: nobody warns before one is full", "err", err)
		}
		return
	}
	a.failed = ""
	for _, set := range slices.Sorted(maps.Keys(fill)) {
		f := fill[set]
		if f.Size <= 0 {
			continue
		}
		switch r := ratio(f); {
		case r >= alarmAbove && !a.filling[set]:
			a.filling[set] = true
			a.log.Warn("a set of the nftables table is filling: full, it refuses knocks", "set", set, "elements", f.Elements, "size", f.Size)
		case r < alarmBelow && a.filling[set]:
			delete(a.filling, set)
			a.log.Info("a set of the nftables table has room again", "set", set, "elements", f.Elements, "size", f.Size)
		}
	}
}
