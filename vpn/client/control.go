package client

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// ErrDown is returned when no process keeps the profile's tunnel.
var ErrDown = errors.New("the tunnel is down: bring it up: vpn up")

// ErrRunning is returned by Serve when another process keeps the profile's tunnel.
var ErrRunning = errors.New("another process keeps this tunnel")

// Requests to the process that keeps a tunnel, one JSON line each; it answers with one Answer.
const (
	doStatus = "status" // at once
	doUp     = "up"     // when the tunnel is up and not known to be blocked; it then stays up
	doHold   = "hold"   // when data pass for sure; a tunnel raised for holders, and a local listener of its own, stay while this connection does
	doRenew  = "renew"  // when the certificate was renewed, or not
	doDown   = "down"   // when the tunnel is down; the connection ends with the process
)

type controlRequest struct {
	Do   string        `json:"do"`
	Wait time.Duration `json:"wait,omitempty"` // for up, hold and renew: how long at most
}

// Answer is what the process says to a request. To a holder it says a second one, with an error, when the tunnel has ended for
// good before he left.
type Answer struct {
	Status Status `json:"status"`
	Error  string `json:"error,omitempty"`
	Proxy  string `json:"proxy,omitempty"` // its URL on this machine, for who asked; it may hold a credential
}

// holdGrace is how long a tunnel raised for a command waits for the command.
const holdGrace = 10 * time.Second

// LogFile is where the profile's background process writes.
func LogFile(p *Profile) (string, error) { return stateFile(p, ".log") }

// BrowserDir is where a browser of that kind keeps what belongs to the profile's windows.
func BrowserDir(p *Profile, kind string) (string, error) {
	dir, err := stateFile(p, "."+kind)
	if err != nil {
		return "", err
	}
	return dir, os.MkdirAll(dir, 0o700)
}

// stateFile names what belongs to one tunnel: of one user and device at one gate, wherever the profile's file lies.
func stateFile(p *Profile, suffix string) (string, error) {
	dir, err := makeDir()
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, p.Name()+"-"+p.ServerID[:8]+suffix), nil
}

// socketFile is below XDG_RUNTIME_DIR where there is one: a socket's path is at most about 100 bytes long.
func socketFile(p *Profile) (string, error) {
	run := os.Getenv("XDG_RUNTIME_DIR")
	if run == "" {
		return stateFile(p, ".sock")
	}
	dir := filepath.Join(run, "perimeter")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("XDG_RUNTIME_DIR: %w", unwritable(err))
	}
	return filepath.Join(dir, p.Name()+"-"+p.ServerID[:8]+".sock"), nil
}

// Server keeps one profile's tunnel in this process, and answers other processes about it.
type Server struct {
	Keeper *Keeper
	Held   bool // the tunnel is for holders: it ends with the last one

	local   *Local // for the user
	mu      sync.Mutex
	holders int
	change  chan struct{} // closed and replaced at each change of Held and holders
	ready   chan struct{} // closed when the first session is up, or not
	failed  error
	ended   chan struct{} // closed when the tunnel is down
}

// Serve takes the profile's lock, brings the tunnel up, calls ready, and keeps the tunnel until ctx ends, someone asks
// for its end or its last holder leaves. The lock is the truth of one process a profile: it goes with the process, and
// what else a killed process left is replaced.
func (s *Server) Serve(ctx context.Context, ready func(Status)) error {
	p := s.Keeper.Profile
	lockName, err := stateFile(p, ".lock")
	if err != nil {
		return err
	}
	lock, err := os.OpenFile(lockName, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return unwritable(err)
	}
	defer lock.Close()
	if err := lockFile(lock, false); errors.Is(err, errLocked) {
		return ErrRunning
	} else if err != nil {
		return fmt.Errorf("%s: %w", lockName, err)
	}
	socket, err := socketFile(p)
	if err != nil {
		return err
	}
	// Clients find the socket by this, whatever their environment says.
	lock.Truncate(0)
	if _, err := lock.WriteAt([]byte(socket+"\n"), 0); err != nil {
		return unwritable(err)
	}
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// Packets are under way while the listeners are made.
	started := make(chan error, 1)
	go func() { started <- s.Keeper.Start(ctx) }()
	abandon := func(err error) error {
		cancel()
		if <-started == nil {
			s.Keeper.Stop()
		}
		return err
	}
	listener, err := net.Listen("unix", socket) // its directory lets only the owner in
	if err != nil {
		return abandon(fmt.Errorf("control socket: %w", err))
	}
	defer listener.Close()
	if err := os.Chmod(socket, 0o600); err != nil {
		return abandon(err)
	}
	port, lost, err := listenLocal(p)
	if err != nil {
		return abandon(err)
	}
	defer port.Close()
	s.local = newLocal(port, s.Keeper, false)
	s.change, s.ready, s.ended = make(chan struct{}), make(chan struct{}), make(chan struct{})
	var talks sync.WaitGroup
	// The last holder's end leaves the session standing for the next one; somebody's word ends it.
	var left, down atomic.Bool
	leave := func() { left.Store(true); cancel() }
	end := func() { down.Store(true); cancel() }
	talks.Go(func() { s.local.run(ctx) })
	go func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			talks.Go(func() { s.talk(ctx, c, leave, end) })
		}
	}()
	defer func() { // whoever waits for an answer gets it before the process ends
		cancel()
		listener.Close()
		close(s.ended)
		talks.Wait()
	}()

	s.failed = <-started
	if lost != 0 { // any user may take it while the tunnel is down, and browsers and shells still go there
		told := fmt.Sprintf("another program has 127.0.0.1:%d, so the proxy is %v from now on: what is set to the old one talks to that program", lost, port.Addr())
		s.Keeper.Log.Warn(told)
		if s.Keeper.Progress != nil {
			s.Keeper.Progress(told)
		}
	}
	close(s.ready)
	if s.failed != nil {
		return s.failed
	}
	defer func() {
		if left.Load() && !down.Load() {
			s.Keeper.Leave()
		} else {
			s.Keeper.Stop()
		}
	}()
	defer cancel() // first nobody uses it any more
	ready(s.status())
	s.mu.Lock()
	held := s.Held
	s.mu.Unlock()
	if held {
		go s.watchHolders(ctx, leave)
	} else {
		s.local.spares.fill()
	}
	return s.Keeper.Run(ctx)
}

