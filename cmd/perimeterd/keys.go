package main

import (
	"crypto/tls"
	"fmt"
	"os"
	"os/user"
	"strconv"
	"syscall"

	"perimeterd/configs"
	"perimeterd/internal/control"
	"perimeterd/internal/identity"
	"perimeterd/knock"
)

// keys are what the daemon reads of its PKI. The CA's key is not among them.
type keys struct {
	gate            tls.Certificate
	wireguard       [32]byte
	wireguardPublic [32]byte
	master          [32]byte
	serverID        knock.ServerID
}

func loadKeys(c configs.Identity) (k keys, err error) {
	if k.gate, err = tls.LoadX509KeyPair(c.Cert, c.Key); err != nil {
		return k, fmt.Errorf("identity.cert %q and identity.key %q: %w: `perimeterd init` makes them", c.Cert, c.Key, err)
	}
	if k.wireguard, err = identity.ReadKey(c.WireGuardKey); err != nil {
		return k, err
	}
	if k.master, err = identity.ReadKey(c.Master); err != nil {
		return k, err
	}
	if k.wireguardPublic, err = identity.PublicKey(k.wireguard); err != nil {
		return k, fmt.Errorf("%s: %w", c.WireGuardKey, err)
	}
	k.serverID, err = identity.ReadServerID(c.ServerID)
	return k, err
}

// fallbackGroup is the group of the daemon where the package did not make one: a number that Debian gives to nobody
// (Debian policy, 9.2.2: 60000 to 64999 are allocated on demand).
const fallbackGroup = 60194

// daemonGroup makes the process's group one of its own, since the backstop in the table judges outgoing connections by
// it; with root's, it would judge those of every service of root.
func daemonGroup() (uint32, error) {
	gid, err := groupOfDaemon()
	if err != nil || os.Getegid() == int(gid) {
		return gid, err
	}
	if err := syscall.Setregid(int(gid), int(gid)); err != nil {
		return 0, fmt.Errorf("take the group %d: %w", gid, err)
	}
	return gid, nil
}

// groupOfDaemon is the number of that group.
func groupOfDaemon() (uint32, error) {
	if gid := os.Getegid(); gid != 0 {
		return uint32(gid), nil
	}
	g, err := user.LookupGroup(control.Group)
	if err != nil {
		return fallbackGroup, nil
	}
	gid, err := strconv.ParseUint(g.Gid, 10, 32)
	if err != nil || gid == 0 {
		return 0, fmt.Errorf("group %s has the number %q: it must be one of its own", control.Group, g.Gid)
	}
	return uint32(gid), nil
}
