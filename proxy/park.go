package proxy

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// parking is where silent directions of tunnels wait: one goroutine waits for all of them, in an epoll of its own. A
// goroutine for each would cost them 2.5 KB, as much as all else of them together. Those who talk know nothing of it: it is
// the sweep that disturbs who has been silent from one time to the next.
type parking struct {
	poll *os.File
	raw  syscall.RawConn

	mu    sync.Mutex
	last  uint64
	flows map[uint64]*flow // by ticket; who takes one out runs it
}

func newParking() (*parking, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err == nil {
		err = unix.SetNonblock(fd, true) // so that the runtime's poller takes it
	}
	if err != nil {
		return nil, fmt.Errorf("proxy: epoll: %w", err)
	}
	p := &parking{poll: os.NewFile(uintptr(fd), "epoll"), flows: map[uint64]*flow{}}
	p.raw, err = p.poll.SyscallConn()
	return p, err
}

// run wakes those to whom something comes, until close.
func (p *parking) run() {
	var events [256]unix.EpollEvent
	for {
		n := 0
		err := p.raw.Read(func(fd uintptr) bool {
			n, _ = unix.EpollWait(int(fd), events[:], 0)
			return n > 0
		})
		if err != nil {
			return
		}
		for _, e := range events[:n] {
			p.wake(uint64(uint32(e.Fd)) | uint64(uint32(e.Pad))<<32)
		}
	}
}

func (p *parking) close() { p.poll.Close() }

// enter parks a flow. If it reports true, the flow is somebody else's to run from then on, and may be running already.
func (p *parking) enter(f *flow) bool {
	p.mu.Lock()
	operation := unix.EPOLL_CTL_MOD
	if f.ticket == 0 {
		operation = unix.EPOLL_CTL_ADD
		p.last++
		f.ticket = p.last
	}
	ticket := f.ticket
	p.flows[ticket] = f
	f.quiet.Store(true)
	p.mu.Unlock()
	if operation == unix.EPOLL_CTL_ADD {
		f.src.conn.SetKeepAliveConfig(apart()) // who talks has no need of it, and most tunnels never come here
	}
	// Once: what else comes is for who runs it then. A socket that is closed leaves the list by itself.
	event := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLRDHUP | unix.EPOLLONESHOT, Fd: int32(uint32(ticket)), Pad: int32(uint32(ticket >> 32))}
	var failed error
	err := f.src.raw.Control(func(fd uintptr) {
		if err := p.raw.Control(func(epoll uintptr) { failed = unix.EpollCtl(int(epoll), operation, int(fd), &event) }); err != nil {
			failed = err
		}
	})
	if err == nil && failed == nil {
		return true
	}
	// Closed meanwhile, or the kernel has no room: it goes on by itself, unless somebody has been faster.
	return p.take(ticket) == nil
}

// apart is keepAlive, from a time that others do not share. Tunnels that began at once, as after a restart, would be asked at once:
// the kernel has one tick for what is due within two seconds. A thousand fit the queue of a device (netdev_max_backlog); the
// rest would be lost, in step with each other time after time, and the tunnels be taken for dead.
func apart() net.KeepAliveConfig {
	c := keepAlive
	c.Idle += rand.N(keepAlive.Idle)
	return c
}

// take is the flow with this ticket, if it is parked; then it is the caller's to run.
func (p *parking) take(ticket uint64) *flow {
	p.mu.Lock()
	defer p.mu.Unlock()
	f := p.flows[ticket]
	if f != nil {
		delete(p.flows, ticket)
		f.quiet.Store(false)
	}
	return f
}

func (p *parking) wake(ticket uint64) {
	if f := p.take(ticket); f != nil {
		go f.run()
	}
}

// wakeFlow is wake for one whose ticket only its own goroutine may read.
func (p *parking) wakeFlow(f *flow) {
	p.mu.Lock()
	ticket := f.ticket
	p.mu.Unlock()
	p.wake(ticket)
}

func (p *parking) count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.flows)
}
