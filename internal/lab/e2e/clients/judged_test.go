package clients

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"perimeterd/internal/lab"
)

// What no server here judges, MFA and onward sessions, is judged by AWS's rules as `perimeterd aws test` knows them, of the policies
// as `perimeterd aws policy` prints them.
func TestWhatTheServersDoNotJudge(t *testing.T) {
	const (
		alice   = "arn:aws:iam::111122223333:user/alice"
		role    = "arn:aws:iam::444455556666:role/production"
		session = "arn:aws:sts::444455556666:assumed-role/production/alice"
	)
	bin, err := lab.Bin("perimeterd")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	file := func(name string, text []byte, err error) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err == nil {
			err = os.WriteFile(path, text, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		return path
	}
	printed := func(args ...string) string {
		t.Helper()
		text, err := exec.Command(bin, append([]string{"aws", "policy", "--egress", "198.19.1.10/32"}, args...)...).Output()
		return file(args[0], text, err)
	}
	everything := file("all", []byte(`{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":"*","Resource":"*"}]}`), nil)
	become := []string{everything, "--trust", printed("role-trust", "--user", alice), "--principal", alice, "--resource", role, "--action"}
	pinned := []string{everything, "--session", printed("session-pin"), "--principal", session, "--action"}
	for name, c := range map[string]struct {
		first   []string
		request string
		allowed bool
	}{
		"a role, with MFA, at the egress":           {become, "sts:AssumeRole --from 198.19.1.10 --mfa", true},
		"with the certificate's name":               {become, "sts:SetSourceIdentity --from 198.19.1.10 --mfa", true},
		"a role without MFA":                        {become, "sts:AssumeRole --from 198.19.1.10", false},
		"a role with MFA, elsewhere":                {become, "sts:AssumeRole --from 198.18.1.2 --mfa", false},
		"a pinned session, at the egress":           {pinned, "s3:ListBucket --from 198.19.1.10", true},
		"stolen":                                    {pinned, "s3:ListBucket --from 198.18.1.2", false},
		"by an AWS service for it":                  {pinned, "kms:Decrypt --from 198.18.1.2 --via-service", true},
		"that becomes another role":                 {pinned, "sts:AssumeRole --from 198.19.1.10", false},
		"that becomes a role with a token":          {pinned, "sts:AssumeRoleWithWebIdentity --from 198.19.1.10", false},
		"that makes a federated session":            {pinned, "sts:GetFederationToken --from 198.19.1.10", false},
		"that makes another session":                {pinned, "sts:GetSessionToken --from 198.19.1.10", false},
		"that gets a token of CodeArtifact's":       {pinned, "sts:GetServiceBearerToken --from 198.19.1.10", true},
		"that names itself, which AWS never denies": {pinned, "sts:GetCallerIdentity --from 198.18.1.2", true},
	} {
		out, err := exec.Command(bin, append(append([]string{"aws", "test"}, c.first...), strings.Fields(c.request)...)...).CombinedOutput()
		exit := 0
		if err != nil {
			exit = err.(*exec.ExitError).ExitCode()
		}
		if want := map[bool]int{true: 0, false: 1}[c.allowed]; exit != want {
			t.Errorf("%s: exit status %d\n%s", name, exit, out)
		}
	}
}
