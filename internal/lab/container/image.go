//go:build linux

package container

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// image is a Debian that was installed on a disk with a kernel of its own.
type image struct{ disk, kernel, initrd string } // paths; the disk is ext4, without partitions

// What a machine on the disk has besides what a container has: a kernel, and who finds its devices.
const bootable = included + ",linux-image-cloud-amd64,udev"

// agentScript serves agent.
//
//go:embed agent.sh
var agentScript string

// Hardware addresses of the machine, by which it knows which cable is which.
const (
	outsideMAC = "52:54:00:c6:12:01"
	egressMAC  = "52:54:00:c6:13:01"
)

// installed are files that whoever installed that Debian wrote: it has the addresses of the lab's bastion, by systemd-networkd.
var installed = map[string]string{
	"etc/hostname":    "bastion\n",
	"etc/hosts":       "127.0.0.1 localhost bastion\n",
	"etc/resolv.conf": "nameserver 198.19.1.2\noptions timeout:1 attempts:2\n", // the lab's
	"etc/fstab":       "/dev/vda / ext4 errors=remount-ro 0 1\n",
	"etc/systemd/network/outside.network": "[Match]\nMACAddress=" + outsideMAC + "\n[Network]\nAddress=198.18.1.1/24\nAddress=2001:db8:18:1::1/64\nIPv6AcceptRA=no\n" +
		"[Route]\nDestination=198.18.0.0/16\nScope=link\n[Route]\nDestination=169.254.169.254/32\nScope=link\n",
	"etc/systemd/network/egress.network": "[Match]\nMACAddress=" + egressMAC + "\n[Network]\nAddress=198.19.1.1/24\nAddress=198.19.1.10/24\n" +
		"Address=2001:db8:19:1::1/64\nAddress=2001:db8:19:1::10/64\nIPv6AcceptRA=no\n",
	"usr/local/sbin/lab-agent": agentScript,
	"etc/systemd/system/lab-agent.service": "[Unit]\nDescription=Runs what the lab wants\n[Service]\nExecStart=/usr/local/sbin/lab-agent\nRestart=always\n" +
		"[Install]\nWantedBy=multi-user.target\n",
}

// enabled is what such a machine runs. Nothing may hold apt's lock while a test wants it.
const enabled = `chroot "$1" sh -c "systemctl enable systemd-networkd && systemctl mask apt-daily.timer apt-daily-upgrade.timer systemd-networkd-wait-online"`

// prepareImage installs a release of Debian below cache, or takes what is there from an earlier run.
func prepareImage(ctx context.Context, cache, release string) (image, error) {
	recipe := bootable + strings.Join(excluded, ",") + fmt.Sprint(installed) + enabled // Sprint sorts the map
	dir, err := prepare(cache, release, recipe, func(dir string) error { return install(ctx, release, dir) })
	return image{filepath.Join(dir, "disk"), filepath.Join(dir, "vmlinuz"), filepath.Join(dir, "initrd")}, err
}

func install(ctx context.Context, release, dir string) (err error) {
	root := dir + ".root"
	defer func() { err = errors.Join(err, os.RemoveAll(root)) }()
	if err := unpack(ctx, release, root, bootable, "--customize-hook="+enabled); err != nil {
		return err
	}
	for name, text := range installed {
		mode := os.FileMode(0o644)
		if strings.HasPrefix(text, "#!") {
			mode = 0o755
		}
		if err := os.WriteFile(filepath.Join(root, name), []byte(text), mode); err != nil {
			return err
		}
	}
	if out, err := exec.CommandContext(ctx, "systemctl", "--root="+root, "enable", "lab-agent.service").CombinedOutput(); err != nil {
		return fmt.Errorf("systemctl enable: %w\n%s", err, out)
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	for pattern, name := range map[string]string{"vmlinuz-*": "vmlinuz", "initrd.img-*": "initrd"} {
		found, err := filepath.Glob(filepath.Join(root, "boot", pattern))
		if err != nil || len(found) != 1 {
			return fmt.Errorf("%d match %s in /boot, want one: %w", len(found), pattern, err)
		}
		if err := os.Rename(found[0], filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	if out, err := exec.CommandContext(ctx, "mke2fs", "-q", "-t", "ext4", "-d", root, filepath.Join(dir, "disk"), "2G").CombinedOutput(); err != nil {
		return fmt.Errorf("mke2fs: %w\n%s", err, out)
	}
	return nil
}
