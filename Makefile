# make demo   installs what is missing, builds, and shows the whole path in network namespaces
# make test   installs what is missing, builds, lints, runs every test
# Both need root (namespaces, nftables) and leave nothing behind. So do
# make bench-door   the door beside knockd, fwknop and an ipset script, six minutes; writes docs/benchmarks.md, bench/door.json
# make bench-proxy  the proxy beside goproxy, Squid and tinyproxy, thirteen minutes; writes docs/benchmarks.md, bench/proxy.json, fails if a promise is broken
# make bench-proxy-idle  10,000 silent tunnels at each of them for ten minutes; writes docs/benchmarks.md, bench/proxy-idle.json, fails if a promise is broken
# make test-attacks the built daemon attacked with scans, odd tokens and floods, three minutes; fails if one gains anything
# make bench-sessions  5,000 sessions, revocations and crashes among many, three minutes; writes docs/benchmarks.md, fails if a promise is broken
# make bench-client   both kinds of tunnel over a long link, beside bare TCP, four minutes; writes docs/benchmarks.md, bench/client.json
# make bench-limits   what the machine can do without us, half a minute; writes docs/benchmarks.md
# make test-iam     our evaluator of IAM policies against an independent one from npm, 10,000 cases, half a minute
# make bench-knock  3,000 knocks over a link with two receive queues, a minute; fails if one of our client's was lost
# make bench-connect  time to a tunnel and to the first byte, cold and warm, and what they carry, beside ipset + OpenVPN + Squid and wireguard-go; with losses; a quarter of an hour; writes docs/benchmarks.md, bench/connect.json
# make bench        all that is measured beside others, one after the other, and a table of it; half an hour; writes docs/benchmarks.md, bench/results.json, docs/plots
# make bench-go     Go's micro-benchmarks
# make deb          the Debian packages, built twice and compared, under lintian; in bin/deb
# make test-container  the packages installed, upgraded, killed and purged in a Debian with systemd
# make test-vm      the door's tests on the kernels of Debian 12 and 13, and test-vm-packages, which does the same to the packages as test-container,
#                   with these kernels and their WireGuard, and looks at a boot from the first packet on
# make soak         100,000 knocks at the running daemon, ten minutes; fails if anything grows

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
GO ?= go

DEMO_TOOLS := nft:nftables ip:iproute2 curl:curl nmap:nmap
TEST_TOOLS := $(DEMO_TOOLS) gcc:gcc knock:knockd wg:wireguard-tools wireguard-go:wireguard-go setcap:libcap2-bin make-cadir:easy-rsa openssl:openssl strace:strace \
	/lib/systemd/systemd-journal-remote:systemd-journal-remote jc:jc jq:jq systemd-analyze:systemd
FULL_TOOLS := $(TEST_TOOLS) chromium:chromium certutil:libnss3-tools /usr/bin/aws:awscli node:nodejs npm:npm calamaris:calamaris radosgw:radosgw ceph-mon:ceph-mon ceph-osd:ceph-osd
PEER_TOOLS := nft:nftables nmap:nmap ip:iproute2 iptables:iptables ipset:ipset knockd:knockd fwknopd:fwknop-server fwknop:fwknop-client
DEB_TOOLS := dh:debhelper dpkg-buildpackage:dpkg-dev lintian:lintian systemd-analyze:systemd
CONTAINER_TOOLS := nft:nftables ip:iproute2 curl:curl dh:debhelper dpkg-buildpackage:dpkg-dev systemd-nspawn:systemd-container mmdebstrap:mmdebstrap
PROXY_TOOLS := $(DEMO_TOOLS) squid:squid tinyproxy:tinyproxy
CONNECT_TOOLS := nft:nftables ip:iproute2 curl:curl wg:wireguard-tools iptables:iptables ipset:ipset knock:knockd openvpn:openvpn squid:squid make-cadir:easy-rsa openssl:openssl
SOAK_TOOLS := nft:nftables ip:iproute2
IAM_TOOLS := node:nodejs npm:npm
VM_TOOLS := qemu-system-x86_64:qemu-system-x86 mmdebstrap:mmdebstrap depmod:kmod nft:nftables ip:iproute2 curl:curl dh:debhelper dpkg-buildpackage:dpkg-dev mke2fs:e2fsprogs systemctl:systemd
CLIENT := ./cmd/knock ./cmd/vpn ./vpn ./vpn/client ./knock
UNIT := $(GO) list ./... | grep -v -e internal/lab/e2e -e internal/lab/container

