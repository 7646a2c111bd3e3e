package awscred

import (
	"fmt"
	"slices"
	"strings"
)

// Trouble is what would make AWS tools of an environment fail, or work with other credentials than their owner means.
type Trouble struct {
	Code string // stable
	Text string
	Fix  string
}

// Codes of troubles.
const (
	CodeConfig      = "aws-config"      // a file that AWS tools read is not in order
	CodeInherited   = "aws-environment" // credentials in the environment, which win over every profile
	CodeNoProfile   = "aws-no-profile"  // AWS_PROFILE names none
	CodeShadowed    = "aws-shadowed"    // a profile of ours is passed over
	CodeUnpinned    = "aws-unpinned"    // a profile assumes a role by itself, and its session works anywhere
	CodeNoRegion    = "aws-no-region"   // none is set
	CodeUnavailable = "aws-role"        // a profile of ours leads to a role that cannot be assumed
)

// Check looks at the AWS configuration of an environment. Nothing is asked of the network.
func Check(environ []string) (list []Trouble) {
	found := func(code, fix, format string, a ...any) {
		list = append(list, Trouble{code, fmt.Sprintf(format, a...), fix})
	}
	var winning []string
	for _, name := range CredentialVariables(environ) {
		if name != "AWS_PROFILE" && name != "AWS_DEFAULT_PROFILE" {
			winning = append(winning, name)
		}
	}
	if len(winning) > 0 {
		names := strings.Join(winning, " ")
		found(CodeInherited, "unset "+names+", or run by: vpn exec --aws-profile PROFILE -- ...", "AWS tools prefer this shell's %s to any profile", strings.ReplaceAll(names, " ", ", "))
	}
	c, err := ReadConfig(environ)
	if err != nil {
		found(CodeConfig, "", "%v", err)
		return list
	}
	profile, chosen := "default", variable(environ, "AWS_PROFILE")
	if chosen == "" {
		chosen = variable(environ, "AWS_DEFAULT_PROFILE")
	}
	if chosen != "" {
		profile = chosen
	}
	p := c.Profiles[profile]
	if chosen != "" && p == nil && c.Keys[profile] == nil {
		found(CodeNoProfile, "choose another: export AWS_PROFILE=NAME", "AWS_PROFILE=%q is in neither %s nor %s", profile, c.File, c.KeyFile)
	}
	if p["role_arn"] != "" {
		found(CodeUnpinned, "vpn aws configure "+profile, "profile %q assumes its role by itself: that session works for who steals it, wherever no guard denies it", profile)
	}
	used := len(winning) > 0 || chosen != "" || p != nil || c.Keys[profile] != nil
	if used && c.region == "" && p["region"] == "" {
		found(CodeNoRegion, "export AWS_REGION=REGION, or give the profile a region", "profile %q has no region, and the shell neither", profile)
	}
	var ours []string
	for name := range c.Profiles {
		if c.IsHelper(name) {
			ours = append(ours, name)
		}
	}
	slices.Sort(ours)
	for _, name := range ours {
		if err := c.CheckHelper(name); err != nil {
			found(CodeShadowed, "", "%v", err)
			continue
		}
		role, err := c.Role(helps(c.Profiles[name]["credential_process"]))
		if err == nil {
			_, _, err = c.base(role)
		}
		if err != nil {
			found(CodeUnavailable, "", "profile %q: %v", name, err)
		}
	}
	return list
}
