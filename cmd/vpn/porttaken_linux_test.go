package main

import (
	"fmt"
	"net"
	"os"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Any user of the machine may have the port while the tunnel is down. What is set to it would go on talking to him.
func TestPortThatAnotherProgramTookIsTold(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	alice := w.person(4711)
	alice.run(0, "vpn", "import", "sent")
	if _, said := alice.run(0, "vpn", "up"); strings.Contains(said, "another program") {
		t.Errorf("the first time: %s", said)
	}
	alice.run(0, "vpn", "down")
	taken := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with this goroutine
		ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", w.clientPID))
		if err == nil {
			err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
			ns.Close()
		}
		unix.SetfsuidRetUid(4712)
		if err == nil {
			var l net.Listener
			if l, err = net.Listen("tcp4", "127.0.0.1:3128"); err == nil {
				t.Cleanup(func() { l.Close() })
			}
		}
		taken <- err
	}()
	if err := <-taken; err != nil {
		t.Fatal(err)
	}
	_, said := alice.run(0, "vpn", "up")
	if !strings.Contains(said, "another program has 127.0.0.1:3128, so the proxy is 127.0.0.1:3129 from now on") {
		t.Errorf("vpn up said:\n%s", said)
	}
	alice.run(0, "vpn", "down")
	if _, said := alice.run(0, "vpn", "up"); strings.Contains(said, "another program") { // told already
		t.Errorf("the next time: %s", said)
	}
}