// watchHolders ends a held tunnel after its last holder.
func (s *Server) watchHolders(ctx context.Context, end func()) {
	grace := time.After(holdGrace)
	seen, late := false, false
	for {
		s.mu.Lock()
		held, holders, change := s.Held, s.holders, s.change
		s.mu.Unlock()
		seen = seen || holders > 0
		if !held {
			return
		}
		if holders == 0 && (seen || late) {
			end()
			return
		}
		select {
		case <-change:
		case <-grace:
			late = true
		case <-ctx.Done():
			return
		}
	}
}

// status is the keeper's, and of this process.
func (s *Server) status() Status {
	status := s.Keeper.Status()
	status.PID, status.Listen = os.Getpid(), s.local.at
	return status
}

// leave is a holder's end. With the last one a held tunnel ends, and nobody hears any more that it is up.
func (s *Server) leave(end func()) {
	s.update(func() {
		if s.holders--; s.holders == 0 && s.Held {
			end()
		}
	})
}

func (s *Server) update(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
	close(s.change)
	s.change = make(chan struct{})
}

func (s *Server) talk(ctx context.Context, c net.Conn, leave, end func()) {
	hangUp := c.Close
	defer func() { hangUp() }()
	c.SetReadDeadline(time.Now().Add(time.Second))
	in := bufio.NewReaderSize(c, 1024)
	line, err := in.ReadSlice('\n') // longer than the buffer is an error
	if err != nil {
		return
	}
	c.SetDeadline(time.Time{})
	var req controlRequest
	if err := json.Unmarshal(line, &req); err != nil {
		return
	}
	proxy := s.local.url
	answer := func(err error) {
		a := Answer{Status: s.status(), Proxy: proxy}
		if err != nil {
			a.Error = err.Error()
		}
		c.SetWriteDeadline(time.Now().Add(time.Second))
		json.NewEncoder(c).Encode(a)
	}
	// await answers when the tunnel can be used, or cannot, and returns which. On its way down the process says nothing.
	gone, leaving := context.WithCancel(ctx)
	defer leaving()
	await := func(sure bool) bool {
		go func() { in.ReadByte(); leaving() }()
		<-s.ready
		err := s.failed
		if err == nil {
			waiting, cancel := context.WithTimeout(gone, req.Wait)
			defer cancel()
			err = s.Keeper.Await(waiting, sure)
		}
		if ctx.Err() == nil || s.failed != nil {
			answer(err)
		}
		return err == nil
	}
	switch req.Do {
	case doStatus:
		if ctx.Err() != nil { // it is on its way down, and says nothing
			return
		}
		select {
		case <-s.ready:
			answer(s.failed)
		default:
			json.NewEncoder(c).Encode(Answer{Status: s.status()})
		}
	case doUp:
		s.update(func() { s.Held = false })
		await(false)
	case doHold:
		s.update(func() { s.holders++ })
		defer s.leave(leave)
		l, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			answer(err)
			return
		}
		own := newLocal(l, s.Keeper, true)
		var serving sync.WaitGroup
		serving.Go(func() { own.run(gone) })
		defer func() { leaving(); serving.Wait() }()
		if proxy = own.url; !await(true) {
			return
		}
		own.spares.fill()
		if why := s.Keeper.awaitRefusal(gone); why != "" {
			answer(errors.New(why))
		}
		<-gone.Done()
		if ctx.Err() != nil {
			<-s.ended
		}
	case doRenew:
		<-s.ready
		err := s.failed
		if err == nil {
			waiting, cancel := context.WithTimeout(ctx, req.Wait)
			defer cancel()
			err = s.Keeper.Renew(waiting)
		}
		answer(err)
	case doDown:
		end()
		<-s.ended
		c.SetWriteDeadline(time.Now().Add(time.Second))
		json.NewEncoder(c).Encode(Answer{Status: Status{State: "down", Profile: s.Keeper.Profile.Name()}})
		hangUp = func() error { return nil } // its end tells the other side that this process is gone
	}
}