.PHONY: build cross demo test lint unit e2e test-attacks test-full test-iam test-vm fuzz bench bench-go bench-door bench-proxy bench-proxy-idle bench-sessions bench-client bench-limits bench-knock bench-connect bench-loss bench-summary soak deb deb-versions test-container test-vm-packages clean demo-tools test-tools full-tools iam-tools vm-tools peer-tools proxy-tools soak-tools connect-tools deb-tools container-tools

build:
	CGO_ENABLED=0 $(GO) build -trimpath -o bin/ ./cmd/...

demo: demo-tools build
	$(GO) build -o bin/lab-demo ./internal/lab/demo
	bin/lab-demo

test: test-tools build lint unit e2e

lint:
	@out=$$(gofmt -l $$(git ls-files '*.go')); [ -z "$$out" ] || { echo "gofmt would change:"; echo "$$out"; exit 1; }
	$(GO) vet ./...
	$(GO) tool -modfile=tools/go.mod staticcheck ./...
	for on in darwin/arm64 windows/amd64; do GOOS=$${on%/*} GOARCH=$${on#*/} CGO_ENABLED=0 $(GO) vet $(CLIENT); done

# The client for every system and processor: minutes on a machine that has compiled none of it, so not part of `make test`.
cross:
	for os in linux darwin windows; do for arch in amd64 arm64; do \
		GOOS=$$os GOARCH=$$arch CGO_ENABLED=0 $(GO) build -o /dev/null ./cmd/knock ./cmd/vpn; done; done

unit:
	$(GO) test -race $$($(UNIT))

# Those tests that are marked parallel wait more than they work, so that more of them at once than processors are right.
e2e: build
	$(GO) test -count=1 -timeout 20m -parallel 8 ./internal/lab/e2e
	$(GO) run ./internal/lab/attacks -quick

# At most eight minutes. A quick part of it is in `make e2e`.
test-attacks: test-tools build
	$(GO) run ./internal/lab/attacks

# The programs that people use, against the built binaries: Chromium, the AWS CLI, curl, Go, Python, Node, npm; AWS's side of them
# is versitygw, built once (two minutes), and Ceph's gateway.
test-full: full-tools build cross bin/versitygw
	$(GO) test -count=1 -timeout 20m ./internal/lab/e2e/clients

bin/versitygw:
	GOBIN=$(CURDIR)/bin CGO_ENABLED=0 $(GO) install github.com/versity/versitygw/cmd/versitygw@v1.8.0

# The firewall's tests, and the path with the kernel's WireGuard, on the kernels of Debian 12 and 13, in emulated machines: 15 minutes, not part of `make test`.
test-vm: vm-tools build
	CGO_ENABLED=0 $(GO) test -c -o bin/firewall.test ./firewall
	CGO_ENABLED=0 $(GO) test -c -o bin/e2e.test ./internal/lab/e2e
	$(GO) run ./internal/lab/vm
	$(MAKE) test-vm-packages

# The packages on a Debian that boots from a disk, which is kept in .cache/vm-image: remove that for a newer one. Seven minutes each, emulated.
VM_TRANSFERS ?= 100
test-vm-packages: vm-tools build deb-versions
	for release in $(RELEASES); do RELEASE=$$release TRANSFERS=$(VM_TRANSFERS) $(GO) test -count=1 -v -timeout 45m -run '^TestPackagesInAVM$$' ./internal/lab/container; done

# Each fuzz target for FUZZTIME.
FUZZTIME ?= 30s
fuzz:
	for pkg in $$($(GO) list ./...); do \
		for target in $$($(GO) test -list '^Fuzz' $$pkg | grep '^Fuzz' || true); do \
			echo "$$pkg $$target"; $(GO) test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 100x $$pkg; \
		done; \
	done

# The evaluator of `perimeterd aws test` against @cloud-copilot/iam-simulate, which npm's registry has.
test-iam: iam-tools
	$(GO) run ./internal/lab/iamsim -cases 10000

bench-go:
	$(GO) test -run '^$$' -bench . -benchmem $$($(UNIT))

