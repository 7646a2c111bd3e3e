package main

import (
	"fmt"
	"os"
	"regexp"
	"strings"

	"github.com/spf13/cobra"

	"perimeterd/internal/awscred"
	"perimeterd/vpn/client"
)

func awsConfigureCommand(profile *string) *cobra.Command {
	var noPin, noIdentity bool
	var name, roleARN, sourceProfile, sourceProcess, mfaSerial, mfaProcess, region string
	c := &cobra.Command{
		Use: "configure PROFILE", Short: "Write a profile that gets its sessions through the tunnel to ~/.aws/config", Args: oneArgument,
		Long: "Writes a second profile, PROFILE-vpn, whose credential_process is `vpn aws credentials PROFILE`: a profile that has a role_arn\n" +
			"of its own never asks its credential_process. The flags change PROFILE itself. Everything else in the file stays as it is. No key is\n" +
			"written: base credentials stay where they are, with another profile or a command.",
		Example: `  vpn aws configure production                       a profile with role_arn and source_profile that you have
  vpn aws configure production --role-arn arn:aws:iam::123456789012:role/Admin --region eu-central-1 \
      --source-process "aws-vault export --no-session --format=json bastion" --mfa-serial arn:aws:iam::210987654321:mfa/alice
  vpn exec --aws-profile production -- aws s3 ls`,
		RunE: func(c *cobra.Command, args []string) error {
			p, err := client.LoadProfile(*profile)
			if err != nil {
				return err
			}
			config, err := awscred.ReadConfig(os.Environ())
			if err != nil {
				return err
			}
			role := args[0]
			if name == "" {
				name = role + "-vpn"
			}
			if sourceProcess != "" {
				if sourceProfile == "" {
					sourceProfile = role + "-base"
				}
				if err := config.Set(sourceProfile, awscred.Setting{Key: "credential_process", Value: sourceProcess}); err != nil {
					return err
				}
			}
			var settings []awscred.Setting
			for _, s := range []awscred.Setting{{Key: "role_arn", Value: roleARN}, {Key: "source_profile", Value: sourceProfile},
				{Key: "mfa_serial", Value: mfaSerial}, {Key: "mfa_process", Value: mfaProcess}, {Key: "region", Value: region}} {
				if s.Value != "" {
					settings = append(settings, s)
				}
			}
			if len(settings) > 0 {
				if err := config.Set(role, settings...); err != nil {
					return err
				}
			}
			r, err := config.Role(role)
			if err != nil {
				return err
			}
			if err := config.CheckHelper(name); err != nil {
				return err
			}
			if other := config.Profiles[name]["credential_process"]; other != "" && !config.IsHelper(name) {
				return fmt.Errorf("%s, profile %q has another credential_process: choose another with --name", config.File, name)
			}
			call, err := awsHelperCall(*profile, role, noPin, noIdentity)
			if err != nil {
				return err
			}
			if err := config.Set(name, awscred.Setting{Key: "credential_process", Value: call}, awscred.Setting{Key: "region", Value: r.Region}); err != nil {
				return err
			}
			if err := config.Save(); err != nil {
				return err
			}
			fmt.Printf("profile %s in %s gets sessions of %s by the tunnel of %s\n", name, config.File, r.ARN, p.Name())
			if noPin {
				fmt.Fprintln(os.Stderr, "warning: without the pin, a stolen session works from anywhere that the role's own policies allow")
			}
			fmt.Printf("\nTry it:\n    vpn exec --aws-profile %s -- aws sts get-caller-identity\n", role)
			return nil
		},
	}
	f := c.Flags()
	f.StringVar(&name, "name", "", "`NAME` of the second profile (default PROFILE-vpn)")
	f.StringVar(&roleARN, "role-arn", "", "set the role, `ARN`")
	f.StringVar(&sourceProfile, "source-profile", "", "set the profile `NAME` that has the base credentials")
	f.StringVar(&sourceProcess, "source-process", "", "take the base credentials from a `COMMAND`, under the profile PROFILE-base")
	f.StringVar(&mfaSerial, "mfa-serial", "", "set the MFA device, `ARN`")
	f.StringVar(&mfaProcess, "mfa-process", "", "set the `COMMAND` that prints the MFA code, instead of asking at the terminal")
	f.StringVar(&region, "region", "", "set the `REGION`, whose STS is asked")
	awsSessionFlags(c, &noPin, &noIdentity)
	return c
}

var shellWord = regexp.MustCompile(`^[\w@%+=:,./\\~-]+$`)

// awsHelperCall is this program's command line for a credential_process, which some AWS tools split into words and others give a
// shell.
func awsHelperCall(profile, role string, noPin, noIdentity bool) (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	words := []string{self}
	if profile != "" {
		words = append(words, "--profile="+profile)
	}
	words = append(words, "aws", "credentials")
	if noPin {
		words = append(words, "--no-pin")
	}
	if noIdentity {
		words = append(words, "--no-source-identity")
	}
	for i, w := range words {
		if strings.ContainsAny(w, "\"$`\n") {
			return "", fmt.Errorf("%q cannot be written into ~/.aws/config: want a path without quotes and $", w)
		}
		if !shellWord.MatchString(w) {
			words[i] = `"` + w + `"`
		}
	}
	return strings.Join(append(words, role), " "), nil
}
