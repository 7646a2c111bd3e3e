package client

import (
	"math"
	"net/http"
	"net/url"
	"time"

	"perimeterd/vpn"
)

// streamAnswer is how long the gate may take to say whether it takes datagrams by TLS.
const streamAnswer = 5 * time.Second

// attach makes g's connection a stream of the tunnel's packets, which follow the request at once. Answered gets what the gate
// says: nil, or why there is no stream; the connection is closed then, and the way is UDP.
func (t *Tunnel) attach(g *gateConn, answered func(error)) error {
	req, err := http.NewRequest(http.MethodGet, "https://"+g.name+vpn.StreamPath+"?session="+url.QueryEscape(t.Session.ID), nil)
	if err != nil {
		g.Close()
		return err
	}
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", vpn.StreamProtocol)
	g.SetDeadline(time.Time{})
	if err := req.Write(g); err != nil {
		g.Close()
		return explainTLS(err)
	}
	s := t.wire.NewStream(g.Conn, g.replies, t.Gate)
	begin := func() error {
		g.SetReadDeadline(time.Now().Add(streamAnswer))
		resp, err := g.answer(req)
		switch {
		case err != nil:
			err = explainTLS(err)
		case resp.StatusCode != http.StatusSwitchingProtocols:
			err = refusedBy(resp)
		default:
			g.proven, g.bounded.N = true, math.MaxInt64
		}
		if err != nil {
			t.wire.refuse(s)
		}
		answered(err)
		g.SetReadDeadline(time.Time{})
		return err
	}
	t.wire.take(s, func() error { return s.Run(begin, t.endpoint, nil) })
	return nil
}
