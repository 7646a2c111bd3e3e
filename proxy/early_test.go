package proxy

import (
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A listener that another process left, of a version that asked for less, listens already when it is prepared.
func TestListenerOfBeforeTakesARequestWithTheFirstPacket(t *testing.T) {
	const setting, synData = "/proc/sys/net/ipv4/tcp_fastopen", 32 // TCPI_OPT_SYN_DATA
	was, err := os.ReadFile(setting)
	if err == nil {
		err = os.WriteFile(setting, []byte("3"), 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer os.WriteFile(setting, was, 0)
	lc := net.ListenConfig{}
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(t.Context(), "tcp4", bastion+":0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	f, err := l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	at := unix.SockaddrInet4{Port: l.Addr().(*net.TCPAddr).Port, Addr: [4]byte{10, 77, 0, 1}}
	for _, prepared := range []bool{false, true} {
		if prepared {
			if l, err = Adopt(f); err != nil {
				t.Fatal(err)
			}
			defer l.Close()
		}
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_FASTOPEN_NO_COOKIE, 1); err != nil {
			t.Fatal(err)
		}
		if err := unix.Sendto(fd, []byte("request"), unix.MSG_FASTOPEN, &at); err != nil {
			t.Fatal(err)
		}
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(time.Minute))
		said := make([]byte, 100)
		if n, err := c.Read(said); err != nil || string(said[:n]) != "request" {
			t.Errorf("prepared %v: %q, %v", prepared, said[:n], err)
		}
		info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		if err != nil {
			t.Fatal(err)
		}
		if with := info.Options&synData != 0; with != prepared {
			t.Errorf("prepared %v: taken with the first packet: %v", prepared, with)
		}
	}
}
