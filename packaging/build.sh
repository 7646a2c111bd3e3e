#!/usr/bin/env bash
# Builds the Debian packages of this tree into DIR: build.sh DIR [VERSION]. A version other than the changelog's is for tests of an
# upgrade. ARCHES says which, "amd64 arm64" where it is not set. Nothing is left beside the tree.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "$1" && cd "$1" && pwd)
work=$(mktemp -d)
trap 'chmod -R u+w "$work"; rm -rf "$work"' EXIT

# What git knows of, as it is now.
mkdir "$work/perimeterd"
git ls-files -z | while IFS= read -r -d '' f; do [ ! -e "$f" ] || printf '%s\0' "$f"; done |
	tar --null --files-from=- --create --owner=0 --group=0 | tar --extract --directory "$work/perimeterd" --no-same-owner
cd "$work/perimeterd"
mv packaging/debian debian
if [ -n "${2:-}" ]; then
	sed -i "1s/(.*)/($2)/" debian/changelog
fi
find . -exec touch --no-dereference --date="$(dpkg-parsechangelog --show-field Date)" {} + # not when it was checked out

# debhelper gives the build another home.
GOPATH=$(go env GOPATH) GOCACHE=$(go env GOCACHE) GOMODCACHE=$(go env GOMODCACHE)
export GOPATH GOCACHE GOMODCACHE
for arch in ${ARCHES:-amd64 arm64}; do
	# What it takes the Makefile installs, and Go wants no compiler of C, nor a cross compiler.
	dpkg-buildpackage --build=binary --no-sign --no-check-builddeps --host-arch "$arch" >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
done
mv "$work"/*.deb "$work"/*.changes "$work"/*.buildinfo "$out"
