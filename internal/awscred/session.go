package awscred

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"perimeterd/internal/awsiam"
)

// Tunnel is the way to AWS.
type Tunnel struct {
	Proxy string   // URL
	Env   []string // of commands that shall go the same way
}

// Helper gets one role's sessions.
type Helper struct {
	Role             Role
	Config           *Config
	Cache            *Cache
	User             string   // in the certificate: the source identity, where AWS's own log shall name it
	Egress           []string // CIDRs that a session is pinned to
	NoPin            bool
	NoSourceIdentity bool
	Tunnel           func(context.Context) (Tunnel, error) // an error: it is down, and nothing is asked
	Now              func() time.Time
}

const (
	lockPatience = 5 * time.Minute // while another process asks a person
	baseDuration = 12 * time.Hour  // of what an MFA code is good for
)

// Credentials are the role's, good for five minutes at least: kept ones, or new.
func (h *Helper) Credentials(ctx context.Context) (Credentials, error) {
	policy, err := h.pin()
	if err != nil {
		return Credentials{}, err
	}
	identity := h.User
	if h.NoSourceIdentity {
		identity = ""
	}
	name := h.User
	if h.Role.SessionName != "" {
		name = h.Role.SessionName
	}
	if !isSessionName(name) || identity != "" && !isSessionName(identity) {
		return Credentials{}, fmt.Errorf("session name %q: AWS wants 2 to 64 letters, digits and _ + = , . @ -: set role_session_name, and --no-source-identity", name)
	}
	ask := assumption{h.Role, policy, identity, name}
	request, err := json.Marshal(ask)
	if err != nil {
		return Credentials{}, err
	}
	return h.kept(ctx, "role-"+h.Role.Profile, request, func(ctx context.Context) (Credentials, error) {
		tunnel, err := h.Tunnel(ctx)
		if err != nil {
			return Credentials{}, err
		}
		base, forget, err := h.base(ctx, tunnel)
		if err != nil {
			return Credentials{}, err
		}
		s, err := h.assumeRole(ctx, tunnel.Proxy, base, ask)
		if isStale(err) {
			forget()
		}
		return s, err
	})
}

// kept finds a session, or makes it while others of this user wait for it.
func (h *Helper) kept(ctx context.Context, name string, request []byte, fresh func(context.Context) (Credentials, error)) (Credentials, error) {
	if s, ok := h.Cache.get(name, request, h.Now()); ok {
		return s, nil
	}
	waiting, cancel := context.WithTimeoutCause(ctx, lockPatience, fmt.Errorf("no end in %v", lockPatience))
	defer cancel()
	unlock, err := h.Cache.lock(waiting, name)
	if err != nil {
		return Credentials{}, err
	}
	defer unlock()
	if s, ok := h.Cache.get(name, request, h.Now()); ok {
		return s, nil
	}
	s, err := fresh(ctx)
	if err != nil {
		return Credentials{}, err
	}
	if !h.Now().Add(margin).Before(s.Expiration) {
		return Credentials{}, fmt.Errorf("AWS gave a session that ends at %v: is this clock right?", s.Expiration)
	}
	return s, h.Cache.put(name, request, s)
}

// base is what may assume the role: with MFA a session that twelve hours of roles share, else the keys themselves. Forget drops
// what was kept of it.
func (h *Helper) base(ctx context.Context, tunnel Tunnel) (base Credentials, forget func(), err error) {
	forget = func() {}
	if h.Role.MFASerial == "" {
		base, err = h.longLived(ctx, tunnel)
		return base, forget, err
	}
	request, err := json.Marshal([]string{h.Role.Source, h.Role.MFASerial})
	if err != nil {
		return base, forget, err
	}
	name := fmt.Sprintf("mfa-%.8x", sha256.Sum256(request)) // a source may have any name
	base, err = h.kept(ctx, name, request, func(ctx context.Context) (Credentials, error) {
		keys, err := h.longLived(ctx, tunnel)
		if err != nil {
			return Credentials{}, err
		}
		if keys.SessionToken != "" {
			return Credentials{}, fmt.Errorf("source_profile %q gives a session, which no MFA code can be added to: remove mfa_serial of profile %q, "+
				"and have the MFA where that session begins (aws-vault export --no-session gives the keys)", h.Role.Source, h.Role.Profile)
		}
		code, err := h.code(ctx, tunnel.Env)
		if err != nil {
			return Credentials{}, err
		}
		return h.getSessionToken(ctx, tunnel.Proxy, keys, code)
	})
	return base, func() { h.Cache.drop(name) }, err
}

// longLived reads the base credentials where they are kept.
func (h *Helper) longLived(ctx context.Context, tunnel Tunnel) (Credentials, error) {
	keys, command, err := h.Config.base(h.Role)
	if err != nil || command == "" {
		return keys, err
	}
	out, err := h.run(ctx, "credential_process", command, tunnel.Env)
	if err != nil {
		return Credentials{}, err
	}
	keys, err = parseProcess(out)
	if err != nil {
		return Credentials{}, fmt.Errorf("credential_process of profile %q: %w", h.Role.Source, err)
	}
	return keys, nil
}

// process is what a credential_process prints: https://docs.aws.amazon.com/sdkref/latest/guide/feature-process-credentials.html
type process struct {
	Version int
	Credentials
}

// parseProcess reads what a credential_process printed. Its errors show nothing of it.
func parseProcess(text []byte) (Credentials, error) {
	var p process
	if json.Unmarshal(text, &p) != nil || p.Version != 1 || p.AccessKeyID == "" || p.SecretAccessKey == "" {
		return Credentials{}, errors.New("it printed no credentials: want JSON with Version 1, AccessKeyId and SecretAccessKey")
	}
	return p.Credentials, nil
}

// Process is the session as a credential_process prints it.
func (c Credentials) Process() ([]byte, error) { return json.Marshal(process{1, c}) }

// pin is the session's own policy, "" without one.
func (h *Helper) pin() (string, error) {
	if h.NoPin {
		return "", nil
	}
	egress, err := awsiam.ParseEgress(h.Egress...)
	policy := ""
	if err == nil {
		policy, err = awsiam.SessionPin(egress)
	}
	if err != nil {
		return "", fmt.Errorf("the session's pin, from the tunnel's profile: %w: or ask the operator for a new profile", err)
	}
	return policy, nil
}