# One at a time, since each wants the machine; one that fails does not keep the others from being measured.
BENCHES := bench-limits bench-door bench-connect bench-proxy bench-client bench-sessions
bench:
	@failed=(); for b in $(BENCHES); do $(MAKE) "$$b" || failed+=("$$b"); done; \
	$(MAKE) bench-summary; \
	[ $${#failed[@]} = 0 ] || { echo "failed: $${failed[*]}" >&2; exit 1; }

bench-summary:
	$(GO) run ./internal/lab/summary

# The door side by side with what it replaces. It writes a table; no build depends on it.
bench-door: peer-tools build
	$(GO) build -o bin/lab-peers ./internal/lab/peers
	bin/lab-peers

# The proxy side by side with what it replaces. It wants an idle machine.
bench-proxy: proxy-tools build
	$(GO) build -o bin/lab-proxies ./internal/lab/proxies
	bin/lab-proxies

# Its last part, held for longer.
bench-proxy-idle: proxy-tools build
	$(GO) build -o bin/lab-proxies ./internal/lab/proxies
	bin/lab-proxies -only idle -hold 10m -results bench/proxy-idle.json

# What sessions cost, how soon a revoked one is gone, what a killed daemon does to the others. It wants an idle machine.
bench-sessions: demo-tools build
	$(GO) build -o bin/lab-sessions ./internal/lab/sessions
	bin/lab-sessions

# What the client's two kinds of tunnel carry over a long link, beside bare TCP.
bench-client: demo-tools build
	$(GO) build -o bin/lab-throughput ./internal/lab/throughput
	bin/lab-throughput

# What the machine can do without us: cables, ciphers, handshakes.
bench-limits: build
	$(GO) build -o bin/lab-limits ./internal/lab/limits
	bin/lab-limits

# What overtakes a token where two CPUs receive.
bench-knock: soak-tools build
	$(GO) build -o bin/lab-overtake ./internal/lab/overtake
	bin/lab-overtake

# From `vpn up` to a tunnel and a page, and what they carry. It wants an idle machine.
bench-connect: connect-tools build
	CGO_ENABLED=0 $(GO) build -trimpath -o bin/wireguard-go golang.zx2c4.com/wireguard
	$(GO) build -o bin/lab-connect ./internal/lab/connect
	bin/lab-connect

# Each packet of `vpn up` lost once.
bench-loss: connect-tools build
	$(GO) build -o bin/lab-connect ./internal/lab/connect
	bin/lab-connect -only loss

soak: soak-tools build
	$(GO) build -o bin/lab-soak ./internal/lab/soak
	bin/lab-soak

# Two builds that share nothing, one hash. Lintian may find nothing.
deb: deb-tools
	packaging/build.sh bin/deb
	cache=$$(mktemp -d); trap "rm -rf $$cache" EXIT; GOCACHE=$$cache ARCHES=$$(dpkg --print-architecture) packaging/build.sh bin/deb/again
	for f in bin/deb/again/*.deb; do cmp "$$f" "bin/deb/$${f##*/}"; done
	rm -r bin/deb/again
	for f in bin/deb/*.changes; do lintian --allow-root --display-info --pedantic --fail-on error,warning,info,pedantic "$$f"; done
	sha256sum bin/deb/*.deb
	cd deploy/systemd && $(GO) test -count=1 -v -run TestUnitsAreShutIn . | grep exposure

# The older and the newer version of an upgrade, not compressed.
deb-versions:
	for version in 0.1.0 0.1.0+upgrade; do DPKG_DEB_COMPRESSOR_TYPE=none ARCHES=$$(dpkg --print-architecture) packaging/build.sh bin/deb/test $$version; done

# They are installed on a Debian that is kept in .cache/container.
RELEASES ?= bookworm trixie
TRANSFERS ?= 1000
test-container: container-tools build deb-versions
	for release in $(RELEASES); do RELEASE=$$release TRANSFERS=$(TRANSFERS) $(GO) test -count=1 -v -timeout 20m -run '^TestPackages$$' ./internal/lab/container; done

clean:
	rm -rf bin

# Debian packages of the tools that are missing: command:package.
define install
	@missing=(); for t in $(1); do command -v "$${t%%:*}" >/dev/null || missing+=("$${t##*:}"); done; \
	if [ $${#missing[@]} -gt 0 ]; then \
		[ "$$(id -u)" = 0 ] || { echo "missing: $${missing[*]}; run as root, or: sudo apt-get install $${missing[*]}" >&2; exit 1; }; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$${missing[@]}" >/dev/null; \
	fi
endef

demo-tools:
	$(call install,$(DEMO_TOOLS))

test-tools:
	$(call install,$(TEST_TOOLS))

full-tools:
	$(call install,$(FULL_TOOLS))

iam-tools:
	$(call install,$(IAM_TOOLS))

vm-tools:
	$(call install,$(VM_TOOLS))

peer-tools:
	$(call install,$(PEER_TOOLS))

proxy-tools:
	$(call install,$(PROXY_TOOLS))

connect-tools:
	$(call install,$(CONNECT_TOOLS))

soak-tools:
	$(call install,$(SOAK_TOOLS))

deb-tools:
	$(call install,$(DEB_TOOLS))

container-tools:
	$(call install,$(CONTAINER_TOOLS))
