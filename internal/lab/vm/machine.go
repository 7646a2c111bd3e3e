//go:build linux

package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
)

// What the tests call, with the kernel. tiny-initramfs stands in for the initramfs generator that the kernel's package wants.
const packages = "linux-image-cloud-amd64,tiny-initramfs,kmod,busybox-static,bash,coreutils,util-linux,diffutils,nftables,netbase,iproute2,knockd,curl,procps"

// What the machine boots without, to keep it small: memory holds it all.
var pruned = []string{
	"usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "usr/share/perl", "usr/lib/x86_64-linux-gnu/perl*",
	"usr/lib/x86_64-linux-gnu/gconv", "var", "boot/System.map*",
	"lib/modules/*/kernel/fs", "lib/modules/*/kernel/drivers/[^n]*", "lib/modules/*/kernel/drivers/net/ethernet",
}

// machine is a Debian release as qemu boots it.
type machine struct{ kernel, root string } // paths: vmlinuz, and a cpio archive of the unpacked packages

// prepare makes a release's machine, or takes the one that is in the cache.
func prepare(ctx context.Context, cache, suite string) (m machine, err error) {
	recipe := sha256.Sum256([]byte(packages + strings.Join(pruned, ",")))
	dir := filepath.Join(cache, fmt.Sprintf("%s-%x", suite, recipe[:4]))
	m = machine{filepath.Join(dir, "vmlinuz"), filepath.Join(dir, "root.cpio")}
	if _, err := os.Stat(dir); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return m, err
	}
	fmt.Printf("unpacking Debian %s into %s\n", suite, dir)
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return m, err
	}
	tmp, err := os.MkdirTemp(cache, "new-")
	if err != nil {
		return m, err
	}
	defer os.RemoveAll(tmp)
	root, made := filepath.Join(tmp, "root"), filepath.Join(tmp, "made")
	command := func(name string, args ...string) error {
		out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, out)
		}
		return nil
	}
	// The extract variant installs nothing and runs nothing of what it unpacks.
	if err := command("mmdebstrap", "--variant=extract", "--include="+packages, suite, root); err != nil {
		return m, err
	}
	if err := prune(root); err != nil {
		return m, err
	}
	version, err := only(filepath.Join(root, "lib/modules/*"))
	if err != nil {
		return m, err
	}
	if err := command("depmod", "-b", root, filepath.Base(version)); err != nil {
		return m, err
	}
	kernel, err := only(filepath.Join(root, "boot/vmlinuz-*"))
	if err != nil {
		return m, err
	}
	if err := os.Mkdir(made, 0o755); err != nil {
		return m, err
	}
	if err := os.Rename(kernel, filepath.Join(made, "vmlinuz")); err != nil {
		return m, err
	}
	if err := archiveTree(filepath.Join(made, "root.cpio"), root); err != nil {
		return m, err
	}
	// Those of an older recipe.
	stale, err := filepath.Glob(filepath.Join(cache, suite+"-*"))
	for _, d := range stale {
		err = errors.Join(err, os.RemoveAll(d))
	}
	return m, errors.Join(err, os.Rename(made, dir))
}

func prune(root string) error {
	for _, pattern := range pruned {
		paths, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			return err
		}
		for _, p := range paths {
			if err := os.RemoveAll(p); err != nil {
				return err
			}
		}
	}
	return nil
}

func only(pattern string) (string, error) {
	paths, err := filepath.Glob(pattern)
	if err == nil && len(paths) != 1 {
		err = fmt.Errorf("%d match %s: want one", len(paths), pattern)
	}
	if err != nil {
		return "", err
	}
	return paths[0], nil
}

// join writes the initial file system: the kernel unpacks one archive after the other.
func (m machine) join(path string, payload []file) error {
	return create(path, func(w io.Writer) error {
		root, err := os.Open(m.root)
		if err != nil {
			return err
		}
		defer root.Close()
		if _, err := io.Copy(w, root); err != nil {
			return err
		}
		a := &archive{w: w}
		a.add("payload", syscall.S_IFDIR|0o755, nil)
		for _, f := range payload {
			a.add(f.name, syscall.S_IFREG|f.mode, f.data)
		}
		return a.end()
	})
}

func archiveTree(path, root string) error {
	return create(path, func(w io.Writer) error {
		a := &archive{w: w}
		err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
			if err != nil || p == root {
				return err
			}
			info, err := d.Info()
			if err != nil {
				return err
			}
			var data []byte
			switch d.Type() {
			case 0:
				data, err = os.ReadFile(p)
			case fs.ModeSymlink:
				var to string
				to, err = os.Readlink(p)
				data = []byte(to)
			case fs.ModeDir:
			default:
				return nil // devices: the kernel makes its own
			}
			if err != nil {
				return err
			}
			a.add(strings.TrimPrefix(p, root+"/"), info.Sys().(*syscall.Stat_t).Mode, data)
			return nil
		})
		return errors.Join(err, a.end())
	})
}

func create(path string, write func(io.Writer) error) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	w := bufio.NewWriterSize(f, 1<<20)
	return errors.Join(write(w), w.Flush(), f.Close())
}
