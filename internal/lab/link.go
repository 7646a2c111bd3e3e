//go:build linux

package lab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Direction is the way a packet takes on the link.
type Direction int

const (
	FromClient Direction = iota
	ToClient
)

func (d Direction) String() string { return [...]string{"from client", "to client"}[d] }

// Packet is an IP packet that entered the link.
type Packet struct {
	Direction Direction
	At        time.Time // when it entered; it leaves a delay later
	Data      []byte    // from the IP header on; gone after the call
	Dropped   bool      // by the loss rule or a full queue; not yet decided when the loss rule sees it
}

// Link is the client's cable as a program: two TAP devices, and a goroutine pair each way that holds every packet for
// the delay, in order, in a queue that drops its tail. Neighbour discovery (ARP and its kind in IPv6) is of the local wire, as to a
// home router: it is neither held nor lost nor shown.
type Link struct {
	delay atomic.Int64 // ns

	mu  sync.Mutex // holds each way back while the other asks, so that rules need no lock
	tap func(Packet)
	out func(Packet) bool // the loss rule

	lost, overflowed atomic.Int64

	files []*os.File
	lanes sync.WaitGroup
}

const maxFrame = 1514 // Ethernet header and MTU

type held struct {
	due   time.Time
	frame []byte // of a buffer of maxFrame
}

// newLink makes outside in the client and client in the bridge's namespace; they carry packets once they are up.
func newLink(client, internet *Namespace, delay time.Duration, queue int) (_ *Link, err error) {
	if queue == 0 {
		queue = 1 << 14
	}
	l := &Link{}
	l.SetDelay(delay)
	defer func() {
		if err != nil {
			l.close()
		}
	}()
	var taps, timers [2]*os.File
	for i, end := range []struct {
		ns   *Namespace
		name string
	}{{client, "outside"}, {internet, "client"}} {
		if taps[i], err = openTAP(end.ns, end.name); err != nil {
			return nil, err
		}
		l.files = append(l.files, taps[i])
		// A timer descriptor wakes to the microsecond; time.Sleep in an idle Go program, to the millisecond of epoll_wait.
		fd, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_NONBLOCK|unix.TFD_CLOEXEC)
		if err != nil {
			return nil, os.NewSyscallError("timerfd_create", err)
		}
		timers[i] = os.NewFile(uintptr(fd), "timerfd")
		l.files = append(l.files, timers[i])
	}
	for d := range 2 {
		q := make(chan held, queue)
		from, to, timer := taps[d], taps[1-d], timers[d]
		l.lanes.Go(func() { l.enter(Direction(d), from, to, q) })
		l.lanes.Go(func() { l.leave(to, timer, q) })
	}
	return l, nil
}

func openTAP(ns *Namespace, name string) (*os.File, error) {
	var file *os.File
	err := ns.Do(func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return fmt.Errorf("open /dev/net/tun: %w", err)
		}
		req, err := unix.NewIfreq(name)
		if err != nil {
			return errors.Join(err, unix.Close(fd))
		}
		req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
		if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
			return errors.Join(fmt.Errorf("make %s in %s: %w", name, ns.Name, err), unix.Close(fd))
		}
		file = os.NewFile(uintptr(fd), name) // only now: the poller refuses a descriptor that is not yet a device
		return nil
	})
	return file, err
}

// SetDelay sets the one-way delay of packets that enter from now on; the order of packets stays.
func (l *Link) SetDelay(d time.Duration) { l.delay.Store(int64(max(d, 0))) }

// SetLoss drops the packets for which rule returns true; nil drops none. Rule runs for one packet at a time.
func (l *Link) SetLoss(rule func(Packet) bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.out = rule
}

// OnPacket shows see each packet as it enters, one at a time; nil ends it. A slow see slows the link.
func (l *Link) OnPacket(see func(Packet)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.tap = see
}

