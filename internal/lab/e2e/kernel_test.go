package e2e

import (
	"strings"
	"syscall"
	"testing"

	"perimeterd/internal/lab"
	"perimeterd/vpn/gate"
)

// Where the kernel has no WireGuard, a daemon that is told to use it opens nothing and says what is missing; where it has, sessions
// go from one backend to the other and back.
func TestKernelBackendTakesOverAndBackOrSaysWhatIsMissing(t *testing.T) {
	s := newStage(t, lab.Options{}, lab.Setting{Key: "backend", Value: `"userspace"`})
	s.ok(s.alice.VPN(s.ctx, "up"))
	s.ok(s.curl("https://" + cloudName + "/"))
	has := gate.HasKernel()
	restart := func(backend string) error {
		if err := s.daemon.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		s.daemon.Wait()
		if err := s.daemon.Set(lab.Setting{Key: "backend", Value: `"` + backend + `"`}); err != nil {
			t.Fatal(err)
		}
		out, err := s.daemon.Perimeterd(s.ctx, "check")
		if says := strings.Contains(out, "this kernel makes no WireGuard device"); says != (backend == "kernel" && has != nil) {
			t.Errorf("check with the backend %s: %v\n%s", backend, err, out)
		}
		return s.daemon.Start(s.ctx)
	}
	err := restart("kernel")
	if has != nil {
		if err == nil || !strings.Contains(err.Error(), `tunnel.backend "kernel": this kernel makes no WireGuard device: `) {
			t.Errorf("without WireGuard in the kernel (%v): %v", has, err)
		}
		s.fails(s.curl("--max-time", "1", "https://"+cloudName+"/"))
		return
	}
	for _, backend := range []string{"kernel", "userspace", "kernel"} {
		if err != nil {
			t.Fatal(backend, ": ", err)
		}
		before := s.sessionLine()
		s.await("data flows with the backend "+backend, func() bool {
			_, err := s.curl("--max-time", "2", "https://"+cloudName+"/").CombinedOutput()
			return err == nil
		})
		if after := s.sessionLine(); after != before {
			t.Errorf("the session was %s and is %s with the backend %s", before, after, backend)
		}
		if backend == "kernel" {
			err = restart("userspace")
		} else {
			err = restart("kernel")
		}
	}
}
