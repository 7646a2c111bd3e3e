package client

import (
	"io"
	"net"
	"sync"
)

// relay carries bytes both ways until both have ended, an end in one direction as an end of that direction alone. What breaks
// off on one side breaks off on the other: a connection that ended in order looks whole.
func relay(a *net.TCPConn, b net.Conn) {
	var both sync.WaitGroup
	both.Go(func() { oneWay(b, a) })
	oneWay(a, b)
	both.Wait()
}

func oneWay(to, from net.Conn) {
	_, err := io.Copy(to, from)
	endOneWay(to, from, err)
}

// endOneWay carries over how one direction ended.
func endOneWay(to, from net.Conn, err error) {
	if half, ok := to.(interface{ CloseWrite() error }); err == nil && ok {
		err = half.CloseWrite()
	}
	if err != nil {
		cut(to)
		cut(from)
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
