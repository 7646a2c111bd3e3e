//go:build linux

package container

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"perimeterd/internal/lab"
)

// vm is a machine of its own, with Debian's kernel, at the ends of the two cables of a namespace of the lab, which carry its frames and
// are nobody else's.
type vm struct {
	ns      *lab.Namespace
	image   image
	dir     string // of its disk, its console, and the way to its agent
	qemu    *lab.Cmd
	ended   chan struct{}
	agent   *agent
	stopped bytes.Buffer // what qemu complained of
}

// newVM plugs it into the cables, and copies the disk into dir.
func newVM(ctx context.Context, img image, dir string, ns *lab.Namespace) (*vm, error) {
	m := &vm{ns: ns, image: img, dir: dir}
	for _, cable := range []string{"outside", "egress"} {
		for _, c := range []string{
			"address flush dev CABLE", "link add bridge-CABLE type bridge forward_delay 0 stp_state 0 mcast_snooping 0", "link set CABLE master bridge-CABLE up",
			"tuntap add dev vm-CABLE mode tap", "link set vm-CABLE master bridge-CABLE up", "link set bridge-CABLE up",
		} {
			if out, err := ns.Command(ctx, "ip", strings.Fields(strings.ReplaceAll(c, "CABLE", cable))...).CombinedOutput(); err != nil {
				return nil, fmt.Errorf("ip %s: %w %s", c, err, out)
			}
		}
	}
	// The instance's metadata are served here.
	if out, err := ns.Command(ctx, "ip", "route", "add", ns.Addr.String(), "dev", "bridge-outside").CombinedOutput(); err != nil {
		return nil, fmt.Errorf("route: %w %s", err, out)
	}
	if out, err := exec.CommandContext(ctx, "cp", "--sparse=always", img.disk, m.disk()).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("cp: %w %s", err, out)
	}
	return m, nil
}

func (m *vm) disk() string    { return filepath.Join(m.dir, "disk") }
func (m *vm) console() string { return filepath.Join(m.dir, "console") }

// Start boots it.
func (m *vm) Start(ctx context.Context) error {
	return m.booted(ctx, m.power(ctx))
}

// power gives it its power, and returns when qemu runs.
func (m *vm) power(ctx context.Context) error {
	port := filepath.Join(m.dir, "agent")
	nic := func(cable, mac string) []string {
		return []string{"-netdev", "tap,id=" + cable + ",ifname=vm-" + cable + ",script=no,downscript=no", "-device", "virtio-net-pci,romfile=,netdev=" + cable + ",mac=" + mac}
	}
	args := append(accelerator(), "-smp", "2", "-m", "1024", "-nodefaults", "-display", "none",
		"-kernel", m.image.kernel, "-initrd", m.image.initrd, "-append", "root=/dev/vda ro net.ifnames=0 console=ttyS0 mitigations=off",
		"-drive", "file="+m.disk()+",format=raw,if=virtio", "-device", "virtio-rng-pci",
		"-chardev", "file,id=console,append=on,path="+m.console(), "-serial", "chardev:console",
		"-device", "virtio-serial-pci", "-chardev", "socket,id=lab,server=on,wait=off,path="+port, "-device", "virtserialport,chardev=lab,name=lab")
	args = append(append(args, nic("outside", outsideMAC)...), nic("egress", egressMAC)...)
	m.qemu = m.ns.Command(context.WithoutCancel(ctx), "qemu-system-x86_64", args...)
	m.qemu.Stderr = &m.stopped
	if err := m.qemu.Start(); err != nil {
		return err
	}
	ended := make(chan struct{})
	m.ended = ended
	go func() { m.qemu.Wait(); close(ended) }()
	return eventually(ctx, "the virtual machine has its power", func() error {
		select {
		case <-ended:
			return fatal{errors.New("qemu ended")}
		default:
		}
		conn, err := net.Dial("unix", port)
		if err == nil {
			m.agent = newAgent(conn)
		}
		return err
	})
}

// booted waits until it is up after err, which is nil.
func (m *vm) booted(ctx context.Context, err error) error {
	if err == nil {
		bounded, cancel := context.WithTimeout(ctx, 5*time.Minute)
		defer cancel()
		if err = m.agent.hello(bounded); err == nil {
			err = eventually(ctx, "the machine is up", func() error { return isUp(ctx, m) })
		}
	}
	if err != nil {
		said, _ := os.ReadFile(m.console())
		return fmt.Errorf("%w\n%s%s", errors.Join(err, m.Stop()), m.stopped.Bytes(), said[max(0, len(said)-8<<10):])
	}
	return nil
}

// Reboot ends all in order and boots it anew.
func (m *vm) Reboot(ctx context.Context) error {
	return m.booted(ctx, m.agent.start(ctx, "systemctl", "reboot"))
}

// accelerator is KVM where the processor can, and emulation elsewhere: a /dev/kvm alone may be one that runs kernels made for it only.
func accelerator() []string {
	cpu, _ := os.ReadFile("/proc/cpuinfo")
	if _, err := os.Stat("/dev/kvm"); err == nil && regexp.MustCompile(`(?m)^flags\s.* (vmx|svm)\b`).Match(cpu) {
		return []string{"-accel", "kvm", "-cpu", "host"}
	}
	return []string{"-accel", "tcg,thread=multi", "-cpu", "max,la57=off"}
}

// Run is by the agent.
func (m *vm) Run(ctx context.Context, name string, args ...string) ([]byte, error) {
	if m.agent == nil {
		return nil, errors.New("the machine has no power")
	}
	return m.agent.run(ctx, name, args...)
}

// Copy is by the agent.
func (m *vm) Copy(ctx context.Context, path string) error { return m.agent.put(ctx, path) }

// Stop takes its power away. Its disk keeps what was written there.
func (m *vm) Stop() error {
	if m.ended == nil {
		return nil
	}
	if m.agent != nil {
		m.agent.conn.Close()
	}
	_ = m.qemu.Process.Kill()
	<-m.ended
	m.ended, m.agent = nil, nil
	return nil
}

// Remove leaves the directory to its owner.
func (m *vm) Remove() error { return m.Stop() }
