#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Looks for what the machine itself must have: Go, a C and a C++ compiler, and a Python with venv and its headers.
# As root on a machine with apt it installs all but Go; otherwise it says what to install and fails.
set -eu
PYTHON=${PYTHON:-python3}

fail() {
	echo "missing: $1" >&2
	exit 1
}

# install NAME PACKAGE...: installs the packages for NAME, or fails with a line that names them.
install() {
	name=$1
	shift
	if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
		fail "$name (on Debian: apt-get install $*)"
	fi
	echo "installing $* for $name"
	{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"; } >/dev/null ||
		fail "$name: apt-get install $* failed"
}

# Debian's Go is often older than go.mod asks for, so Go is named and not installed.
wanted=$(sed -n 's/^go //p' go.mod)
command -v go >/dev/null || fail "Go $wanted or newer: install it and put its go command on PATH"
go version >/dev/null 2>&1 || fail "Go $wanted or newer: $(go version 2>&1 | tail -n 1)"
found=$(go env GOVERSION | sed 's/^go//')
case $found in
[0-9]*) [ "$(printf '%s\n' "$wanted" "$found" | sort -V | head -n 1)" = "$wanted" ] || fail "Go $wanted or newer: go$found is on PATH" ;;
esac

compiler=${CC:-cc}
command -v "${compiler%% *}" >/dev/null || install "a C compiler" gcc libc6-dev binutils
command -v "${CXX:-g++}" >/dev/null || install "a C++ compiler" g++
command -v readelf >/dev/null || install readelf binutils

# apt has the system's own Python only; any other is its user's to complete.
system_python() {
	[ "$PYTHON" = python3 ] && { ! command -v python3 >/dev/null || [ "$(readlink -f "$(command -v python3)")" = "$(readlink -f /usr/bin/python3)" ]; }
}
complete() {
	if system_python; then install "$@"; else fail "$1"; fi
}

command -v "$PYTHON" >/dev/null || complete "the interpreter $PYTHON" python3 python3-venv python3-dev
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 9))' || fail "Python 3.9 or newer: $PYTHON is $("$PYTHON" -V 2>&1)"
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || complete "the venv module of $PYTHON" python3-venv
"$PYTHON" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
	complete "the headers (Python.h) of $PYTHON" python3-dev
