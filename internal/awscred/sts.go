package awscred

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/sts"
	"github.com/aws/aws-sdk-go-v2/service/sts/types"
	"github.com/aws/smithy-go"
)

// maxReply bounds an answer of STS, bytes.
const maxReply = 256 << 10

// assumption is what is asked of AssumeRole.
type assumption struct {
	Role
	Policy   string // "": none
	Identity string // source identity; "": none
	Name     string // of the session
}

func assumeRole(ctx context.Context, proxy string, base Credentials, a assumption) (Credentials, error) {
	client, done, err := newSTS(proxy, base, a.Region, 3)
	if err != nil {
		return Credentials{}, err
	}
	defer done()
	ctx, cancel := context.WithTimeout(ctx, askPatience)
	defer cancel()
	out, err := client.AssumeRole(ctx, &sts.AssumeRoleInput{
		RoleArn: &a.ARN, RoleSessionName: &a.Name, DurationSeconds: aws.Int32(int32(a.Duration / time.Second)),
		Policy: optional(a.Policy), SourceIdentity: optional(a.Identity), ExternalId: optional(a.ExternalID),
	})
	if err != nil {
		return Credentials{}, explain("AssumeRole of "+a.ARN, a.Region, err)
	}
	return session(out.Credentials)
}

// getSessionToken asks once: an MFA code is good for one request.
func getSessionToken(ctx context.Context, proxy string, keys Credentials, region, serial, code string) (Credentials, error) {
	client, done, err := newSTS(proxy, keys, region, 1)
	if err != nil {
		return Credentials{}, err
	}
	defer done()
	ctx, cancel := context.WithTimeout(ctx, askPatience)
	defer cancel()
	out, err := client.GetSessionToken(ctx, &sts.GetSessionTokenInput{
		DurationSeconds: aws.Int32(int32(baseDuration / time.Second)), SerialNumber: &serial, TokenCode: &code,
	})
	if err != nil {
		return Credentials{}, explain("GetSessionToken with MFA", region, err)
	}
	return session(out.Credentials)
}

func optional(s string) *string {
	if s == "" {
		return nil
	}
	return &s
}

func session(c *types.Credentials) (Credentials, error) {
	if c == nil || c.AccessKeyId == nil || c.SecretAccessKey == nil || c.SessionToken == nil || c.Expiration == nil {
		return Credentials{}, errors.New("AWS answered without a session")
	}
	return Credentials{*c.AccessKeyId, *c.SecretAccessKey, *c.SessionToken, *c.Expiration}, nil
}

// newSTS asks the region's own STS, whose addresses are IPv4, through the proxy and no other way.
func newSTS(proxy string, keys Credentials, region string, attempts int) (client *sts.Client, done func(), err error) {
	transport, err := NewTransport(proxy)
	if err != nil {
		return nil, nil, err
	}
	return sts.New(sts.Options{
		Region: region, RetryMaxAttempts: attempts,
		HTTPClient: &http.Client{Transport: bounded{transport}, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }},
		Credentials: aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) {
			return aws.Credentials{AccessKeyID: keys.AccessKeyID, SecretAccessKey: keys.SecretAccessKey, SessionToken: keys.SessionToken}, nil
		}),
	}), transport.CloseIdleConnections, nil
}

// Refusal is the proxy's answer to CONNECT.
type Refusal struct {
	Status string
	Reason string // the proxy's word for it
}

func (r Refusal) Error() string {
	return fmt.Sprintf("the proxy refused: %.60q (%.60q)", r.Status, r.Reason)
}

// NewTransport goes through the proxy, whatever the environment says.
func NewTransport(proxy string) (*http.Transport, error) {
	u, err := url.Parse(proxy)
	if err != nil || u.Scheme != "http" || u.Host == "" {
		return nil, errors.New("the tunnel has no proxy: bring it up: vpn up")
	}
	return &http.Transport{
		Proxy: http.ProxyURL(u), TLSHandshakeTimeout: 10 * time.Second, ResponseHeaderTimeout: 20 * time.Second, MaxResponseHeaderBytes: 64 << 10,
		OnProxyConnectResponse: func(_ context.Context, _ *url.URL, _ *http.Request, r *http.Response) error {
			if r.StatusCode == http.StatusOK {
				return nil
			}
			return Refusal{r.Status, r.Header.Get("X-Perimeter-Reason")}
		},
	}, nil
}

type bounded struct{ http.RoundTripper }

func (b bounded) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := b.RoundTripper.RoundTrip(r)
	if err == nil {
		resp.Body = http.MaxBytesReader(nil, resp.Body, maxReply)
	}
	return resp, err
}

// Denial is an answer of AWS that says no.
type Denial struct {
	Call, Code, Message string
}

func (d Denial) Error() string {
	hint := ""
	switch {
	case d.Code == "AccessDenied" && strings.Contains(d.Message, "explicit deny"):
		hint = "a policy denies it by name: a guard that does not list this egress? `vpn doctor` compares"
	case d.Code == "AccessDenied" && strings.Contains(d.Message, "MultiFactorAuthentication"):
		hint = "wait for the device's next code, and try again"
	case d.Code == "AccessDenied":
		hint = "the role's trust and your own policy must allow it from the egress; with a source identity, sts:SetSourceIdentity too (--no-source-identity)"
	case d.Code == "SignatureDoesNotMatch" || d.Code == "RequestExpired":
		hint = "a wrong secret key, or a wrong clock"
	case isStale(d):
		hint = "try again: what was kept of it is dropped; if it stays, the base keys are not valid any more"
	}
	text := fmt.Sprintf("%s: AWS says %.60q: %.400q", d.Call, d.Code, d.Message)
	if hint != "" {
		text += ": " + hint
	}
	return text
}

// isStale tells of base credentials that ended before their time.
func isStale(err error) bool {
	var d Denial
	return errors.As(err, &d) && (d.Code == "ExpiredToken" || d.Code == "InvalidClientTokenId" || d.Code == "InvalidAccessKeyId")
}

// explain tells AWS's no, the proxy's, and the tunnel's silence apart.
func explain(call, region string, err error) error {
	var api smithy.APIError
	if errors.As(err, &api) {
		return Denial{call, api.ErrorCode(), api.ErrorMessage()}
	}
	var refusal Refusal
	if errors.As(err, &refusal) {
		return fmt.Errorf("%s: %w: ask the operator to allow sts.%s.amazonaws.com", call, refusal, region)
	}
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err
	}
	return fmt.Errorf("%s, through the tunnel: %w: `vpn status` says whether data pass", call, err)
}
