#!/bin/sh
# bring_programs.sh DIR PROGRAM...: what is not on PATH is unpacked, not installed, into DIR from Debian's package of that
# name, with the packages that it needs and that are missing here; but for what only its web pages or a desktop would need.
set -eu
mkdir -p "$1"
cd "$1"
shift

packages() {
    apt-get -qq --simulate install --no-install-recommends "$1" 2> /dev/null |
        sed -n 's/^Inst \([^ ]*\).*/\1/p' | grep -Ev '^(libjs-|fonts-glyphicons|xdg-)'
}

for program in "$@"; do
    command -v "$program" > /dev/null && continue
    { packages "$program" | xargs -r apt-get -qq download 2> /dev/null && ls "$program"_*.deb > /dev/null 2>&1; } || {
        apt-get -qq update
        packages "$program" | xargs -r apt-get -qq download 2> /dev/null
        ls "$program"_*.deb > /dev/null
    } || {
        echo "$program is not on PATH and cannot be had from Debian's packages; install it" >&2
        exit 1
    }
    for package in *.deb; do
        dpkg-deb --extract "$package" .
        rm "$package"
    done
done
