// Package identity says who someone is: the built-in certificate authority, the users and their devices, and the check of
// a client certificate.
//
// # Certificates
//
// The authority is one ECDSA P-256 key. A gate certificate carries the server id (32 hexadecimal digits, a valid DNS
// label) and the endpoint's host as alternative names, and may serve only. A client certificate carries the user as common
// name and the device as organizational unit, and may be a client only. The unit is for people who read certificates: who
// somebody is follows from the store, by the SHA-256 of the certificate's public key (SubjectPublicKeyInfo), so a second
// certificate for a name that was never entered here opens nothing, whoever signed it.
//
// # An external authority
//
// Where the authority is another's, the store knows no keys. Who somebody is follows from the common name, and whether he
// comes in from the authority's CRLs, from a list of subjects, and from the store, whose revocation is above both. Files are
// followed as they change; a bad one leaves what was good before it, and a CRL past its nextUpdate closes. A user who was
// revoked and is let in again needs a certificate that was issued since.
//
// # State
//
// Users, credential ids and the highest token step live in one bbolt file. Nobody is ever deleted from it: a revoked user
// stays, so that his credential id names nobody else in the log, and his certificates stay known as revoked.
package identity
