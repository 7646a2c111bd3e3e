package awscred

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"
)

const roles = `[default]
region = eu-central-1
[profile production]
role_arn = arn:aws:iam::123456789012:role/team/Admin
source_profile = bastion
mfa_serial = arn:aws:iam::210987654321:mfa/alice
[profile bastion]
region = eu-west-1
[profile production-vpn]
credential_process = /usr/bin/vpn aws credentials production
[profile sso]
sso_session = corp
`

const baseKeys = "[bastion]\naws_access_key_id = AKIABASE\naws_secret_access_key = secret\n"

func TestRolesAreReadAsAWSToolsReadThem(t *testing.T) {
	c := files(t, roles, baseKeys)
	r, err := c.Role("production")
	want := Role{Profile: "production", ARN: "arn:aws:iam::123456789012:role/team/Admin", Source: "bastion", Region: "eu-west-1", MFASerial: "arn:aws:iam::210987654321:mfa/alice", Duration: time.Hour}
	if err != nil || r != want {
		t.Errorf("%+v, %v", r, err)
	}
	if keys, command, err := c.base(r); keys.SecretAccessKey != "secret" || command != "" || err != nil {
		t.Errorf("%v %q %v", keys, command, err)
	}
}

func TestARoleThatCannotWorkIsNamed(t *testing.T) {
	const good = "[profile p]\nrole_arn = arn:aws:iam::123456789012:role/A\nsource_profile = b\nregion = eu-west-1\n"
	for name, c := range map[string]struct{ config, want string }{
		"no profile":      {"", `has no profile "p"`},
		"no role":         {"[profile p]\nregion = eu-west-1\n", `role_arn = ""`},
		"a user":          {strings.Replace(good, "role/A", "user/A", 1), "want a role"},
		"another cloud":   {strings.Replace(good, "arn:aws:", "arn:aws-iso:", 1), "is not known here"},
		"itself":          {strings.Replace(good, "= b", "= p", 1), "want another profile"},
		"no source":       {strings.Replace(good, "source_profile = b\n", "", 1), "--source-process COMMAND"},
		"no region":       {strings.Replace(good, "eu-west-1", "", 1), `region = ""`},
		"a host's region": {strings.Replace(good, "eu-west-1", "evil.example/", 1), "evil.example"},
		"too long":        {good + "duration_seconds = 43201\n", "900 to 43200"},
		"a bad serial":    {good + "mfa_serial = a b\n", "want a device"},
		"a bad name":      {good + "role_session_name = a b\n", "role_session_name"},
	} {
		if _, err := files(t, c.config, "").Role("p"); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, c := range map[string]struct{ config, want string }{
		"nothing":        {good + "[profile b]\n", "neither keys nor a credential_process"},
		"single sign-on": {good + "[profile b]\nsso_session = corp\n", `--source-process "aws configure export-credentials --profile b"`},
		"ours":           {good + "[profile b]\ncredential_process = vpn aws credentials x\n", "may assume no role"},
	} {
		config := files(t, c.config, "")
		r, err := config.Role("p")
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := config.base(r); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestExecFindsThePinnedProfile(t *testing.T) {
	c := files(t, roles, baseKeys)
	for profile, want := range map[string]string{"production": "production-vpn", "production-vpn": "production-vpn", "bastion": "bastion", "sso": "sso"} {
		if got, err := c.Through(profile); got != want || err != nil {
			t.Errorf("%s: %q, %v", profile, got, err)
		}
	}
	if _, err := files(t, strings.Replace(roles, "credentials production", "credentials stage", 1), "").Through("production"); err == nil || !strings.Contains(err.Error(), "vpn aws configure production") {
		t.Errorf("without a profile of ours: %v", err)
	}
	if _, err := files(t, roles, "[production-vpn]\n").Through("production"); err == nil || !strings.Contains(err.Error(), "has a section [production-vpn]") {
		t.Errorf("with keys of the same name: %v", err)
	}
	if _, err := files(t, strings.Replace(roles, "[profile production-vpn]", "[profile production-vpn]\nsource_profile = x", 1), "").Through("production"); err == nil || !strings.Contains(err.Error(), "prefer its source_profile") {
		t.Errorf("with a source of its own: %v", err)
	}
	if _, err := c.Through("nobody"); err == nil {
		t.Error("a profile that is not there")
	}
}

func TestTheHelpersOwnLineIsKnown(t *testing.T) {
	for process, want := range map[string]string{
		"vpn aws credentials p": "p", "/usr/bin/vpn aws credentials p": "p", `"/a b/vpn" --profile=x aws credentials --no-pin --no-source-identity p`: "p",
		`"C:\Program Files\vpn.exe" "--profile=/a b/c.profile" aws credentials p`: "p",
		"aws-vault export p": "", "/usr/bin/othervpn aws credentials p": "", "vpn aws credentials": "", "": "",
	} {
		if got := helps(process); got != want {
			t.Errorf("%s: %q", process, got)
		}
	}
}

func helper(t *testing.T, c *Config) *Helper {
	t.Helper()
	r, err := c.Role("production")
	if err != nil {
		t.Fatal(err)
	}
	cache, err := NewCache(filepath.Join(t.TempDir(), "aws"), []byte(strings.Repeat("k", 64)))
	if err != nil {
		t.Fatal(err)
	}
	return &Helper{Role: r, Config: c, Cache: cache, User: "alice", Egress: []string{"203.0.113.10/32"}, Now: time.Now,
		Tunnel: func(context.Context) (Tunnel, error) { return Tunnel{}, errors.New("the tunnel is down") }}
}

func TestNothingIsAskedWithoutTheTunnel(t *testing.T) {
	h := helper(t, files(t, roles, baseKeys))
	if _, err := h.Credentials(t.Context()); err == nil || err.Error() != "the tunnel is down" {
		t.Errorf("%v", err)
	}
	for _, proxy := range []string{"", "https://x", "127.0.0.1:1", "socks5://127.0.0.1:1"} {
		if _, err := h.ask(t.Context(), proxy, Credentials{}, nil); err == nil || !strings.Contains(err.Error(), "the tunnel has no proxy") {
			t.Errorf("proxy %q: %v", proxy, err)
		}
	}
	for _, egress := range [][]string{nil, {"10.0.0.1/32"}, {"0.0.0.0/0"}, {`1.1.1.1/32"`}} {
		h.Egress = egress
		if _, err := h.Credentials(t.Context()); err == nil || !strings.Contains(err.Error(), "the session's pin") {
			t.Errorf("egress %v: %v", egress, err)
		}
	}
	h.Egress, h.User = []string{"203.0.113.10/32"}, "a"
	if _, err := h.Credentials(t.Context()); err == nil || !strings.Contains(err.Error(), "role_session_name") {
		t.Errorf("a name that AWS does not take: %v", err)
	}
}

func TestKeptSessionsAreForTheSameRequestKeyAndTime(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "aws")
	c, err := NewCache(dir, []byte(strings.Repeat("k", 64)))
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	s := Credentials{"ASIA", "secret", "token", now.Add(time.Hour).UTC()}
	if err := c.put("role-a", []byte("request"), s); err != nil {
		t.Fatal(err)
	}
	if got, ok := c.get("role-a", []byte("request"), now); !ok || !reflect.DeepEqual(got.Expiration, s.Expiration) || got.SecretAccessKey != "secret" {
		t.Errorf("%v %t", got, ok)
	}
	other, err := NewCache(dir, []byte(strings.Repeat("o", 64)))
	if err != nil {
		t.Fatal(err)
	}
	for name, found := range map[string]func() (Credentials, bool){
		"another request":         func() (Credentials, bool) { return c.get("role-a", []byte("other"), now) },
		"another key":             func() (Credentials, bool) { return other.get("role-a", []byte("request"), now) },
		"four minutes to its end": func() (Credentials, bool) { return c.get("role-a", []byte("request"), now.Add(56*time.Minute)) },
		"another role's file": func() (Credentials, bool) {
			if err := os.Rename(c.file("role-a"), c.file("role-b")); err != nil {
				t.Fatal(err)
			}
			return c.get("role-b", []byte("request"), now)
		},
	} {
		if got, ok := found(); ok {
			t.Errorf("%s: %v", name, got)
		}
		os.Rename(c.file("role-b"), c.file("role-a"))
	}
	text, err := os.ReadFile(c.file("role-a"))
	if err != nil {
		t.Fatal(err)
	}
	for i := range text {
		changed := append([]byte(nil), text...)
		changed[i] ^= 1
		if err := os.WriteFile(c.file("role-a"), changed[:len(changed)-i%2], 0o600); err != nil {
			t.Fatal(err)
		}
		if _, ok := c.get("role-a", []byte("request"), now); ok {
			t.Fatalf("byte %d may be changed", i)
		}
	}
	if _, err := NewCache(dir, nil); err == nil {
		t.Error("a key from nothing")
	}
}

func TestSeveralAtOnceAskOnce(t *testing.T) {
	h := helper(t, files(t, roles, baseKeys))
	asked := 0
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			s, err := h.kept(t.Context(), "role-production", []byte("r"), func(context.Context) (Credentials, error) {
				asked++ // the lock is the test's too
				return Credentials{"ASIA", "secret", "token", time.Now().Add(time.Hour)}, nil
			})
			if err != nil || s.SessionToken != "token" {
				t.Error(s, err)
			}
		})
	}
	all.Wait()
	if asked != 1 {
		t.Errorf("asked %d times", asked)
	}
	if _, err := h.kept(t.Context(), "x", nil, func(context.Context) (Credentials, error) {
		return Credentials{"ASIA", "secret", "token", time.Now().Add(time.Minute)}, nil
	}); err == nil || !strings.Contains(err.Error(), "is this clock right") {
		t.Errorf("a session of a minute: %v", err)
	}
}

