package gate

import "crypto/rand"

// Refusal is somebody who came to the gate and was refused.
type Refusal struct {
	ID           string // names it, for `perimeterd why`; the log's line has it too
	Stage        Stage
	User, Device string // of the certificate: a claim, unless the stage is Request
	Source       string // ADDRESS:PORT
	Method, Path string
	Status       int    // HTTP; 0 before there is a request
	Code         string // an identity.Code, or one of the session API's; empty: TLS itself failed
	Text         string // for operators
}

// Stage is how far somebody came.
type Stage int

// Stages. Only who comes to the last has shown a certificate that held.
const (
	Handshake Stage = iota
	Certificate
	Request
)

// Watch makes fn hear of every refusal. It must be called before Run, and fn be quick.
func (g *Gate) Watch(fn func(Refusal)) { g.watch = fn }

// refusalID is as the proxy's are.
func refusalID() string { return rand.Text()[:10] }
