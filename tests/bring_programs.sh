#!/bin/sh
# bring_programs.sh DIR PROGRAM...: what is not on PATH is unpacked, not installed, from Debian's package of that name into DIR.
set -eu
mkdir -p "$1"
cd "$1"
shift
for program in "$@"; do
    command -v "$program" > /dev/null && continue
    apt-get -qq download "$program" 2> /dev/null || { apt-get -qq update && apt-get -qq download "$program"; } || {
        echo "$program is not on PATH and cannot be had from Debian's packages; install it" >&2
        exit 1
    }
    dpkg-deb --extract "$program"_*.deb .
    rm "$program"_*.deb
done
