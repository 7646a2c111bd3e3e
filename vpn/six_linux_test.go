package vpn

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Peers of both families share a bind, and each gets what is meant for it.
func TestBothFamiliesShareABind(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("it makes a network namespace: run the tests as root")
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with this goroutine, and the namespace with it
		done <- shareABind()
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func shareABind() error {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return err
	}
	out, err := exec.Command("sh", "-ec", "ip link set lo up; for i in 1 2 3; do ip addr add fd00::$i/128 dev lo nodad; done").CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	b := NewBind()
	if _, _, err := b.Open(0); err != nil {
		return err
	}
	defer b.Close()
	var peers []net.PacketConn
	for _, a := range []string{"127.0.0.1:0", "[fd00::1]:0", "127.0.0.2:0", "[fd00::2]:0", "[fd00::3]:0"} {
		var l net.PacketConn
		for range 100 { // an address may be tentative for a moment, whatever it was told
			if l, err = net.ListenPacket("udp", a); err == nil {
				break
			}
			time.Sleep(20 * time.Millisecond)
		}
		if err != nil {
			return err
		}
		defer l.Close()
		if err := ready(l); err != nil {
			return err
		}
		peers = append(peers, l)
	}
	for i := range 200 {
		for n, l := range peers {
			ep, err := b.ParseEndpoint(l.LocalAddr().String())
			if err != nil {
				return err
			}
			sent := [][]byte{fmt.Appendf(nil, "%d to %d", i, n), []byte("and more")}
			if err := b.Send(sent, ep); err != nil {
				return fmt.Errorf("to %v: %w", l.LocalAddr(), err)
			}
			for _, want := range sent {
				got := make([]byte, 64)
				l.SetReadDeadline(time.Now().Add(5 * time.Second))
				if n, _, err := l.ReadFrom(got); err != nil || !bytes.Equal(got[:n], want) {
					return fmt.Errorf("%v got %q, %v; want %q", l.LocalAddr(), got[:n], err, want)
				}
			}
		}
	}
	return nil
}

// ready waits until what is sent to a fresh address arrives.
func ready(l net.PacketConn) error {
	got := make([]byte, 8)
	for range 100 {
		if _, err := l.WriteTo([]byte("ready?"), l.LocalAddr()); err != nil {
			return err
		}
		l.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		if _, _, err := l.ReadFrom(got); err == nil {
			for err == nil { // some may have come late
				_, _, err = l.ReadFrom(got)
			}
			return nil
		}
	}
	return fmt.Errorf("%v never gets anything", l.LocalAddr())
}
