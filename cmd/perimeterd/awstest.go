package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"perimeterd/internal/awsiam"
	"perimeterd/internal/awsiam/awscmd"
)

func newAWSTestCommand(configured func() ([]netip.Prefix, error)) *cobra.Command {
	var t awsTest
	cmd := &cobra.Command{
		Use:   "test FILE...",
		Short: "Say what policies leave open, or what they make of one request",
		Long: `Examples:
  perimeterd aws test guard.json                             which of the usual mistakes it makes
  perimeterd aws test --scp scp.json --trust trust.json      a service control policy, a role's trust policy
  perimeterd aws policy user-guard | perimeterd aws test -
  perimeterd aws test allow.json guard.json --from 198.51.100.7 --action s3:GetObject --resource arn:aws:s3:::backups/db
  perimeterd aws test mfa.json allow.json --from 203.0.113.10 --mfa --action ec2:RunInstances --principal arn:aws:iam::111122223333:user/alice

FILE is a policy of a user or role; one that names a Principal is a trust or resource policy wherever it stands. Nothing is
asked of AWS. Without --action, the policies are asked what a thief would ask, and their owner, beside a policy that allows
everything. With it, one request is judged: in each kind of policy that is given something must allow, and a Deny is final. An
element, operator or condition key that is not known is an error, never passed over.

Exit status: 0 allowed, or no mistake; 1 denied, or a mistake was found; 2 the command line or a policy is wrong.`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args)+len(t.scp)+len(t.session)+len(t.trust) == 0 {
				return errors.New("aws test wants a policy's FILE: perimeterd aws test guard.json")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error { return t.run(cmd, args, configured) },
	}
	f := cmd.Flags()
	f.StringArrayVar(&t.scp, "scp", nil, "a service control policy's `FILE`; FullAWSAccess is beside those that only deny")
	f.StringArrayVar(&t.session, "session", nil, "a session policy's `FILE`")
	f.StringArrayVar(&t.trust, "trust", nil, "a role's trust policy's `FILE`, or another that names a Principal")
	f.StringVar(&t.action, "action", "", "judge one request: its `SERVICE:ACTION`")
	f.StringVar(&t.resource, "resource", "*", "its resource's `ARN`")
	f.StringVar(&t.from, "from", "", "the `ADDRESS` that it comes from, as AWS sees it")
	f.BoolVar(&t.mfa, "mfa", false, "its keys are a session's that was made with an MFA code")
	f.StringVar(&t.principal, "principal", "", "the caller's `ARN`: a user, role, role's session or identity provider")
	f.StringVar(&t.vpc, "vpc", "", "the `ID` of the VPC whose endpoint it comes through; without --action, one that should work")
	f.StringVar(&t.issued, "issued", "", "the `TIME` when the session was made (default: long-lived keys, or now with --mfa)")
	f.BoolVar(&t.service, "via-service", false, "AWS makes it, on the caller's behalf")
	f.StringArrayVar(&t.set, "set", nil, "a condition key's value in the request, `KEY=VALUE`; again for more values")
	f.StringArrayVar(&t.unset, "unset", nil, "a condition `KEY` that the request does not have")
	f.StringSliceVar(&t.egress, "egress", nil, "the address that should work, a `CIDR` (default: as it is configured)")
	f.BoolVar(&t.json, "json", false, "print JSON")
	return cmd
}

type awsTest struct {
	scp, session, trust, set, unset, egress        []string
	action, resource, from, principal, vpc, issued string
	mfa, service, json                             bool
}

