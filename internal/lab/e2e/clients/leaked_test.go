package clients

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"perimeterd/internal/lab"
)

// awsNames are those of a real AWS, whose part another program plays.
var awsNames = []string{"s3.us-east-1.amazonaws.com", "*.s3.us-east-1.amazonaws.com", "sts.us-east-1.amazonaws.com", "iam.amazonaws.com"}

// key is one of AWS's, long-lived or of a session.
type key struct{ AccessKeyID, SecretAccessKey, SessionToken string }

// newCloud is a stage whose cloud a client reaches directly too, as any thief does.
func newCloud(t *testing.T) *stage {
	t.Helper()
	return newStageWith(t, lab.Options{RouteViaBastion: true}, lab.CloudOptions{Names: awsNames, Bare: true})
}

// aws is the AWS command line with a key, as whoever has the key runs it: at a host, with nothing between.
func (s *stage) aws(at *lab.Namespace, k key, args ...string) *lab.Cmd {
	s.t.Helper()
	c := at.Command(s.ctx, "/usr/bin/aws", append([]string{"--region", "us-east-1", "--output", "json"}, args...)...)
	c.Env = []string{"PATH=/usr/bin:/bin", "HOME=" + s.t.TempDir(), "AWS_CA_BUNDLE=" + s.cloud.CAFile, "AWS_EC2_METADATA_DISABLED=true", "AWS_PAGER=", "AWS_MAX_ATTEMPTS=1",
		"AWS_ACCESS_KEY_ID=" + k.AccessKeyID, "AWS_SECRET_ACCESS_KEY=" + k.SecretAccessKey, "AWS_SESSION_TOKEN=" + k.SessionToken}
	return c
}

// throughTunnel is the same in the environment that `vpn env` printed.
func (s *stage) throughTunnel(env string, k key, args ...string) *lab.Cmd {
	s.t.Helper()
	c := s.aws(s.Client, k, args...)
	for line := range strings.Lines(env) {
		c.Env = append(c.Env, strings.ReplaceAll(strings.TrimPrefix(strings.TrimSpace(line), "export "), "'", ""))
	}
	return c
}

// denied is for what AWS's own answer must refuse. Ceph's 403 has no words: the CLI calls it Unknown, and trips over that of a list.
func (s *stage) denied(what string, c *lab.Cmd) {
	s.t.Helper()
	out, err := c.CombinedOutput()
	if err == nil || !bytes.Contains(out, []byte("AccessDenied")) && !bytes.Contains(out, []byte("(Unknown)")) && !bytes.Contains(out, []byte("NoneType")) {
		s.t.Errorf("%s was not denied: %v\n%s", what, err, out)
	}
}

// start runs a server in the cloud until the lab closes, and shows what it said if the test fails.
func (s *stage) start(name string, args ...string) {
	s.t.Helper()
	c := s.Cloud.Command(s.ctx, name, args...)
	said := &bytes.Buffer{}
	c.Stdout, c.Stderr = said, said
	if err := c.Start(); err != nil {
		s.t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- c.Wait() }()
	s.t.Cleanup(func() {
		c.Process.Kill()
		<-ended
		if s.t.Failed() {
			s.t.Logf("%s said:\n%.20000s", name, said)
		}
	})
}

// await asks again until the command succeeds, as a server comes up.
func (s *stage) await(c func() *lab.Cmd) string {
	s.t.Helper()
	late := time.After(time.Minute)
	for {
		cmd := c()
		out, err := cmd.CombinedOutput()
		if err == nil {
			return string(out)
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-late:
			s.t.Fatalf("%s: %v\n%s", strings.Join(cmd.Args, " "), err, out)
		}
	}
}

func policyFile(t *testing.T, policy string) string {
	t.Helper()
	if !json.Valid([]byte(policy)) {
		t.Fatalf("no JSON: %s", policy)
	}
	file := filepath.Join(t.TempDir(), "policy.json")
	if err := os.WriteFile(file, []byte(policy), 0o644); err != nil {
		t.Fatal(err)
	}
	return "file://" + file
}

var root = key{AccessKeyID: "AKIAROOTROOTROOTROOT", SecretAccessKey: "rootsecretrootsecretrootsecretrootsecret"}

const everythingInS3 = `{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":"s3:*","Resource":"*"}]}`