func TestWaitingForAnotherProcessEnds(t *testing.T) {
	h := helper(t, files(t, roles, baseKeys))
	unlock, err := h.Cache.lock(t.Context(), "role-production")
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := h.Credentials(ctx); err == nil || !strings.Contains(err.Error(), "another process is still asking") {
		t.Errorf("%v", err)
	}
}

func TestCommandsAreBoundedAndTheirSecretsUnshown(t *testing.T) {
	c := files(t, roles, "")
	t.Setenv("AWS_PROFILE", "production-vpn")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "inherited")
	h := helper(t, c)
	for command, want := range map[string]string{
		`echo '{"Version":1,"AccessKeyId":"AKIA","SecretAccessKey":"s"}'`: "",
		`echo SECRET; exit 3`: "exit status 3",
		`echo SECRET`:         "it printed no credentials",
		`echo '{"Version":2,"AccessKeyId":"AKIA","SecretAccessKey":"SECRET"}'`: "it printed no credentials",
		`yes SECRET`:     "it prints over 65536 bytes",
		`exec sleep 600`: "enough",
		`test -z "$AWS_PROFILE$AWS_SECRET_ACCESS_KEY" && test "$HTTPS_PROXY" = http://p:1 && echo '{"Version":1,"AccessKeyId":"AKIA","SecretAccessKey":"s"}'`: "",
	} {
		if err := c.Set("bastion", Setting{"credential_process", command}); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancelCause(t.Context())
		if want == "enough" {
			time.AfterFunc(200*time.Millisecond, func() { cancel(errors.New(want)) })
		}
		keys, err := h.longLived(ctx, Tunnel{Env: []string{"HTTPS_PROXY=http://p:1"}})
		cancel(nil)
		if want == "" && (err != nil || keys.AccessKeyID != "AKIA") || want != "" && (err == nil || !strings.Contains(err.Error(), want)) || err != nil && strings.Contains(err.Error(), "SECRET") {
			t.Errorf("%s: %v %v", command, keys, err)
		}
	}
}

