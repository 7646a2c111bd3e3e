package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// Every command of ours in the guide runs as it stands, one after the other, in a directory where nothing else is.
func TestTheAWSGuidesCommandsRun(t *testing.T) {
	text, err := os.ReadFile("../../docs/aws.md")
	if err != nil {
		t.Fatal(err)
	}
	bin, dir := t.TempDir(), t.TempDir()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(self, filepath.Join(bin, "perimeterd")); err != nil {
		t.Fatal(err)
	}
	sh := func(script string) (string, error) {
		cmd := exec.Command("/bin/sh", "-ec", script)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"), "AWS_EC2_METADATA_DISABLED=true")
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	if out, err := sh("perimeterd init --endpoint bastion.example.com --egress 203.0.113.10/32 --dir d"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	ran := 0
	for _, block := range regexp.MustCompile("(?s)```sh\n(.*?)```").FindAllStringSubmatch(string(text), -1) {
		for line := range strings.Lines(block[1]) {
			if !strings.Contains(line, "perimeterd ") && !strings.HasPrefix(line, "echo ") {
				continue
			}
			ran++
			line, negated := strings.CutPrefix(strings.TrimSpace(line), "! ")
			out, err := sh(strings.Replace(line, "perimeterd aws", "perimeterd --config d/perimeterd.toml aws", 1))
			if (err != nil) != negated || strings.Contains(out, "NO BREAK-GLASS") {
				t.Errorf("%s\n%v: %s", line, err, out)
			}
			if negated && !strings.Contains(out, "deny  guard.json, statement 1 (DenyElsewhere): an explicit Deny is final") {
				t.Errorf("%s\n%s", line, out)
			}
		}
	}
	if ran < 15 {
		t.Errorf("%d commands in the guide", ran)
	}
}

// The guide's reader of CloudTrail finds people's calls from elsewhere, and nothing else.
func TestTheAWSGuideFindsCallsFromElsewhere(t *testing.T) {
	text, err := os.ReadFile("../../docs/aws.md")
	if err != nil {
		t.Fatal(err)
	}
	filter := regexp.MustCompile("(?s)cat > elsewhere.jq <<'JQ'\n(.*?)\nJQ\n").FindSubmatch(text)
	read := regexp.MustCompile(`(?m)^zcat .*$`).Find(text)
	if filter == nil || read == nil {
		t.Fatal("the guide has no filter, or no command that uses it")
	}
	const records = `{"Records":[
		{"userIdentity":{"type":"IAMUser","userName":"alice"},"sourceIPAddress":"198.51.100.7","eventSource":"s3.amazonaws.com","eventName":"ListBuckets","userAgent":"aws-cli/2"},
		{"userIdentity":{"type":"IAMUser","userName":"alice"},"sourceIPAddress":"203.0.113.10","eventSource":"s3.amazonaws.com","eventName":"ListBuckets","userAgent":"aws-cli/2"},
		{"userIdentity":{"type":"IAMUser","userName":"alice","invokedBy":"athena.amazonaws.com"},"sourceIPAddress":"athena.amazonaws.com","eventSource":"s3.amazonaws.com","eventName":"GetObject"},
		{"userIdentity":{"type":"AssumedRole","sessionContext":{"sessionIssuer":{"userName":"PowerUser"}}},"sourceIPAddress":"10.0.0.9","vpcEndpointId":"vpce-1","eventSource":"ec2.amazonaws.com","eventName":"RunInstances"},
		{"userIdentity":{"type":"AssumedRole","sessionContext":{"sessionIssuer":{"userName":"AWSReservedSSO_Admin_0123456789abcdef"}}},"sourceIPAddress":"198.51.100.8","eventSource":"iam.amazonaws.com","eventName":"CreateRole"},
		{"userIdentity":{"type":"AssumedRole","sessionContext":{"sessionIssuer":{"userName":"function"}}},"sourceIPAddress":"198.51.100.9","eventSource":"s3.amazonaws.com","eventName":"GetObject"},
		{"userIdentity":{"type":"AWSService","invokedBy":"ec2.amazonaws.com"},"sourceIPAddress":"ec2.amazonaws.com","eventSource":"sts.amazonaws.com","eventName":"AssumeRole"}]}`
	dir := t.TempDir()
	for name, text := range map[string][]byte{"elsewhere.jq": filter[1], "records.json": []byte(records)} {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("/bin/sh", "-ec", "gzip records.json\n"+string(read))
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "LC_ALL=C")
	out, err := cmd.CombinedOutput()
	const want = "      1 AWSReservedSSO_Admin_0123456789abcdef\t198.51.100.8\tiam.amazonaws.com\tCreateRole\t-\t-\n" +
		"      1 PowerUser\t10.0.0.9\tec2.amazonaws.com\tRunInstances\tvpce-1\t-\n" +
		"      1 alice\t198.51.100.7\ts3.amazonaws.com\tListBuckets\t-\taws-cli/2\n"
	lines := strings.SplitAfter(string(out), "\n")
	slices.Sort(lines)
	if err != nil || strings.Join(lines, "") != want {
		t.Errorf("%v\n%s\nwant\n%s", err, out, want)
	}
}
