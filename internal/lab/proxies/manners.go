//go:build linux

package main

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// manner is what becomes of what clients may do.
type manner struct {
	Proxy     string `json:"proxy"`
	HalfClose string `json:"half_close"`
	Early     string `json:"early_data"`
}

const (
	wholeReply = 1 << 20
	kept       = "kept"
)

// manners tries a client that ends its side and then gets a reply of a megabyte, and one that does not wait for the 200.
func (r *results) manners(room *room) error {
	for _, c := range room.all {
		m := manner{Proxy: c.name}
		err := room.threads(c, cloudName, 1, func(_ int, k *caller) error {
			client, server, err := k.open()
			if err != nil {
				return err
			}
			m.HalfClose = halfClose(client, server)
			unix.Close(client)
			unix.Close(server)
			if client, err = k.connect(); err != nil {
				return err
			}
			defer unix.Close(client)
			if server, err = k.begin(client, k.hello); err != nil {
				m.Early = err.Error()
				return nil
			}
			defer unix.Close(server)
			m.Early = earlyData(client, server, k.hello)
			return nil
		})
		if err != nil {
			return err
		}
		fmt.Printf("%-24s half-close: %s; early data: %s\n", m.Proxy, m.HalfClose, m.Early)
		r.Manners = append(r.Manners, m)
		if c.name == "perimeterd" {
			r.promise(m.HalfClose == kept && m.Early == kept, "half-close: %s; early data: %s", m.HalfClose, m.Early)
		}
	}
	return nil
}

func halfClose(client, server int) string {
	if err := unix.Shutdown(client, unix.SHUT_WR); err != nil {
		return err.Error()
	}
	if n, err := drain(server, 1); n != 0 || err != nil {
		return fmt.Sprintf("lost: the origin does not hear of the end (%v)", err)
	}
	written := make(chan error, 1)
	go func() {
		err := writeAll(server, make([]byte, wholeReply))
		unix.Shutdown(server, unix.SHUT_WR)
		written <- err
	}()
	n, err := drain(client, wholeReply+1)
	unix.Shutdown(server, unix.SHUT_RDWR)
	<-written
	if n != wholeReply || err != nil {
		return fmt.Sprintf("lost: %d of %d bytes of the reply came", n, wholeReply)
	}
	return kept
}

func earlyData(client, server int, early []byte) string {
	b := make([]byte, len(early))
	if err := unix.SetsockoptTimeval(server, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 2}); err != nil {
		return err.Error()
	}
	if err := readAll(server, b); err != nil {
		return fmt.Sprintf("lost: %v", err)
	}
	if string(b) != string(early) {
		return "changed"
	}
	return kept
}
