package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
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
