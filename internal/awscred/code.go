package awscred

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/term"
)

const (
	promptPatience  = 2 * time.Minute // for a person
	commandPatience = 2 * time.Minute // for a command, which may ask a person
	maxOutput       = 64 << 10        // of a command, bytes
)

var errNoTerminal = errors.New("no terminal to ask at")

// code asks for the MFA code: the role's mfa_process, or the person at the terminal, never standard input, which may be data.
func (h *Helper) code(ctx context.Context, env []string) (string, error) {
	r := h.Role
	if r.MFAProcess != "" {
		out, err := h.run(ctx, "mfa_process", r.MFAProcess, env)
		if err != nil {
			return "", err
		}
		return checkCode(string(out))
	}
	text, err := askTerminal(ctx, "MFA code for "+r.MFASerial+": ")
	if errors.Is(err, errNoTerminal) {
		return "", fmt.Errorf("profile %q needs an MFA code, and there is no terminal to ask at: run in one: vpn aws credentials %s", r.Profile, r.Profile)
	}
	if err != nil {
		return "", fmt.Errorf("MFA code: %w", err)
	}
	return checkCode(text)
}

func checkCode(s string) (string, error) {
	s = strings.TrimSpace(s)
	if len(s) != 6 || strings.Trim(s, "0123456789") != "" {
		return "", fmt.Errorf("MFA code of %d characters: want 6 digits", len(s))
	}
	return s, nil
}

// askTerminal asks there, whatever standard input and output are, and shows nothing of the answer. The terminal is left as it was
// found, also when nobody answers or the person interrupts.
func askTerminal(ctx context.Context, prompt string) (string, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, promptPatience, errors.New("nobody answered"))
	defer cancel()
	in, out, err := openTerminal()
	if err != nil {
		return "", errNoTerminal
	}
	defer in.Close()
	defer out.Close()
	fd := int(in.Fd())
	state, err := term.MakeRaw(fd) // before the question: who answers fast shall not see it either
	if err != nil {
		return "", errNoTerminal
	}
	defer term.Restore(fd, state)
	type answer struct {
		text string
		err  error
	}
	got := make(chan answer, 1)
	go func() { // it stays in its read, where ctx ends first
		text, err := term.NewTerminal(struct {
			io.Reader
			io.Writer
		}{in, out}, "").ReadPassword(prompt)
		if err == io.EOF {
			err = errors.New("interrupted")
		}
		got <- answer{text, err}
	}()
	select {
	case a := <-got:
		return a.text, a.err
	case <-ctx.Done():
		io.WriteString(out, "\r\n")
		return "", context.Cause(ctx)
	}
}

// run has the shell run a command of the person's own configuration, as AWS's SDKs do, in the tunnel's environment and without
// what would lead it back to here.
func (h *Helper) run(ctx context.Context, key, command string, env []string) ([]byte, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, commandPatience, fmt.Errorf("no answer in %v", commandPatience))
	defer cancel()
	cmd := shell(ctx, command)
	cmd.Env = append(WithoutCredentials(os.Environ()), env...)
	cmd.Stderr = os.Stderr
	cmd.WaitDelay = time.Second
	out := &limited{}
	cmd.Stdout = out
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		err = context.Cause(ctx)
	case out.over:
		err = errTooMuch // which ended it
	case errors.As(err, &exit):
		err = fmt.Errorf("it failed: %w", err)
	}
	if err != nil { // not what it printed: that may be half a secret
		return nil, fmt.Errorf("%s of profile %q: %w", key, h.Role.Profile, err)
	}
	return out.b, nil
}

var errTooMuch = fmt.Errorf("it prints over %d bytes", maxOutput)

// limited takes so much, and no more.
type limited struct {
	b    []byte
	over bool
}

func (l *limited) Write(b []byte) (int, error) {
	if len(l.b)+len(b) > maxOutput {
		l.over = true
		return 0, errTooMuch
	}
	l.b = append(l.b, b...)
	return len(b), nil
}

// credentialVariables win over a profile's credentials, or choose another profile.
var credentialVariables = []string{
	"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN", "AWS_ACCESS_KEY", "AWS_SECRET_KEY",
	"AWS_CREDENTIAL_EXPIRATION", "AWS_ROLE_ARN", "AWS_ROLE_SESSION_NAME", "AWS_WEB_IDENTITY_TOKEN_FILE",
	"AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_CONTAINER_AUTHORIZATION_TOKEN",
	"AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", "AWS_PROFILE", "AWS_DEFAULT_PROFILE",
}

// CredentialVariables are the variables of an environment that win over a profile's credentials, or choose another profile.
func CredentialVariables(environ []string) (names []string) {
	for _, name := range credentialVariables {
		if variable(environ, name) != "" {
			names = append(names, name)
		}
	}
	return names
}

// WithoutCredentials is an environment without those variables.
func WithoutCredentials(environ []string) (out []string) {
	for _, e := range environ {
		if len(CredentialVariables([]string{e})) == 0 {
			out = append(out, e)
		}
	}
	return out
}
