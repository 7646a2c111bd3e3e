package awscred

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws/arn"
)

// Role is what a profile says of the role that it assumes, in the keys that the AWS CLI reads there, and mfa_process.
type Role struct {
	Profile     string
	ARN         string
	Source      string // the profile that has the base credentials
	Region      string // whose STS is asked
	MFASerial   string // "": no code is asked for
	MFAProcess  string // a command that prints the code; "": the terminal
	ExternalID  string
	SessionName string // "": the certificate's name
	Duration    time.Duration
}

const defaultDuration = time.Hour

// word says whether s has from min to max letters, digits and characters of more.
func word(s string, min, max int, more string) bool {
	for i := range len(s) {
		c := s[i] | 0x20 // lower case
		if !('a' <= c && c <= 'z' || '0' <= s[i] && s[i] <= '9' || strings.IndexByte(more, s[i]) >= 0) {
			return false
		}
	}
	return min <= len(s) && len(s) <= max
}

func isRole(s string) bool {
	a, err := arn.Parse(s)
	return err == nil && a.Service == "iam" && a.Region == "" && strings.HasPrefix(a.Resource, "role/") && word(s, 20, 2048, ":/_+=,.@-")
}

func isSessionName(s string) bool { return word(s, 2, 64, "_+=,.@-") }

// Role reads the profile's role.
func (c *Config) Role(profile string) (Role, error) {
	if err := CheckName(profile); err != nil {
		return Role{}, err
	}
	p := c.Profiles[profile]
	if p == nil {
		return Role{}, fmt.Errorf("%s has no profile %q: add it: vpn aws configure %s --role-arn ARN --source-profile NAME", c.File, profile, profile)
	}
	r := Role{
		Profile: profile, ARN: p["role_arn"], Source: p["source_profile"], MFASerial: p["mfa_serial"], MFAProcess: p["mfa_process"],
		ExternalID: p["external_id"], SessionName: p["role_session_name"], Duration: defaultDuration,
	}
	bad := func(key, want string) (Role, error) {
		return Role{}, fmt.Errorf("%s, profile %q: %s = %q: want %s", c.File, profile, key, p[key], want)
	}
	for _, of := range []string{p["region"], c.Profiles[r.Source]["region"], c.region} {
		if r.Region == "" {
			r.Region = of
		}
	}
	switch {
	case !isRole(r.ARN):
		return bad("role_arn", "a role, as in arn:aws:iam::123456789012:role/Admin")
	case r.Source == "" || r.Source == profile:
		return bad("source_profile", "another profile, that has your keys or a credential_process: vpn aws configure "+profile+" --source-process COMMAND makes one")
	case r.MFASerial != "" && !word(r.MFASerial, 9, 256, "_+=/:,.@-"):
		return bad("mfa_serial", "a device, as in arn:aws:iam::123456789012:mfa/alice")
	case r.SessionName != "" && !isSessionName(r.SessionName):
		return bad("role_session_name", "2 to 64 letters, digits and _ + = , . @ -")
	case len(r.ExternalID) > 1224:
		return bad("external_id", "at most 1,224 letters")
	case !word(r.Region, 8, 32, "-"):
		return Role{}, fmt.Errorf("%s, profile %q: region = %q: want the region whose STS to ask, as in eu-central-1", c.File, profile, r.Region)
	}
	if _, err := r.endpoint(); err != nil {
		return Role{}, fmt.Errorf("%s, profile %q: %w", c.File, profile, err)
	}
	if s := p["duration_seconds"]; s != "" {
		n, err := strconv.Atoi(s)
		if err != nil || n < 900 || n > 43200 {
			return bad("duration_seconds", "900 to 43200, and what the role allows")
		}
		r.Duration = time.Duration(n) * time.Second
	}
	return r, nil
}

// base finds the role's base credentials: keys, or the command that prints them.
func (c *Config) base(r Role) (Credentials, string, error) {
	for _, p := range []Profile{c.Keys[r.Source], c.Profiles[r.Source]} {
		if p["aws_access_key_id"] != "" && p["aws_secret_access_key"] != "" {
			return Credentials{AccessKeyID: p["aws_access_key_id"], SecretAccessKey: p["aws_secret_access_key"], SessionToken: p["aws_session_token"]}, "", nil
		}
	}
	p, hint := c.Profiles[r.Source], ""
	switch command := p["credential_process"]; {
	case c.IsHelper(r.Source):
		return Credentials{}, "", fmt.Errorf("source_profile %q is a pinned session itself, which may assume no role: name the profile that has your keys", r.Source)
	case command != "" && p["role_arn"] == "":
		return Credentials{}, command, nil
	case p["sso_session"] != "" || p["sso_start_url"] != "" || p["login_session"] != "":
		hint = fmt.Sprintf(`: run: vpn aws configure %s --source-process "aws configure export-credentials --profile %s"`, r.Profile, r.Source)
	}
	return Credentials{}, "", fmt.Errorf("source_profile %q has neither keys nor a credential_process, in %s and %s%s", r.Source, c.File, c.KeyFile, hint)
}

// helps is the profile whose sessions a credential_process of ours gives; "" if it is another's.
func helps(process string) string {
	m := regexp.MustCompile(`(?:^|[/\\" ])vpn(?:\.exe)?"?(?: "?--profile=[^"]+"?)? aws credentials(?: --no-[a-z-]+)* (\S+)$`).FindStringSubmatch(process)
	if m == nil {
		return ""
	}
	return m[1]
}

// IsHelper says whether the profile's credential_process is `vpn aws credentials`.
func (c *Config) IsHelper(profile string) bool {
	return helps(c.Profiles[profile]["credential_process"]) != ""
}

// Through finds the profile for AWS tools that gets its credentials from `vpn aws credentials`: the profile itself, the one that
// `vpn aws configure` made for a role, or one that assumes no role.
func (c *Config) Through(profile string) (string, error) {
	if err := CheckName(profile); err != nil {
		return "", err
	}
	p, keys := c.Profiles[profile], c.Keys[profile]
	if p == nil && keys == nil {
		return "", fmt.Errorf("no AWS profile %q in %s or %s", profile, c.File, c.KeyFile)
	}
	if p["role_arn"] == "" {
		if c.IsHelper(profile) {
			return profile, c.CheckHelper(profile)
		}
		return profile, nil
	}
	found := ""
	for name, other := range c.Profiles {
		if helps(other["credential_process"]) == profile && (found == "" || name < found) {
			found = name
		}
	}
	if found == "" {
		return "", fmt.Errorf("profile %q assumes its role without the tunnel's pin: run once: vpn aws configure %s", profile, profile)
	}
	return found, c.CheckHelper(found)
}

// CheckHelper says what would make AWS tools pass over the profile's credential_process.
func (c *Config) CheckHelper(profile string) error {
	for _, key := range []string{"role_arn", "source_profile", "aws_access_key_id", "sso_session", "sso_start_url", "web_identity_token_file"} {
		if c.Profiles[profile][key] != "" {
			return fmt.Errorf("%s, profile %q: AWS tools prefer its %s to its credential_process: remove it, or choose another with --name", c.File, profile, key)
		}
	}
	if c.Keys[profile] != nil {
		return fmt.Errorf("%s has a section [%s], which AWS tools prefer to the profile's credential_process: remove it, or choose another with --name", c.KeyFile, profile)
	}
	return nil
}
