#!/bin/sh
# Builds the image and captions with it, without a registry of images: debootstrap makes the base, buildah builds, and
# podman runs. Run it as root in the top folder of the repository. Takes seven minutes, and 25 GB under $TMPDIR.
#
#   apt-get install --yes buildah debootstrap podman runc && deploy/try_image.sh
set -eu

base=docker.io/library/python:3.11-slim-bookworm
scratch=$(mktemp -d)
store="--root $scratch/store --runroot $scratch/run --storage-driver overlay"
podman="podman --cgroup-manager cgroupfs --runtime runc $store"
trap '$podman rm --force --all > /dev/null || true; buildah $store rmi --all --force > /dev/null || true; rm -rf "$scratch"' EXIT

debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv bookworm "$scratch/base" > "$scratch/log"
ln -s python3 "$scratch/base/usr/bin/python"
# The image needs the certificates and the pip settings of this machine to reach packages.
cp /etc/ssl/certs/ca-certificates.crt "$scratch/base/etc/ssl/certs/"
[ ! -f /etc/pip.conf ] || cp /etc/pip.conf "$scratch/base/etc/"
tar -C "$scratch/base" -c . | $podman import - "$base" > /dev/null

buildah $store build --format docker --pull=never --isolation chroot --network host -t etenet .
$podman run --detach --name etenet --network host --ulimit nofile=4096:4096 --ulimit nproc=4096:4096 \
    --read-only --tmpfs /tmp:size=4g,mode=1777 --cap-drop all --security-opt no-new-privileges --no-healthcheck etenet > /dev/null
ready="from urllib.request import ProxyHandler, build_opener; build_opener(ProxyHandler({})).open('http://127.0.0.1:8083/ready')"
until $podman exec etenet python -c "$ready" 2> /dev/null; do
    $podman ps --filter name=etenet --quiet | grep -q . || { $podman logs etenet >&2; exit 1; }
    sleep 1
done
for clip in examples/*.mp4; do
    curl --noproxy '*' --fail --silent --upload-file "$clip" localhost:8080/predictions/etenet | cut -c -80
done
$podman exec etenet sh -c 'id; ! touch /app/written /opt/etenet/written'
$podman stop --time 90 etenet > /dev/null
$podman inspect --format 'ended with status {{.State.ExitCode}}' etenet