// versitygw plays S3 and IAM under their own names, each on an address of its own.
func (s *stage) versitygw() {
	s.t.Helper()
	bin, err := lab.Bin("versitygw")
	if err != nil {
		s.t.Fatalf("%v: `make bin/versitygw` builds it", err)
	}
	iam := netip.MustParseAddr("198.19.1.3")
	if err := s.Cloud.AddAddress(s.ctx, "eth0", netip.PrefixFrom(iam, 24)); err != nil {
		s.t.Fatal(err)
	}
	s.cloud.DNS.Set("iam.amazonaws.com", iam)
	s.cloud.DNS.Set("sts.us-east-1.amazonaws.com", iam)
	dir := s.t.TempDir()
	for _, d := range []string{"iam", "s3"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o700); err != nil {
			s.t.Fatal(err)
		}
	}
	private := filepath.Join(s.Dir, "iam.sock") // t.TempDir is too long for a socket's name
	common := []string{"-a", root.AccessKeyID, "-s", root.SecretAccessKey, "--cert", s.cloud.CertFile, "--key", s.cloud.KeyFile}
	s.start(bin, append(common, "-p", iam.String()+":443", "iam", "--dir", filepath.Join(dir, "iam"), "--private-ports", private)...)
	s.await(func() *lab.Cmd { return s.aws(s.Cloud, root, "iam", "list-users") })
	s.start(bin, append(common, "-p", s.Cloud.Addr.String()+":443", "--virtual-domain", "s3.us-east-1.amazonaws.com", "--iam-standalone-endpoint", private, "posix", filepath.Join(dir, "s3"))...)
	s.await(func() *lab.Cmd { return s.aws(s.Cloud, root, "s3", "mb", "s3://ledger") })
}

// user makes one with a long-lived key and policies.
func (s *stage) user(name string, policies ...string) (k key) {
	s.t.Helper()
	s.run(s.aws(s.Cloud, root, "iam", "create-user", "--user-name", name))
	for i, p := range policies {
		s.run(s.aws(s.Cloud, root, "iam", "put-user-policy", "--user-name", name, "--policy-name", fmt.Sprint("p", i), "--policy-document", policyFile(s.t, p)))
	}
	var made struct {
		AccessKey struct{ AccessKeyID, SecretAccessKey string }
	}
	if err := json.Unmarshal([]byte(s.run(s.aws(s.Cloud, root, "iam", "create-access-key", "--user-name", name))), &made); err != nil {
		s.t.Fatal(err)
	}
	return key{AccessKeyID: made.AccessKey.AccessKeyID, SecretAccessKey: made.AccessKey.SecretAccessKey}
}

// printed is a policy as the operator's command prints it.
func (s *stage) printed(kind string) string {
	s.t.Helper()
	bin, err := lab.Bin("perimeterd")
	if err != nil {
		s.t.Fatal(err)
	}
	out, err := s.Bastion.Command(s.ctx, bin, "aws", "policy", kind, "--egress", netip.PrefixFrom(s.Egress, 32).String()).Output()
	if err != nil {
		s.t.Fatal(err)
	}
	return string(out)
}

// The promise of it all, with AWS's own command line, and IAM and S3 as versitygw has them.
func TestALeakedKeyIsWorthNothingElsewhere(t *testing.T) {
	s := newCloud(t)
	s.versitygw()
	guard := s.printed("user-guard")
	guarded, bare := s.user("alice", everythingInS3, guard), s.user("bob", everythingInS3)
	list, env := []string{"s3", "ls", "s3://ledger"}, s.run(s.alice.VPN(s.ctx, "env"))

	s.run(s.throughTunnel(env, guarded, list...))
	s.run(s.throughTunnel(env, guarded, "s3api", "put-object", "--bucket", "ledger", "--key", "a"))
	s.denied("a leaked key, used directly", s.aws(s.Client, guarded, list...))
	s.denied("a leaked key, used on the bastion, at another address than the egress", s.aws(s.Bastion, guarded, list...))
	s.denied("a leaked key, used to write", s.aws(s.Client, guarded, "s3api", "put-object", "--bucket", "ledger", "--key", "b"))
	s.run(s.aws(s.Client, bare, list...)) // it is the guard that denies: a key without one works there

	// Programs that are told to pass the proxy by for AWS show themselves to AWS.
	astray := s.throughTunnel(env, guarded, list...)
	astray.Env = append(astray.Env, "NO_PROXY=.amazonaws.com", "no_proxy=.amazonaws.com")
	s.denied("a NO_PROXY with AWS in it", astray)

	for _, header := range []string{"X-Forwarded-For", "X-Real-IP", "Forwarded", "True-Client-IP"} {
		c := s.Client.Command(s.ctx, "curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "--cacert", s.cloud.CAFile, "--aws-sigv4", "aws:amz:us-east-1:s3",
			"--user", guarded.AccessKeyID+":"+guarded.SecretAccessKey, "-H", "x-amz-content-sha256: e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
			"-H", header+": "+s.Egress.String(), "https://s3.us-east-1.amazonaws.com/ledger?list-type=2")
		if out := s.run(c); out != "403" {
			t.Errorf("an address in %s: %s", header, out)
		}
	}
}
