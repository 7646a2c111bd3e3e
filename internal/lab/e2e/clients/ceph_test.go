package clients

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"perimeterd/internal/lab"
)

// cephConfig is a Ceph of one monitor and one store in memory, for one gateway.
const cephConfig = `[global]
fsid = %[1]s
mon host = v2:127.0.0.1:3300
auth cluster required = none
auth service required = none
auth client required = none
ms mon client mode = crc
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd objectstore = memstore
memstore device bytes = 268435456
mon allow pool size one = true
mon max pg per osd = 1000
mon data = %[2]s/mon
osd data = %[2]s/osd
keyring = %[2]s/keyring
admin socket =
run dir = %[2]s
log file =
pid file =
rgw s3 auth use sts = true
rgw sts key = abcdefghijklmnop
rgw gc max objs = 1
rgw lc max objs = 1
rgw md log max shards = 1
rgw data log num shards = 1
rgw reshard num logs = 1
`

// ceph plays S3, IAM and STS under their names, with Ceph's gateway: real sessions, with real policies of their own. It gives
// alice a key that may begin sessions, from the egress only, and a role that she may assume.
func (s *stage) ceph() (alice key, role string) {
	s.t.Helper()
	dir := s.t.TempDir()
	for _, d := range []string{"mon", "osd"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o700); err != nil {
			s.t.Fatal(err)
		}
	}
	conf, keyring, monmap := filepath.Join(dir, "ceph.conf"), filepath.Join(dir, "keyring"), filepath.Join(dir, "monmap")
	cluster, store := s.uuid(), s.uuid()
	if err := os.WriteFile(conf, fmt.Appendf(nil, cephConfig, cluster, dir), 0o600); err != nil {
		s.t.Fatal(err)
	}
	run := func(name string, args ...string) { s.run(s.Cloud.Command(s.ctx, name, args...)) }
	run("ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
	run("ceph-authtool", keyring, "--gen-key", "-n", "client.admin", "--cap", "mon", "allow *", "--cap", "osd", "allow *")
	run("monmaptool", "--create", "--fsid", cluster, "--addv", "a", "[v2:127.0.0.1:3300]", monmap)
	run("ceph-mon", "-c", conf, "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)
	s.start("ceph-mon", "-c", conf, "-i", "a", "-f")
	s.await(func() *lab.Cmd {
		return s.Cloud.Command(s.ctx, "ceph", "-c", conf, "--connect-timeout", "5", "osd", "new", store)
	})
	run("ceph-osd", "-c", conf, "-i", "0", "--mkfs", "--osd-uuid", store)
	s.start("ceph-osd", "-c", conf, "-i", "0", "-f")
	s.await(func() *lab.Cmd {
		return s.Cloud.Command(s.ctx, "sh", "-c", `ceph -c "$0" --connect-timeout 5 osd stat | grep -q "1 up"`, conf)
	})
	user := func(name string, k key, caps string) {
		run("radosgw-admin", "-c", conf, "user", "create", "--uid="+name, "--display-name="+name, "--access-key="+k.AccessKeyID, "--secret="+k.SecretAccessKey, "--caps="+caps)
	}
	user("root", root, "roles=*;user-policy=*")
	alice = key{AccessKeyID: "AKIAALICEALICEALICE0", SecretAccessKey: "alicesecretalicesecretalicesecretalicese"}
	user("alice", alice, "")
	s.start("radosgw", "-c", conf, "-n", "client.admin", "-f", "--rgw-frontends",
		"beast ssl_endpoint="+s.Cloud.Addr.String()+":443 ssl_certificate="+s.cloud.CertFile+" ssl_private_key="+s.cloud.KeyFile)
	s.await(func() *lab.Cmd { return s.aws(s.Cloud, root, "s3api", "list-buckets") })

	atEgress := fmt.Sprintf(`"Condition":{"IpAddress":{"aws:SourceIp":"%v/32"}}`, s.Egress)
	s.run(s.aws(s.Cloud, root, "iam", "put-user-policy", "--user-name", "alice", "--policy-name", "sts", "--policy-document",
		policyFile(s.t, `{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":["sts:GetSessionToken","sts:AssumeRole"],"Resource":"*",`+atEgress+`}]}`)))
	s.run(s.aws(s.Cloud, root, "iam", "create-role", "--role-name", "production", "--assume-role-policy-document",
		policyFile(s.t, `{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Principal":{"AWS":["arn:aws:iam:::user/alice"]},"Action":["sts:AssumeRole"],`+atEgress+`}]}`)))
	s.run(s.aws(s.Cloud, root, "iam", "put-role-policy", "--role-name", "production", "--policy-name", "s3", "--policy-document", policyFile(s.t, everythingInS3)))
	return alice, "arn:aws:iam:::role/production"
}

func (s *stage) uuid() string {
	s.t.Helper()
	text, err := os.ReadFile("/proc/sys/kernel/random/uuid")
	if err != nil {
		s.t.Fatal(err)
	}
	return strings.TrimSpace(string(text))
}
