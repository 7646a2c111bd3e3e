#!/bin/busybox sh
# The machine's first process: mounts what a Debian has, runs the payload, says on the second serial port what became of
# it, and turns the power off.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
mount() { busybox mount "$@"; }
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
busybox stty -F /dev/ttyS1 raw
exec >/dev/ttyS1 2>&1 </dev/null
# The packages are not configured, so nobody made these.
echo root:x:0:0:root:/root:/bin/bash >/etc/passwd
echo root:x:0: >/etc/group
: >/etc/hosts; : >/etc/resolv.conf; : >/etc/nsswitch.conf
modprobe tun
ip link set lo up
echo "test-vm kernel $(busybox uname -r)"
echo "test-vm nft $(nft --version)"

cd /payload
./firewall.test -test.v -test.timeout 20m -test.run "$(busybox cat run)"
echo "test-vm firewall $?"

echo "=== RUN   perimeterd check"
./perimeterd init --dir /tmp/perimeterd --endpoint 198.18.1.1 >/tmp/init.out 2>&1 || busybox cat /tmp/init.out
begun=$(busybox date +%s)
if ./perimeterd check --config /tmp/perimeterd/perimeterd.toml; then result=PASS; else result=FAIL; fi
echo "--- $result: perimeterd check ($(($(busybox date +%s) - begun)).00s)"
echo "test-vm end"
busybox poweroff -f