func TestMFAIsRefusedWhereItCannotBe(t *testing.T) {
	c := files(t, roles, baseKeys+"aws_session_token = t\n")
	h := helper(t, c)
	h.Tunnel = func(context.Context) (Tunnel, error) { return Tunnel{Proxy: "http://127.0.0.1:1"}, nil }
	if _, err := h.Credentials(t.Context()); err == nil || !strings.Contains(err.Error(), "remove mfa_serial") {
		t.Errorf("a session as base: %v", err)
	}
	for _, code := range []string{"", "12345", "1234567", "12345a", "１２３４５６"} {
		if _, err := checkCode(code); err == nil || code != "" && strings.Contains(err.Error(), code) {
			t.Errorf("code %q: %v", code, err)
		}
	}
	if code, err := checkCode(" 123456\n"); code != "123456" || err != nil {
		t.Error(code, err)
	}
}

func TestWhatAWSAnswers(t *testing.T) {
	const granted = `<AssumeRoleResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleResult><Credentials><AccessKeyId>ASIA</AccessKeyId>` +
		`<SecretAccessKey>s</SecretAccessKey><SessionToken>t</SessionToken><Expiration>2026-01-02T03:04:05Z</Expiration></Credentials></AssumeRoleResult></AssumeRoleResponse>`
	want := Credentials{"ASIA", "s", "t", time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)}
	for _, text := range []string{granted, strings.ReplaceAll(granted, "AssumeRole", "GetSessionToken")} {
		if s, err := parseReply("x", 200, []byte(text)); s != want || err != nil {
			t.Errorf("%#v, %v", s, err)
		}
	}
	const denied = `<ErrorResponse><Error><Type>Sender</Type><Code>%s</Code><Message>%s</Message></Error></ErrorResponse>`
	for name, c := range map[string]struct {
		status int
		text   string
		want   string
	}{
		"no session":     {200, "<AssumeRoleResponse/>", "no session in it"},
		"no XML":         {200, "{}", "no session in it"},
		"no token":       {200, strings.Replace(granted, "<SessionToken>t</SessionToken>", "", 1), "no session in it"},
		"a guard":        {403, fmt.Sprintf(denied, "AccessDenied", "... with an explicit deny in an identity-based policy"), "a guard that does not list this egress"},
		"a wrong code":   {403, fmt.Sprintf(denied, "AccessDenied", "MultiFactorAuthentication failed with invalid MFA one time pass code."), "next code"},
		"no trust":       {403, fmt.Sprintf(denied, "AccessDenied", "not authorized"), "--no-source-identity"},
		"an ended base":  {403, fmt.Sprintf(denied, "ExpiredToken", ""), "try again"},
		"a wrong clock":  {403, fmt.Sprintf(denied, "SignatureDoesNotMatch", "Signature expired"), "wrong clock"},
		"no words":       {502, "<html>", `"Bad Gateway"`},
		"as S3 says it":  {403, "<Error><Code>AccessDenied</Code><Message>m</Message></Error>", `"AccessDenied" "m"`},
		"escapes inside": {403, fmt.Sprintf(denied, "A", "&#x9b;31m\x7f"), `\u009b31m`},
	} {
		s, err := parseReply("x", c.status, []byte(c.text))
		if s != (Credentials{}) || err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if isStale(errors.New("ExpiredToken")) || !isStale(Denial{Code: "ExpiredToken"}) || !passing(Denial{Status: 503}) || passing(Denial{Status: 403, Code: "AccessDenied"}) {
		t.Error("what another attempt may mend")
	}
}