func (t *awsTest) run(cmd *cobra.Command, args []string, configured func() ([]netip.Prefix, error)) error {
	set, err := t.policies(cmd.InOrStdin(), args)
	if err != nil {
		return usageError{err}
	}
	keys := map[string][]string{}
	for _, s := range t.set {
		k, v, ok := strings.Cut(s, "=")
		if !ok || k == "" {
			return usageError{fmt.Errorf("--set %q: want KEY=VALUE, as in aws:RequestedRegion=eu-central-1", s)}
		}
		keys[k] = append(keys[k], v)
	}
	if t.action == "" {
		return t.review(cmd, set, keys, configured)
	}
	c := awsiam.Caller{Principal: t.principal, VPC: t.vpc, MFA: t.mfa, ViaService: t.service, Now: time.Now(), Set: keys, Unset: t.unset}
	if c.From, err = netip.ParseAddr(t.from); err != nil {
		return usageError{fmt.Errorf("--from %q: want the address that the request comes from, as in 198.51.100.7", t.from)}
	}
	if t.mfa {
		c.Issued = c.Now
	}
	if t.issued != "" {
		if c.Issued, err = time.Parse(time.RFC3339, t.issued); err != nil {
			return usageError{fmt.Errorf("--issued %q: want a time as in 2026-01-31T12:00:00Z", t.issued)}
		}
	}
	r, err := c.Make(t.action, t.resource)
	if err != nil {
		return usageError{err}
	}
	d, err := set.Evaluate(r)
	if err != nil {
		return usageError{err}
	}
	if t.json {
		err = printJSON(cmd.OutOrStdout(), map[string]any{"allow": d.Allow, "by": d.By, "reason": d.Text})
	} else {
		by := d.Text
		if d.By != "" {
			by = d.By + ": " + d.Text
		}
		_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s  %s\n", map[bool]string{true: "allow", false: "deny"}[d.Allow], by)
	}
	if err == nil && !d.Allow {
		return refusedError{d.Text}
	}
	return err
}

// policies reads the files, each once.
func (t *awsTest) policies(stdin io.Reader, files []string) (s awsiam.Set, err error) {
	for _, l := range []struct {
		files []string
		to    *[]awsiam.File
	}{{files, &s.Identity}, {t.scp, &s.SCP}, {t.session, &s.Session}, {t.trust, &s.Resource}} {
		for _, name := range l.files {
			text, err := readPolicy(stdin, name)
			if err != nil {
				return s, err
			}
			d, err := awsiam.Parse(text)
			if err != nil {
				return s, fmt.Errorf("%s: %w", name, err)
			}
			to := l.to
			if d.NamesPrincipal() {
				if to == &s.SCP || to == &s.Session {
					return s, fmt.Errorf("%s: it names a Principal, which a service control or session policy does not: give it as --trust", name)
				}
				to = &s.Resource
			} else if to == &s.Resource {
				return s, fmt.Errorf("%s: it names no Principal, as a trust policy does", name)
			}
			*to = append(*to, awsiam.File{Name: name, Document: d})
		}
	}
	return s, nil
}

func readPolicy(stdin io.Reader, name string) ([]byte, error) {
	if name == "-" {
		return io.ReadAll(io.LimitReader(stdin, 1<<20))
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, 1<<20))
}

// mistakesError is a review that found something: it has been printed.
type mistakesError int

func (e mistakesError) Error() string { return fmt.Sprintf("%d of the usual mistakes", int(e)) }

func (t *awsTest) review(cmd *cobra.Command, set awsiam.Set, keys map[string][]string, configured func() ([]netip.Prefix, error)) error {
	if t.from != "" || t.mfa || t.service || t.issued != "" {
		return usageError{errors.New("--from, --mfa, --issued and --via-service are of one request: name it with --action SERVICE:ACTION")}
	}
	v := awsiam.Reviewer{Now: time.Now(), VPC: t.vpc, Principal: t.principal, Set: keys, Unset: t.unset}
	var err error
	if v.Egress, err = awscmd.Egress("", t.egress, configured); err != nil {
		return usageError{err}
	}
	found, err := v.Review(set)
	if err != nil {
		return usageError{err}
	}
	mistakes := 0
	var b bytes.Buffer
	for _, f := range found {
		if f.State == awsiam.Open || f.State == awsiam.Breaks {
			mistakes++
		}
		fmt.Fprintf(&b, "%-7s %-20s %s\n", f.State, f.Name, f.Text)
	}
	if t.json {
		err = printJSON(cmd.OutOrStdout(), found)
	} else {
		_, err = cmd.OutOrStdout().Write(b.Bytes())
	}
	if err == nil && mistakes > 0 {
		return mistakesError(mistakes)
	}
	return err
}
