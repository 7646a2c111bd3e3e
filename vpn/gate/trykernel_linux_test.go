package gate

import (
	"errors"
	"runtime"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The unit leaves the service CAP_NET_ADMIN, and no namespaces.
func TestKernelIsTriedWithTheServicesCapabilitiesAlone(t *testing.T) {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with this goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			set := [2]unix.CapUserData{{Effective: 1 << unix.CAP_NET_ADMIN, Permitted: 1 << unix.CAP_NET_ADMIN}}
			err = unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &set[0])
		}
		if err == nil {
			if err = tryKernel(); errors.Is(err, unix.EOPNOTSUPP) { // a kernel that has none says so
				err = nil
			}
		}
		if _, left := netlink.LinkByName(tryName); err == nil && !errors.As(left, new(netlink.LinkNotFoundError)) {
			err = errors.New("its device stays")
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}
