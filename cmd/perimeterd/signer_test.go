package main

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"perimeterd/configs"
	"perimeterd/internal/identity"
	"perimeterd/internal/signer"
)

// initialised is a directory as init leaves it.
func initialised(t *testing.T) *configs.Config {
	t.Helper()
	t.Setenv("AWS_EC2_METADATA_DISABLED", "true")
	dir := filepath.Join(t.TempDir(), "d")
	if err := execute(context.Background(), []string{"init", "--dir", dir, "--endpoint", "bastion.example.com"}); err != nil {
		t.Fatal(err)
	}
	c, err := configs.Load(filepath.Join(dir, "perimeterd.toml"))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func signingRequest(t *testing.T, name string) []byte {
	t.Helper()
	key, err := identity.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	csr, err := identity.NewRequest(key, name, "mac")
	if err != nil {
		t.Fatal(err)
	}
	return csr.DER
}

// eventually waits for what must come to be.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
	}
}

func TestSignerOnASocketThatSystemdPasses(t *testing.T) {
	c := initialised(t)
	run := filepath.Join(t.TempDir(), "signer.sock")
	ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: run, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	file, err := ln.File()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// LISTEN_PID is the process's own number: sd_listen_fds(3).
	cmd := exec.Command("bash", "-c", `export LISTEN_FDS=1 LISTEN_PID=$$; exec -a perimeterd "$0" "$@"`, self,
		"signer", "--ca", c.Identity.CA, "--ca-key", c.Identity.CAKey)
	var log bytes.Buffer
	cmd.Stderr = &log
	cmd.ExtraFiles = []*os.File{file}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Kill()
	sign := signer.NewClient(run, func(uint32) bool { return true }, func() (*exec.Cmd, error) { return nil, errors.New("nobody listens") })
	ctx := context.Background()
	cert, err := sign.Enrol(ctx, "alice", "mac", false, time.Hour, signingRequest(t, "alice"))
	if err != nil {
		t.Fatal(err)
	}
	if cert.Subject.String() != "CN=alice,OU=mac" {
		t.Error(cert.Subject)
	}
	// The signal that reloads a daemon is for the daemon.
	if err := cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	if _, err := sign.Enrol(ctx, "bob", "mac", false, time.Hour, signingRequest(t, "bob")); err != nil {
		t.Error(err)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v\n%s", err, log.String())
	}
	if !strings.Contains(log.String(), `"msg":"signer signed","op":"enrol","uid":0,"subject":"CN=alice,OU=mac"`) {
		t.Errorf("it logged\n%s", log.String())
	}
}

func TestSignerOfTheDaemonEndsWithItAndComesBackIfItDies(t *testing.T) {
	c := initialised(t)
	var started []*exec.Cmd
	sign := signer.NewClient(c.SignerSocket(), func(uint32) bool { return true }, func() (*exec.Cmd, error) {
		cmd := exec.Command("/proc/self/exe", "signer", "--pair", "--renewals", "--ca", c.Identity.CA, "--ca-key", c.Identity.CAKey)
		cmd.Args[0] = "perimeterd"
		started = append(started, cmd)
		return cmd, nil
	})
	ctx := context.Background()
	if err := sign.Connect(); err != nil {
		t.Fatal(err)
	}
	if err := sign.Forget(ctx, "alice", ""); err != nil {
		t.Fatal(err)
	}
	var refusal *signer.Refusal
	if _, err := sign.Enrol(ctx, "mallory", "mac", false, time.Hour, signingRequest(t, "mallory")); !errors.As(err, &refusal) || refusal.Code != signer.Forbidden {
		t.Errorf("the daemon's signer enrols: %v", err)
	}
	if err := syscall.Kill(started[0].Process.Pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a signer that answers", func() bool { return sign.Forget(ctx, "alice", "") == nil && len(started) == 2 })
	if err := sign.Close(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the signer's end", func() bool { return syscall.Kill(started[1].Process.Pid, 0) == syscall.ESRCH })
}
