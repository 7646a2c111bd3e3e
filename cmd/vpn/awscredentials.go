package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"perimeterd/internal/awscred"
	"perimeterd/vpn/client"
)

func awsCredentialsCommand(profile *string) *cobra.Command {
	var noPin, noIdentity bool
	c := &cobra.Command{
		Use: "credentials PROFILE", Short: "Print a session of the profile's role, for a credential_process", Args: oneArgument,
		Long: "Gets a session of the role that PROFILE of ~/.aws/config names, through the tunnel, and prints it as AWS tools ask a\n" +
			"credential_process for it; on a terminal it only says that it has one. The session is pinned: AWS denies it everywhere but at the\n" +
			"bastion's egress. It is kept, encrypted, until five minutes before its end. `vpn aws configure` writes the line that calls this.",
		Example: "  vpn aws credentials production          in a terminal: ask for the MFA code now",
		RunE: func(_ *cobra.Command, args []string) error {
			p, err := client.LoadProfile(*profile)
			if err != nil {
				return err
			}
			h, err := awsHelper(p, args[0])
			if err != nil {
				return err
			}
			h.NoPin, h.NoSourceIdentity = noPin, noIdentity
			ctx, stop := interrupted()
			defer stop()
			s, err := h.Credentials(ctx)
			if err != nil {
				return err
			}
			if term.IsTerminal(int(os.Stdout.Fd())) {
				fmt.Printf("session of %s until %s\n", h.Role.ARN, s.Expiration.Local().Format("Jan 2 15:04"))
				return nil
			}
			text, err := s.Process()
			if err == nil {
				_, err = os.Stdout.Write(append(text, '\n'))
			}
			return err
		},
	}
	awsSessionFlags(c, &noPin, &noIdentity)
	return c
}

func awsSessionFlags(c *cobra.Command, noPin, noIdentity *bool) {
	c.Flags().BoolVar(noPin, "no-pin", false, "a session that works from anywhere, for who steals it too")
	c.Flags().BoolVar(noIdentity, "no-source-identity", false, "do not set the certificate's name as source identity, which takes sts:SetSourceIdentity")
}

func awsHelper(p *client.Profile, profile string) (*awscred.Helper, error) {
	config, err := awscred.ReadConfig(os.Environ())
	if err != nil {
		return nil, err
	}
	role, err := config.Role(profile)
	if err != nil {
		return nil, err
	}
	base, err := os.UserCacheDir()
	if err != nil {
		return nil, fmt.Errorf("no place for sessions: %w", err)
	}
	cache, err := awscred.NewCache(filepath.Join(base, "perimeter", "aws"), []byte(p.Key))
	if err != nil {
		return nil, err
	}
	return &awscred.Helper{
		Role: role, Config: config, Cache: cache, User: p.User, Egress: p.Egress, Now: time.Now,
		Tunnel: func(ctx context.Context) (awscred.Tunnel, error) { return awsTunnel(ctx, p) },
	}, nil
}

// awsTunnel asks the process that keeps the tunnel for its proxy; what the environment says of one is not asked.
func awsTunnel(ctx context.Context, p *client.Profile) (t awscred.Tunnel, err error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	s, err := client.AskStatus(ctx, p)
	if err != nil {
		return t, err
	}
	switch {
	case s.State == client.Refused:
		return t, errors.New(s.Problem)
	case !s.Proxy.IsValid():
		return t, client.ErrDown
	}
	return awscred.Tunnel{Proxy: s.URL, Env: client.Environment(s)}, nil
}

// useAWSProfile makes the environment that of one AWS profile, whose credentials nothing inherited wins over; "" leaves it.
func useAWSProfile(profile string) error {
	if profile == "" {
		return nil
	}
	config, err := awscred.ReadConfig(os.Environ())
	if err != nil {
		return err
	}
	through, err := config.Through(profile)
	if err != nil {
		return err
	}
	for _, name := range awscred.CredentialVariables(os.Environ()) {
		os.Unsetenv(name)
	}
	os.Setenv("AWS_SDK_LOAD_CONFIG", "1") // or older SDKs pass over credential_process
	return os.Setenv("AWS_PROFILE", through)
}
