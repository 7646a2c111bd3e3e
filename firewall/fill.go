package firewall

import (
	"fmt"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// setCount is NFTA_SET_COUNT of linux/netfilter/nf_tables.h (kernel 6.17 and newer), for which x/sys/unix has no name.
const setCount = 20

// Fill is how many elements each set of the table holds and how many it can; a size of 0 is no bound. It costs one dump
// of the sets' definitions where the kernel counts; there an element that expired counts until it is collected, as it does
// for what may be added. On older kernels it reads every element.
func (f *Firewall) Fill() (map[string]struct{ Elements, Size int }, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	replies, err := f.queryLocked(unix.NFT_MSG_GETSET, netlink.Dump)
	if err != nil {
		return nil, fmt.Errorf("list the sets of table inet %s: %w", TableName, err)
	}
	fill, counted := map[string]struct{ Elements, Size int }{}, map[string]bool{}
	for _, m := range replies {
		if len(m.Data) < 4 || m.Data[0] != unix.NFPROTO_INET {
			continue
		}
		ad, err := netlink.NewAttributeDecoder(m.Data[4:])
		if err != nil {
			return nil, err
		}
		var table, name string
		var flags uint32
		var elements, size int
		has := false
		for ad.Next() {
			switch ad.Type() {
			case unix.NFTA_SET_TABLE:
				table = ad.String()
			case unix.NFTA_SET_NAME:
				name = ad.String()
			case unix.NFTA_SET_FLAGS:
				flags = network.Uint32(ad.Bytes())
			case unix.NFTA_SET_DESC:
				ad.Nested(func(ad *netlink.AttributeDecoder) error {
					for ad.Next() {
						if ad.Type() == unix.NFTA_SET_DESC_SIZE {
							size = int(network.Uint32(ad.Bytes()))
						}
					}
					return nil
				})
			case setCount:
				elements, has = int(network.Uint32(ad.Bytes())), true
			}
		}
		if err := ad.Err(); err != nil {
			return nil, err
		}
		if table == TableName && flags&unix.NFT_SET_ANONYMOUS == 0 {
			fill[name], counted[name] = struct{ Elements, Size int }{elements, size}, has
		}
	}
	for name, known := range counted {
		if known {
			continue
		}
		elements, err := f.elementsLocked(name)
		if err != nil {
			return nil, err
		}
		fill[name] = struct{ Elements, Size int }{len(elements), fill[name].Size}
	}
	return fill, nil
}
