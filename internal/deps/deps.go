// Package deps pins what is being built against while the tree grows.
package deps

import (
	_ "filippo.io/age"
	_ "github.com/coreos/go-systemd/v22/daemon"
	_ "github.com/elazarl/goproxy"
	_ "github.com/florianl/go-nflog/v2"
	_ "github.com/google/nftables"
	_ "github.com/mdlayher/netlink"
	_ "github.com/pelletier/go-toml/v2"
	_ "github.com/rogpeppe/go-internal/testscript"
	_ "github.com/spf13/cobra"
	_ "github.com/vishvananda/netlink"
	_ "go.etcd.io/bbolt"
	_ "golang.org/x/crypto/curve25519"
	_ "golang.org/x/net/idna"
	_ "golang.org/x/sync/errgroup"
	_ "golang.org/x/sys/unix"
	_ "golang.org/x/term"
	_ "golang.zx2c4.com/wireguard/device"
)
