package vpn

import "time"

// CertificatePath takes a POST: a certificate for a new key of the caller's, in the place of the one he called with.
const CertificatePath = "/v1/certificate"

// CertificateRequest is the body of POST CertificatePath. Unknown fields are refused.
type CertificateRequest struct {
	Request []byte `json:"request"` // signing request for the new key, DER (PKCS #10)
	Proof   []byte `json:"proof"`   // signature of RenewalMessage(Request) by the key of the caller's certificate
}

// CertificateReply is the answer. The old certificate holds until the new one is used for the first time.
type CertificateReply struct {
	Certificate string    `json:"certificate"` // PEM
	CA          string    `json:"ca"`          // PEM, what the gate's certificate is to be checked against from now on
	Expires     time.Time `json:"expires"`
}

// RenewFrom is when a certificate may be renewed: when less than a third of its time is left.
func RenewFrom(notBefore, notAfter time.Time) time.Time {
	return notAfter.Add(-notAfter.Sub(notBefore) / 3)
}

// RenewalMessage is what the old key signs: SHA-256 for ECDSA (ASN.1) and RSA (PKCS #1 v1.5), the message itself for
// Ed25519, as `openssl dgst -sha256 -sign` and `openssl pkeyutl -sign -rawin` do. Its beginning is that of nothing else
// that a certificate's key signs.
func RenewalMessage(request []byte) []byte {
	return append([]byte("perimeterd renewal 1\n"), request...)
}
