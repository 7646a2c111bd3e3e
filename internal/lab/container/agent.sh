#!/bin/bash
# Serves the lab at the other end of a virtio port: puts files down, and runs scripts. agent.go has the protocol.
port=/dev/virtio-ports/lab
until [ -c $port ]; do sleep 0.1; done
exec 3<>$port
mkdir -p /run/lab
echo "hello $(cat /proc/sys/kernel/random/boot_id)" >&3
while read -r -u 3 verb size path; do
	case $verb in
	put)
		head -c "$size" <&3 >"$path"
		echo "$? 0" >&3
		;;
	run)
		head -c "$size" <&3 >/run/lab/script
		bash /run/lab/script >/run/lab/out 2>&1 </dev/null
		echo "$? $(stat -c %s /run/lab/out)" >&3
		cat /run/lab/out >&3
		;;
	esac
done
