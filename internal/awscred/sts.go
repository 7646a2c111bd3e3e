package awscred

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/arn"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
)

// Two calls of STS, which AWS's library signs: https://docs.aws.amazon.com/STS/latest/APIReference. Its clients would cost every
// start of the program half a millisecond and two megabytes.

const (
	stsVersion  = "2011-06-15"
	maxReply    = 256 << 10 // bytes
	askPatience = 20 * time.Second
)

// assumption is what is asked of AssumeRole.
type assumption struct {
	Role
	Policy   string // "": none
	Identity string // source identity; "": none
	Name     string // of the session
}

func (h *Helper) assumeRole(ctx context.Context, proxy string, base Credentials, a assumption) (Credentials, error) {
	form := url.Values{"Action": {"AssumeRole"}, "RoleArn": {a.ARN}, "RoleSessionName": {a.Name}, "DurationSeconds": {seconds(a.Duration)}}
	for key, value := range map[string]string{"Policy": a.Policy, "SourceIdentity": a.Identity, "ExternalId": a.ExternalID} {
		if value != "" {
			form.Set(key, value)
		}
	}
	for pause := 250 * time.Millisecond; ; pause *= 4 {
		s, err := h.ask(ctx, proxy, base, form)
		if err == nil || pause > time.Second || !passing(err) {
			return s, err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return s, err
		}
	}
}

// getSessionToken asks once: an MFA code is good for one request.
func (h *Helper) getSessionToken(ctx context.Context, proxy string, keys Credentials, code string) (Credentials, error) {
	return h.ask(ctx, proxy, keys, url.Values{"Action": {"GetSessionToken"}, "DurationSeconds": {seconds(baseDuration)}, "SerialNumber": {h.Role.MFASerial}, "TokenCode": {code}})
}

func seconds(d time.Duration) string { return strconv.Itoa(int(d / time.Second)) }

// endpoint is the region's own STS, whose addresses are IPv4.
func (r Role) endpoint() (string, error) {
	role, err := arn.Parse(r.ARN)
	domain, ok := map[string]string{"aws": "amazonaws.com", "aws-us-gov": "amazonaws.com", "aws-cn": "amazonaws.com.cn", "aws-eusc": "amazonaws.eu"}[role.Partition]
	if err != nil || !ok {
		return "", fmt.Errorf("role_arn = %q: where STS of the partition %q is, is not known here", r.ARN, role.Partition)
	}
	return "sts." + r.Region + "." + domain, nil
}

// ask signs a request with the keys, and sends it through the proxy and no other way.
func (h *Helper) ask(ctx context.Context, proxy string, keys Credentials, form url.Values) (s Credentials, err error) {
	ctx, cancel := context.WithTimeout(ctx, askPatience)
	defer cancel()
	host, err := h.Role.endpoint()
	if err != nil {
		return s, err
	}
	t, err := newTransport(proxy)
	if err != nil {
		return s, err
	}
	defer t.CloseIdleConnections()
	call := form.Get("Action") + " at " + host
	form.Set("Version", stsVersion)
	body := form.Encode()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+host+"/", strings.NewReader(body))
	if err != nil {
		return s, err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded; charset=utf-8")
	hash := sha256.Sum256([]byte(body))
	signing := aws.Credentials{AccessKeyID: keys.AccessKeyID, SecretAccessKey: keys.SecretAccessKey, SessionToken: keys.SessionToken}
	if err := v4.NewSigner().SignHTTP(ctx, signing, req, hex.EncodeToString(hash[:]), "sts", h.Role.Region, h.Now()); err != nil {
		return s, fmt.Errorf("%s: %w", call, err)
	}
	resp, err := t.RoundTrip(req) // a redirect is no answer
	var text []byte
	if err == nil {
		defer resp.Body.Close()
		text, err = io.ReadAll(http.MaxBytesReader(nil, resp.Body, maxReply))
	}
	var refused Refusal
	switch {
	case errors.As(err, &refused):
		return s, fmt.Errorf("%s: %w: ask the operator to allow it", call, refused)
	case err != nil:
		return s, silence{fmt.Errorf("%s, through the tunnel: %w: `vpn status` says whether data pass", call, err)}
	}
	return parseReply(call, resp.StatusCode, text)
}

