package firewall

import (
	"context"
	"net/netip"
	"strings"
	"testing"
	"time"

	"perimeterd/knock"
)

// serve listens on a port of the bastion that is not ours.
func (r *room) serve(port uint16) {
	r.t.Helper()
	l, err := r.Bastion.Listen("tcp", netip.AddrPortFrom(r.Bastion.Addr, port).String())
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
}

func (r *room) reaches(port uint16) bool {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	c, err := r.Client.Dial(ctx, "tcp", netip.AddrPortFrom(r.Bastion.Addr, port).String())
	if err == nil {
		c.Close()
	}
	return err == nil
}

func (r *room) eventually(what string, ok func() bool) {
	r.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); {
		if time.Now().After(deadline) {
			r.t.Fatal("never: ", what)
		}
	}
}

func hostMode(t *testing.T, allow ...string) Config {
	t.Helper()
	cfg := example()
	cfg.Mode = Host
	for _, s := range allow {
		a, err := ParseAllow(s)
		if err != nil {
			t.Fatal(err)
		}
		cfg.Allow = append(cfg.Allow, a)
	}
	return cfg
}

func TestRulesThatCutTheOperatorOffTakeThemselvesBackWithoutAProcess(t *testing.T) {
	r := newRoom(t, example())
	r.serve(22)
	if !r.reaches(22) {
		t.Fatal("port 22 is not reached to begin with")
	}
	until := time.Now().Add(3 * time.Second)
	if err := r.fw.Try(example(), hostMode(t), until); err != nil {
		t.Fatal(err)
	}
	cut := !r.reaches(22)
	first := tok(1)
	r.load(Token{first, 42, soon()})
	r.send(r.Client.Addr, first[:])
	opened := r.accepted(r.Client.Addr)
	if time.Now().After(until) {
		t.Fatal("this machine is too slow: the trial is over")
	}
	if !cut {
		t.Error("the trial does not rule: port 22 is reached")
	}
	if !opened {
		t.Error("a token opens nothing while a trial runs")
	}
	r.fw.mu.Lock()
	r.fw.dropLocked() // what the kernel is left with when the daemon is killed
	r.fw.mu.Unlock()
	r.eventually("port 22 is reached again", func() bool { return r.reaches(22) })
	if time.Now().Before(until) {
		t.Error("the trial ended before its time")
	}
	if !r.accepted(r.Client.Addr) {
		t.Error("a window that opened in the trial is gone with it")
	}
	if r.accepted(r.Stranger) {
		t.Error("a stranger is accepted")
	}
}

