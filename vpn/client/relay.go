package client

import (
	"errors"
	"io"
	"net"
	"sync"
)

// relayBuffer is what one direction holds at a time, bytes. Both ends buffer megabytes of their own.
const relayBuffer = 32 << 10

// relay carries bytes both ways until both have ended, an end in one direction as an end of that direction alone. What breaks
// off on one side breaks off on the other: a connection that ended in order looks whole.
func relay(a *net.TCPConn, b net.Conn) {
	var both sync.WaitGroup
	both.Go(func() { oneWay(b, a) })
	oneWay(a, b)
	both.Wait()
}

func oneWay(to, from net.Conn) {
	err := transfer(to, from)
	if half, ok := to.(interface{ CloseWrite() error }); err == nil && ok {
		err = half.CloseWrite()
	}
	if err != nil {
		cut(to)
		cut(from)
	}
}

func transfer(to, from net.Conn) error {
	if to, ok := to.(*net.TCPConn); ok {
		if _, ok := from.(*net.TCPConn); ok { // the kernel moves it
			_, err := to.ReadFrom(from)
			return err
		}
	}
	buf := make([]byte, relayBuffer)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			if _, err := to.Write(buf[:n]); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// cut ends a connection so that the other side knows that it is not whole.
func cut(c net.Conn) {
	switch c := c.(type) {
	case *net.TCPConn:
		c.SetLinger(0)
		c.Close()
	case interface{ reset() }:
		c.reset()
	default:
		c.Close()
	}
}
