package signer

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// maxPacket bounds a request and a reply, bytes. The largest holds two certificates of 4096-bit RSA keys in base64.
const maxPacket = 32 << 10

// What may be asked for.
const (
	opEnrol  = "enrol"
	opServer = "server"
	opRenew  = "renew"
	opForget = "forget"
)

// request is one packet. Fields that an operation does not name must be empty.
type request struct {
	Op          string `json:"op"`
	Name        string `json:"name,omitempty"`        // enrol, forget: the user
	Device      string `json:"device,omitempty"`      // enrol; forget: empty for all of them
	Seconds     int64  `json:"seconds,omitempty"`     // enrol: how long the certificate holds
	Replace     bool   `json:"replace,omitempty"`     // enrol: what the device has is not renewed any more
	Request     []byte `json:"request,omitempty"`     // enrol, server, renew: PKCS #10
	Certificate []byte `json:"certificate,omitempty"` // renew: the old one, DER
	Proof       []byte `json:"proof,omitempty"`       // renew: by its key
	ServerID    string `json:"server_id,omitempty"`   // server: 32 hexadecimal digits
	Host        string `json:"host,omitempty"`        // server: name or address of the endpoint
}

// reply is the answer: a certificate (DER; none to forget), or a refusal.
type reply struct {
	Certificate []byte   `json:"certificate,omitempty"`
	Refusal     *Refusal `json:"refusal,omitempty"`
}

// Code says why the signer refused. Codes are stable.
type Code string

// The reasons for a refusal.
const (
	Forbidden    Code = "forbidden"     // not for who asks
	BadRequest   Code = "bad_request"   // not understood, or a key that is not taken
	NotRenewable Code = "not_renewable" // not issued here, revoked, ended, or out of the record
	NotProven    Code = "not_proven"    // the old key did not sign the request for the new one
	TooEarly     Code = "too_early"
	Renewed      Code = "renewed" // with another key, before
	YearOver     Code = "year_over"
	Failed       Code = "failed" // the signer's own trouble: key, record, disk
)

// Refusal is the error of whatever is not signed.
type Refusal struct {
	Code Code   `json:"code"`
	Text string `json:"text"`
}

func (r *Refusal) Error() string { return r.Text }

func refuse(code Code, format string, a ...any) error {
	return &Refusal{code, fmt.Sprintf(format, a...)}
}

// parse reads a packet: one JSON object, no unknown field.
func parse(packet []byte) (req request, err error) {
	if len(packet) > maxPacket {
		return req, refuse(BadRequest, "a request of more than %d bytes", maxPacket)
	}
	d := json.NewDecoder(bytes.NewReader(packet))
	d.DisallowUnknownFields()
	if err := d.Decode(&req); err != nil {
		return req, refuse(BadRequest, "request: %v", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return req, refuse(BadRequest, "request: something follows the JSON object")
	}
	return req, nil
}