func TestTrialOfGuardModeIsNotDecidedByTheGoodPolicy(t *testing.T) {
	good := hostMode(t, "22/tcp")
	r := newRoom(t, good)
	r.serve(22)
	r.serve(8080)
	if r.reaches(8080) {
		t.Fatal("host mode lets port 8080 through")
	}
	if err := r.fw.Try(good, example(), time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	if !r.reaches(8080) || !r.reaches(22) {
		t.Error("guard mode on trial does not let other ports through")
	}
	if _, err := r.fw.Apply(good); err != nil {
		t.Fatal(err)
	}
	if r.reaches(8080) || !r.reaches(22) {
		t.Error("after the rollback the good rules do not rule")
	}
}

func TestConfirmedAndRolledBackTablesAreAsIfThereHadBeenNoTrial(t *testing.T) {
	good, trial := withSequence(t), hostMode(t, "22/tcp", "icmp")
	trial.Trusted = []netip.Prefix{netip.MustParsePrefix("198.18.9.0/24")}
	trial.Sequences = []knock.Sequence{sequence(t, "7001", "9007", "8003")}
	trial.EgressIPv6 = true
	r := newRoom(t, trial)
	confirmed := r.listing()
	if _, err := r.fw.Apply(good); err != nil {
		t.Fatal(err)
	}
	before := r.listing()
	for _, end := range []struct {
		what string
		cfg  Config
		want string
	}{{"rolled back", good, before}, {"confirmed", trial, confirmed}} {
		if err := r.fw.Try(good, trial, time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		if r.listing() == before {
			t.Fatal("a trial changes nothing")
		}
		if _, err := r.fw.Apply(end.cfg); err != nil {
			t.Fatal(err)
		}
		diff(t, end.what, end.want, r.listing())
	}
}

func TestEachConfigurationHasItsOwnSequences(t *testing.T) {
	good, trial := withSequence(t), withSequence(t)
	trial.Sequences = []knock.Sequence{sequence(t, "7001", "9007", "8003")}
	var old []string // as knockd's client writes them
	for _, p := range good.Sequences[0].Ports {
		old = append(old, strings.Replace(p.String(), "/", ":", 1))
	}
	r := newRoom(t, good)
	r.stockKnock(old[0], old[1])
	if err := r.fw.Try(good, trial, time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	r.stockKnock(old[2])
	if r.accepted(r.Client.Addr) {
		t.Error("progress in the good sequence opens in the trial")
	}
	r.stockKnock(old[0], old[1], old[2])
	if r.accepted(r.Client.Addr) {
		t.Error("the good sequence opens in the trial")
	}
	r.stockKnock("7001", "9007", "8003")
	if !r.accepted(r.Client.Addr) {
		t.Error("the trial's sequence does not open")
	}
}

func TestProgressOfOneTrialIsNoneInTheNext(t *testing.T) {
	good, first, second := example(), example(), example()
	first.Sequences = []knock.Sequence{sequence(t, "7001", "9007", "8003")}
	second.Sequences = []knock.Sequence{sequence(t, "1111", "2222", "3333")}
	r := newRoom(t, good)
	if err := r.fw.Try(good, first, time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	r.stockKnock("7001", "9007")
	if _, err := r.fw.Apply(good); err != nil {
		t.Fatal(err)
	}
	if err := r.fw.Try(good, second, time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	r.stockKnock("3333")
	if r.accepted(r.Client.Addr) {
		t.Error("two knocks of one trial and the last of another opened")
	}
}

func TestWindowsOfATrialAreNoLongerThanTheGoodOnes(t *testing.T) {
	good, trial := example(), withSequence(t)
	good.Window, trial.Window = 2*time.Second, time.Hour
	r := newRoom(t, good)
	if err := r.fw.Try(good, trial, time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	r.stockKnock("7102", "19044:udp", "33127")
	windows, err := r.fw.Windows()
	if err != nil || len(windows) != 1 || time.Until(windows[0].Expires) > good.Window {
		t.Errorf("%+v %v", windows, err)
	}
}

func TestTrialSurvivesADeletedTableWithWhatIsLeftOfItsTime(t *testing.T) {
	r := newRoomWith(t, example(), true)
	r.serve(22)
	until := time.Now().Add(4 * time.Second)
	if err := r.fw.Try(example(), hostMode(t), until); err != nil {
		t.Fatal(err)
	}
	r.nft("delete table inet perimeterd")
	if done := r.repaired(); done.took == 0 {
		t.Error("not noticed")
	}
	cut := !r.reaches(22)
	if time.Now().After(until) {
		t.Fatal("this machine is too slow: the trial is over")
	}
	if !cut {
		t.Error("the repaired table forgot the trial")
	}
	r.eventually("port 22 is reached again", func() bool { return r.reaches(22) })
	if time.Now().Before(until) {
		t.Error("the trial ended before its time")
	}
	if again := r.repaired(); again.took != 0 {
		t.Errorf("the end of a trial is taken for drift: %+v", again)
	}
}

func TestTrialTooShortToConfirmIsRefused(t *testing.T) {
	f := applied(t, example())
	if err := f.Try(example(), hostMode(t), time.Now()); err == nil {
		t.Error("accepted")
	}
	if err := f.Try(example(), Config{Mode: "gaurd"}, time.Now().Add(time.Minute)); err == nil {
		t.Error("a mode that does not exist is accepted")
	}
}