func FuzzReply(f *testing.F) {
	f.Add(200, []byte("<a><AssumeRoleResult><Credentials><AccessKeyId>a</AccessKeyId></Credentials></AssumeRoleResult></a>"))
	f.Add(403, []byte("<ErrorResponse><Error><Code>\x1b</Code></Error></ErrorResponse>"))
	f.Fuzz(func(t *testing.T, status int, text []byte) {
		s, err := parseReply("x", status, text)
		if (err == nil) != (s.SecretAccessKey != "") {
			t.Fatalf("%v %v", s, err)
		}
		if err != nil && strings.ContainsFunc(err.Error(), func(r rune) bool { return r < ' ' || r == 0x7f }) {
			t.Fatalf("%q", err)
		}
	})
}

func TestSecretsHaveNoText(t *testing.T) {
	c := Credentials{"ASIA", "SECRET", "TOKEN", time.Now()}
	for _, format := range []string{"%v", "%+v", "%#v", "%s"} {
		if s := fmt.Sprintf(format, c); strings.Contains(s, "SECRET") || strings.Contains(s, "TOKEN") {
			t.Errorf("%s: %s", format, s)
		}
	}
	text, err := c.Process()
	var p map[string]any
	if err != nil || json.Unmarshal(text, &p) != nil || p["Version"] != 1.0 || p["AccessKeyId"] != "ASIA" || p["SecretAccessKey"] != "SECRET" || p["SessionToken"] != "TOKEN" || p["Expiration"] == nil || len(p) != 5 {
		t.Errorf("%s %v", text, err)
	}
}

func TestTroubles(t *testing.T) {
	for name, c := range map[string]struct {
		config, keys string
		environ      []string
		want         []string
	}{
		"nothing of AWS":        {"", "", nil, nil},
		"all well":              {roles, baseKeys, []string{"AWS_PROFILE=production-vpn", "AWS_REGION=eu-west-1"}, nil},
		"keys in the shell":     {roles, baseKeys, []string{"AWS_ACCESS_KEY_ID=x", "AWS_SECRET_ACCESS_KEY=y"}, []string{CodeInherited}},
		"no such profile":       {roles, baseKeys, []string{"AWS_PROFILE=x", "AWS_REGION=eu-west-1"}, []string{CodeNoProfile}},
		"a role without a pin":  {roles, baseKeys, []string{"AWS_PROFILE=production", "AWS_REGION=eu-west-1"}, []string{CodeUnpinned}},
		"no region":             {roles, baseKeys, []string{"AWS_PROFILE=production-vpn"}, []string{CodeNoRegion}},
		"passed over":           {roles, baseKeys + "[production-vpn]\n", nil, []string{CodeShadowed}},
		"a role without a base": {roles, "", nil, []string{CodeUnavailable}},
		"no configuration":      {"x", "", nil, []string{CodeConfig}},
	} {
		dir := t.TempDir()
		config, keys := filepath.Join(dir, "config"), filepath.Join(dir, "keys")
		if err := errors.Join(os.WriteFile(config, []byte(c.config), 0o600), os.WriteFile(keys, []byte(c.keys), 0o600)); err != nil {
			t.Fatal(err)
		}
		var codes []string
		for _, trouble := range Check(append(c.environ, "AWS_CONFIG_FILE="+config, "AWS_SHARED_CREDENTIALS_FILE="+keys)) {
			codes = append(codes, trouble.Code)
			if trouble.Text == "" {
				t.Errorf("%s: %+v", name, trouble)
			}
		}
		if !reflect.DeepEqual(codes, c.want) {
			t.Errorf("%s: %v", name, codes)
		}
	}
}