// reply has what both calls answer, and errors as STS and as S3 spell them.
type reply struct {
	Role  granted `xml:"AssumeRoleResult>Credentials"`
	Token granted `xml:"GetSessionTokenResult>Credentials"`
	Error struct{ Code, Message string }
	Code  string
	Text  string `xml:"Message"`
}

type granted struct {
	AccessKeyId, SecretAccessKey, SessionToken string
	Expiration                                 time.Time
}

func parseReply(call string, status int, text []byte) (Credentials, error) {
	var r reply
	err := xml.Unmarshal(text, &r)
	if status != http.StatusOK {
		d := Denial{call, status, r.Error.Code, r.Error.Message}
		if d.Code == "" {
			d.Code, d.Message = r.Code, r.Text
		}
		if d.Code == "" {
			d.Code = http.StatusText(status)
		}
		return Credentials{}, d
	}
	g := r.Role
	if g.AccessKeyId == "" {
		g = r.Token
	}
	if err != nil || g.AccessKeyId == "" || g.SecretAccessKey == "" || g.SessionToken == "" || g.Expiration.IsZero() {
		return Credentials{}, fmt.Errorf("%s: the answer has no session in it", call)
	}
	return Credentials{g.AccessKeyId, g.SecretAccessKey, g.SessionToken, g.Expiration}, nil
}

// Refusal is the proxy's answer to CONNECT.
type Refusal struct {
	Status string
	Reason string // the proxy's word for it
}

func (r Refusal) Error() string {
	return fmt.Sprintf("the proxy refused it: %.60q (%.60q)", r.Status, r.Reason)
}

// newTransport goes through the proxy, whatever the environment says.
func newTransport(proxy string) (*http.Transport, error) {
	u, err := url.Parse(proxy)
	if err != nil || u.Scheme != "http" || u.Host == "" {
		return nil, errors.New("the tunnel has no proxy: bring it up: vpn up")
	}
	return &http.Transport{
		Proxy: http.ProxyURL(u), TLSHandshakeTimeout: 10 * time.Second, MaxResponseHeaderBytes: 64 << 10,
		OnProxyConnectResponse: func(_ context.Context, _ *url.URL, _ *http.Request, r *http.Response) error {
			if r.StatusCode == http.StatusOK {
				return nil
			}
			return Refusal{r.Status, r.Header.Get("X-Perimeter-Reason")}
		},
	}, nil
}

// silence is an answer that did not come.
type silence struct{ error }

// Denial is an answer of AWS that says no.
type Denial struct {
	Call          string
	Status        int
	Code, Message string
}

func (d Denial) Error() string {
	hint := ""
	switch {
	case d.Code == "AccessDenied" && strings.Contains(d.Message, "explicit deny"):
		hint = "a policy denies it by name: a guard that does not list this egress? `vpn doctor` compares"
	case d.Code == "AccessDenied" && strings.Contains(d.Message, "MultiFactorAuthentication"):
		hint = "wait for the device's next code, and try again"
	case d.Code == "AccessDenied":
		hint = "the role's trust and your own policy must allow it from the egress; a source identity takes sts:SetSourceIdentity in both, or --no-source-identity"
	case d.Code == "SignatureDoesNotMatch" || d.Code == "RequestExpired":
		hint = "a wrong secret key, or a wrong clock"
	case isStale(d):
		hint = "try again, since what was kept is dropped; if it stays, the base keys are not valid any more"
	}
	text := fmt.Sprintf("%s: AWS says %.60q %.400q", d.Call, d.Code, d.Message)
	if hint != "" {
		text += ": " + hint
	}
	return text
}

// passing tells of what another attempt may mend.
func passing(err error) bool {
	var s silence
	var d Denial
	return errors.As(err, &s) || errors.As(err, &d) && (d.Status >= 500 || d.Code == "Throttling")
}

// isStale tells of base credentials that ended before their time.
func isStale(err error) bool {
	var d Denial
	return errors.As(err, &d) && (d.Code == "ExpiredToken" || d.Code == "InvalidClientTokenId" || d.Code == "InvalidAccessKeyId")
}