// Drops counts what the loss rule took and what found the queue full.
func (l *Link) Drops() (lost, overflowed int64) { return l.lost.Load(), l.overflowed.Load() }

// EveryNth is a loss rule that drops each nth packet of a direction.
func EveryNth(d Direction, n int) func(Packet) bool {
	seen := 0
	return func(p Packet) bool {
		if p.Direction != d {
			return false
		}
		seen++
		return seen%n == 0
	}
}

// Only is a loss rule that drops the nth packet of both directions together, once. Passed says whether there was an nth.
func Only(n int) (rule func(Packet) bool, passed func() bool) {
	var seen atomic.Int64
	return func(Packet) bool { return seen.Add(1) == int64(n) }, func() bool { return seen.Load() >= int64(n) }
}

// enter takes what the device sends into the queue, until the device is closed.
func (l *Link) enter(d Direction, from, to *os.File, queue chan<- held) {
	defer close(queue)
	buf := make([]byte, maxFrame)
	for {
		n, err := from.Read(buf)
		if err != nil {
			return
		}
		now := time.Now()
		frame := buf[:n]
		if ofLocalWire(frame) {
			to.Write(frame) // as on a wire, what the other end cannot take is lost
			continue
		}
		full := len(queue) == cap(queue) // nobody else puts anything in
		if l.drops(Packet{Direction: d, At: now, Data: frame[14:], Dropped: full}) {
			continue
		}
		queue <- held{now.Add(time.Duration(l.delay.Load())), frame}
		buf = make([]byte, maxFrame)
	}
}

func (l *Link) drops(p Packet) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case p.Dropped:
		l.overflowed.Add(1)
	case l.out != nil && l.out(p):
		l.lost.Add(1)
		p.Dropped = true
	}
	if l.tap != nil {
		l.tap(p)
	}
	return p.Dropped
}

// leave hands over what is due. The queue is in order, so a packet that became due earlier, after the delay was lowered, waits
// for those before it.
func (l *Link) leave(to, timer *os.File, queue <-chan held) {
	for h := range queue {
		if wait := time.Until(h.due); wait > 0 && sleep(timer, wait) != nil {
			return
		}
		to.Write(h.frame) // as on a wire
	}
}

// sleep waits on a timer descriptor for d > 0; an error if it was closed meanwhile.
func sleep(timer *os.File, d time.Duration) error {
	conn, err := timer.SyscallConn()
	if err != nil {
		return err
	}
	var setErr error
	if err := conn.Control(func(fd uintptr) {
		setErr = unix.TimerfdSettime(int(fd), 0, &unix.ItimerSpec{Value: unix.NsecToTimespec(int64(d))}, nil)
	}); err != nil {
		return err
	}
	if setErr != nil {
		return os.NewSyscallError("timerfd_settime", setErr)
	}
	var expirations [8]byte
	_, err = timer.Read(expirations[:])
	return err
}

// ofLocalWire tells frames that a router would not forward: other than IP, and IPv6 of link-local scope or neighbour discovery.
func ofLocalWire(frame []byte) bool {
	const header = 14
	if len(frame) < header {
		return true
	}
	ip := frame[header:]
	switch binary.BigEndian.Uint16(frame[12:]) {
	case unix.ETH_P_IP:
		return false
	case unix.ETH_P_IPV6:
		if len(ip) < 41 {
			return true
		}
		src, dst := ip[8:24], ip[24:40]
		discovery := ip[6] == unix.IPPROTO_ICMPV6 && ip[40] >= 133 && ip[40] <= 137
		return discovery || src[0] == 0xfe && src[1]&0xc0 == 0x80 || dst[0] == 0xfe && dst[1]&0xc0 == 0x80 ||
			dst[0] == 0xff && dst[1]&0x0f <= 2
	}
	return true
}

// close takes the devices away, and what is still held with them.
func (l *Link) close() {
	for _, f := range l.files {
		f.Close()
	}
	l.lanes.Wait()
}
