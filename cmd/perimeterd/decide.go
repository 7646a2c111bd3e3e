package main

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"perimeterd/configs"
	"perimeterd/internal/control"
	"perimeterd/internal/identity"
	"perimeterd/proxy"
	"perimeterd/vpn"
)

// refusedError is a dry run that ended in a refusal: the answer has been printed.
type refusedError struct{ reason string }

func (e refusedError) Error() string { return "refused: " + e.reason }

func newDecideCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "decide USER HOST:PORT",
		Short: "Say what the proxy would do with a request, and why",
		Long: `Examples:
  perimeterd decide alice s3.us-east-1.amazonaws.com:443
  perimeterd decide alice https://example.com/              the same for a URL; plain http is judged as such
  perimeterd decide bob 10.20.0.7:5432 --json

Nothing is dialed, and no name is resolved. The running daemon answers by the configuration that rules; where none runs, the
file is asked.

Exit status: 0 allowed, 1 refused, or it could not be found out, 2 the command line or the configuration is wrong.`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 2 {
				return errors.New("decide wants a USER and a HOST:PORT: perimeterd decide alice s3.us-east-1.amazonaws.com:443")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if _, _, err := parseDestination(args[1]); err != nil {
				return usageError{err}
			}
			p, err := findPaths(cmd)
			if err != nil {
				return err
			}
			d, err := control.NewClient(p.ControlSocket()).Decide(cmd.Context(), args[0], args[1])
			if errors.Is(err, control.ErrNotRunning) {
				d, err = decideStopped(cmd, args[0], args[1])
			}
			if err != nil {
				return err
			}
			if asJSON {
				err = printJSON(cmd.OutOrStdout(), d)
			} else {
				err = printDecision(cmd.OutOrStdout(), d)
			}
			if err == nil && !d.Allow {
				return refusedError{d.Reason}
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// parseDestination reads HOST:PORT or a URL.
func parseDestination(s string) (to proxy.Destination, plain bool, err error) {
	if rest, ok := strings.CutPrefix(s, "https://"); ok {
		host, _, _ := strings.Cut(rest, "/")
		if strings.LastIndexByte(host, ':') <= strings.LastIndexByte(host, ']') {
			host += ":443"
		}
		to, err = proxy.ParseAuthority(host)
	} else if strings.Contains(s, "://") {
		plain = true
		to, err = proxy.ParseURL(s)
	} else {
		to, err = proxy.ParseAuthority(s)
	}
	return to, plain, err
}

// decideStopped asks the file, where no daemon runs.
func decideStopped(cmd *cobra.Command, user, to string) (d control.Decision, err error) {
	cfg, err := loadConfig(cmd)
	if err != nil {
		return d, err
	}
	policy, err := proxy.Compile(cfg.Proxy)
	if err != nil {
		return d, err
	}
	err = withUsers(cmd.Context(), cfg, func(us users) error {
		all, err := us.ListUsers(cmd.Context())
		if err != nil {
			return err
		}
		i := slices.IndexFunc(all, func(u identity.User) bool { return u.Name == user })
		if i < 0 {
			return fmt.Errorf("user %q is %w: `perimeterd user list` shows who is", user, identity.ErrNoUser)
		}
		d, err = decide(policy, cfg.Proxy.Rules, all[i], to)
		return err
	})
	return d, err
}

// decider answers for the running daemon. Listed users of an external authority may be in no group.
func decider(config func() *configs.Config, policy func() *proxy.Policy, find func(string) (identity.User, error), listed func(string) bool) func(user, to string) (control.Decision, error) {
	return func(user, to string) (control.Decision, error) {
		u, err := find(user)
		if errors.Is(err, identity.ErrNoUser) && listed(user) {
			u, err = identity.User{Name: user}, nil
		}
		if err != nil {
			return control.Decision{}, err
		}
		d, err := decide(policy(), config().Proxy.Rules, u, to)
		if err != nil {
			err = &vpn.APIError{Status: http.StatusBadRequest, Code: vpn.CodeBadRequest, Message: err.Error()}
		}
		return d, err
	}
}

// decide says what a policy, made of these rules, makes of a user and a destination.
func decide(policy *proxy.Policy, rules []proxy.Rule, u identity.User, target string) (d control.Decision, err error) {
	to, plain, err := parseDestination(target)
	if err != nil {
		return d, err
	}
	d = control.Decision{User: u.Name, Groups: append([]string{}, u.Groups...), Destination: to.String(), Plain: plain}
	if !u.Active() {
		d.Reason, d.Sentence = string(proxy.NoSession), u.Name+" is revoked, and has no session to come from."
		return d, nil
	}
	found := policy.Decide(proxy.Request{User: u.Name, Groups: u.Groups, Destination: to, Plain: plain})
	d.Allow, d.Observed, d.Reason, d.Rule, d.TLS = found.Allow, found.Observed, string(found.Reason), found.Rule, found.TLS
	d.Addresses = d.Allow && to.Name != ""
	if found.Reason != proxy.Allowed {
		d.Sentence = found.Reason.Sentence()
	}
	if found.Rule > 0 && found.Rule <= len(rules) {
		d.RuleText = ruleText(rules[found.Rule-1])
	}
	return d, nil
}

// ruleText is a rule as the configuration has it, in one line.
func ruleText(r proxy.Rule) string {
	var parts []string
	list := func(key string, values []string) {
		if len(values) > 0 {
			parts = append(parts, fmt.Sprintf("%s = [%s]", key, strings.Join(values, ", ")))
		}
	}
	list("deny", r.Deny)
	list("except", r.Except)
	list("allow", r.Allow)
	if len(r.Ports) > 0 {
		parts = append(parts, fmt.Sprintf("ports = %s", strings.ReplaceAll(fmt.Sprint(r.Ports), " ", ", ")))
	}
	list("groups", r.Groups)
	list("users", r.Users)
	if r.TLS {
		parts = append(parts, "tls = true")
	}
	return strings.Join(parts, ", ")
}

func printDecision(out io.Writer, d control.Decision) error {
	var b strings.Builder
	groups := "in no group"
	if len(d.Groups) > 0 {
		groups = "in " + strings.Join(d.Groups, ", ")
	}
	verdict := "refused"
	switch {
	case d.Observed:
		verdict = "let through, since proxy.mode is observe; otherwise refused"
	case d.Allow:
		verdict = "allowed"
	}
	how := "as a tunnel"
	if d.Plain {
		how = "as plain HTTP"
	}
	fmt.Fprintf(&b, "%s (%s) to %s, %s: %s: %s\n", d.User, groups, d.Destination, how, verdict, d.Reason)
	if d.RuleText != "" {
		fmt.Fprintf(&b, "proxy.rule %d: %s\n", d.Rule, d.RuleText)
	}
	if d.Sentence != "" {
		fmt.Fprintln(&b, d.Sentence)
	}
	if d.TLS {
		fmt.Fprintln(&b, "The tunnel must open with a TLS ClientHello for this name.")
	}
	if d.Addresses {
		fmt.Fprintln(&b, "The addresses that the name resolves to are judged when it is dialed: private and reserved ones are refused then.")
	}
	_, err := io.WriteString(out, b.String())
	return err
}