// ask sends a request and waits for the answer. The connection stays open.
func ask(ctx context.Context, p *Profile, req controlRequest) (net.Conn, Answer, error) {
	var a Answer
	lockName, err := stateFile(p, ".lock")
	if err != nil {
		return nil, a, err
	}
	socket, err := os.ReadFile(lockName)
	if err != nil || len(socket) == 0 {
		return nil, a, ErrDown
	}
	c, err := (&net.Dialer{}).DialContext(ctx, "unix", strings.TrimSpace(string(socket)))
	if err != nil {
		return nil, a, ErrDown // nobody listens: its process is gone
	}
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	err = json.NewEncoder(c).Encode(req)
	if err == nil {
		err = json.NewDecoder(c).Decode(&a)
		a.Status.URL = a.Proxy
	}
	switch {
	case ctx.Err() != nil:
		err = fmt.Errorf("the process that keeps the tunnel does not answer: see its log, or kill it: fuser -k %s", lockName)
	case err != nil:
		err = ErrDown // it ended in between
	case a.Error != "":
		err = errors.New(a.Error)
	}
	if err != nil {
		c.Close()
		return nil, a, err
	}
	return c, a, nil
}

// AskStatus asks the profile's process how the tunnel is; ErrDown when there is none.
func AskStatus(ctx context.Context, p *Profile) (Status, error) {
	c, a, err := ask(ctx, p, controlRequest{Do: doStatus})
	if err != nil {
		return Status{}, err
	}
	c.Close()
	return a.Status, nil
}

// AskUp waits for the tunnel of a process that runs already to be up and not known to be blocked, so long at most, and
// makes it stay; ErrDown when there is none.
func AskUp(ctx context.Context, p *Profile, wait time.Duration) (Status, error) {
	c, a, err := ask(ctx, p, controlRequest{doUp, wait})
	if err != nil {
		return Status{}, err
	}
	c.Close()
	return a.Status, nil
}

// AskRenew has the profile's process renew the certificate, and waits so long at most; ErrDown when there is none.
func AskRenew(ctx context.Context, p *Profile, wait time.Duration) error {
	c, _, err := ask(ctx, p, controlRequest{doRenew, wait})
	if err != nil {
		return err
	}
	return c.Close()
}

// AskDown ends the profile's process and waits for it; ErrDown when there is none.
func AskDown(ctx context.Context, p *Profile) error {
	c, _, err := ask(ctx, p, controlRequest{Do: doDown})
	if err != nil {
		return err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	io.Copy(io.Discard, c)
	return ctx.Err()
}

// Held keeps a tunnel up.
type Held struct {
	Status Status // its URL is a proxy's that is the holder's alone
	conn   net.Conn
}

// Hold waits until data pass through the tunnel for sure, so long at most, and keeps a tunnel up that was raised with Held,
// until it is released; ErrDown when there is none.
func Hold(ctx context.Context, p *Profile, wait time.Duration) (*Held, error) {
	c, a, err := ask(ctx, p, controlRequest{doHold, wait})
	if err != nil {
		return nil, err
	}
	return &Held{a.Status, c}, nil
}

// Lost returns why nothing goes through the tunnel any more, or nil when it was released. Gone: the process that kept it is no
// more, and its proxy neither.
func (h *Held) Lost() (err error, gone bool) {
	var a Answer
	if json.NewDecoder(h.conn).Decode(&a) == nil {
		return errors.New(a.Error), false
	}
	return errors.New("its process has ended"), true
}

// Release returns when the tunnel is not called up any more, if nobody else holds it. What it takes to end the session is done
// behind its back.
func (h *Held) Release() {
	h.conn.SetDeadline(time.Now().Add(endPatience))
	if h.conn.(*net.UnixConn).CloseWrite() == nil {
		io.Copy(io.Discard, h.conn)
	}
	h.conn.Close()
}

// Environment is what makes programs use the proxy and, for names of this machine and of the cloud's metadata, not.
func Environment(s Status) []string {
	proxy := s.URL
	const direct = "localhost,127.0.0.1,::1,169.254.169.254,169.254.170.2"
	return []string{
		"HTTP_PROXY=" + proxy, "HTTPS_PROXY=" + proxy, "http_proxy=" + proxy, "https_proxy=" + proxy,
		"NO_PROXY=" + direct, "no_proxy=" + direct,
	}
}
