#!/bin/sh
# Starts one worker of a launch on a host that nobody drives: brings the code, makes the environment, looks, trains.
#
# usage: start_worker.sh                  one worker; the variables below say which
#        start_worker.sh get PLACE FILE   copies from run.dir; PLACE is a path or gs://, s3://
#        start_worker.sh put FILE PLACE   copies to it
#
# LAUNCH_FOLDER        the launch's folder in run.dir: a path that the hosts share, or a URL
# LAUNCH_CODE          the tar of the code, and LAUNCH_CODE_SHA256 its digest
# LAUNCH_HOST_SHA256   the digest of LAUNCH_FOLDER/host-SHA256.tar, which holds the other host scripts and worker.json
# LAUNCH_WORKER        this worker's number from 0, of LAUNCH_WORKERS
# LAUNCH_ATTEMPT       the number of the attempt, from 1
# LAUNCH_DEADLINE      Unix time at which the hours are used up (default: counted from the first attempt)
# LAUNCH_ADDRESS       where the other workers reach this host (default: its own address)
# LAUNCH_WORK          a folder of this host (default: /var/tmp/jaxops-launch-USER)
#
# On a TPU VM of Compute Engine, LAUNCH_WORKER is read from the instance's metadata where it is not set. Exit statuses:
# 0 done, 1 the run failed, 2 wrong input, 75 told to stop and saved, 76 another worker or a service was lost: try again.
set -eu
umask 077

say() { printf 'start_worker: %s\n' "$*" >&2; }
where() { printf '%s' "worker ${LAUNCH_WORKER:-?} on $(hostname)"; }

# The reason of an early end goes where the others are looked for.
fail() {
    status=$1
    shift
    say "error: $(where): $*"
    if [ -n "${LAUNCH_FOLDER:-}" ] && [ -n "${LAUNCH_ATTEMPT:-}" ]; then
        told=$(mktemp)
        printf '%s\n' "start_worker: $(where): $*" >"$told"
        copy_out "$told" "$LAUNCH_FOLDER/attempt-$LAUNCH_ATTEMPT/worker-$LAUNCH_WORKER.log" 2>/dev/null || true
        printf '{"code": %s, "why": "it did not start: its log says why", "host": "%s"}\n' "$status" "$(hostname)" >"$told"
        copy_out "$told" "$LAUNCH_FOLDER/attempt-$LAUNCH_ATTEMPT/worker-$LAUNCH_WORKER.json" 2>/dev/null || true
        rm -f "$told"
    fi
    exit "$status"
}

# Google's storage without gcloud: Python with the token that the VM's metadata server gives.
# shellcheck disable=SC2016
google_storage='
import json, sys, urllib.parse, urllib.request
host = "http://metadata.google.internal/computeMetadata/v1/instance/service-accounts/default/token"
ask = urllib.request.Request(host, headers={"Metadata-Flavor": "Google"})
token = json.load(urllib.request.urlopen(ask, timeout=20))["access_token"]
verb, url, file = sys.argv[1:]
bucket, _, name = url[len("gs://"):].partition("/")
quoted = urllib.parse.quote(name, safe="")
head = {"Authorization": "Bearer " + token}
root = "https://storage.googleapis.com"
if verb == "get":
    ask = urllib.request.Request(f"{root}/storage/v1/b/{bucket}/o/{quoted}?alt=media", headers=head)
    with urllib.request.urlopen(ask, timeout=120) as answer, open(file, "wb") as out:
        while block := answer.read(1 << 20):
            out.write(block)
else:
    ask = f"{root}/upload/storage/v1/b/{bucket}/o?uploadType=media&name={quoted}"
    with open(file, "rb") as data:
        urllib.request.urlopen(urllib.request.Request(ask, data=data.read(), headers=head, method="POST"), timeout=120)
'

copy_in() {
    case $1 in
    gs://*)
        if command -v gcloud >/dev/null; then
            gcloud --quiet storage cp "$1" "$2" >&2
        else
            python3 -c "$google_storage" get "$1" "$2"
        fi
        ;;
    s3://*) aws s3 cp --only-show-errors "$1" "$2" >&2 ;;
    *) cp "$1" "$2" ;;
    esac
}

copy_out() {
    case $2 in
    gs://*)
        if command -v gcloud >/dev/null; then
            gcloud --quiet storage cp "$1" "$2" >&2
        else
            python3 -c "$google_storage" put "$2" "$1"
        fi
        ;;
    s3://*) aws s3 cp --only-show-errors "$1" "$2" >&2 ;;
    *) # whole or not at all: others look at it
        mkdir -p "$(dirname "$2")" && cp "$1" "$2.$$" && mv "$2.$$" "$2"
        ;;
    esac
}

case ${1:-} in
get) copy_in "$2" "$3" && exit 0 || exit 1 ;;
put) copy_out "$2" "$3" && exit 0 || exit 1 ;;
esac

metadata() {
    python3 -c '
import sys, urllib.request
place = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/" + sys.argv[1]
ask = urllib.request.Request(place, headers={"Metadata-Flavor": "Google"})
try:
    print(urllib.request.urlopen(ask, timeout=5).read().decode())
except OSError:
    pass
' "$1"
}

command -v python3 >/dev/null || fail 2 "there is no python3 on this host"
if [ -z "${LAUNCH_WORKER:-}" ]; then # a TPU VM of Compute Engine: its own number in its slice
    LAUNCH_WORKER=$(metadata agent-worker-number)
    if [ -z "$LAUNCH_WORKER" ] && [ "${LAUNCH_WORKERS:-}" = 1 ]; then LAUNCH_WORKER=0; fi
fi
for name in FOLDER CODE CODE_SHA256 HOST_SHA256 WORKER WORKERS ATTEMPT; do
    eval "value=\${LAUNCH_$name:-}"
    [ -n "$value" ] || fail 2 "LAUNCH_$name is not set"
done
LAUNCH_WORK=${LAUNCH_WORK:-/var/tmp/jaxops-launch-$(id -un)}
export LAUNCH_FOLDER LAUNCH_CODE LAUNCH_CODE_SHA256 LAUNCH_HOST_SHA256 LAUNCH_WORKER LAUNCH_WORKERS LAUNCH_ATTEMPT
export LAUNCH_WORK LAUNCH_DEADLINE="${LAUNCH_DEADLINE:-}"

digest() {
    if command -v sha256sum >/dev/null; then sha256sum "$1" | cut -d ' ' -f 1; else shasum -a 256 "$1" | cut -d ' ' -f 1; fi
}

# Brings a tar whose digest is right into a folder that is named by the digest, which appears whole or not at all.
bring() {
    place=$1 right=$2 folder=$3
    [ -d "$folder" ] && return 0
    fetched=$folder.$$.tar tries=0
    until copy_in "$place" "$fetched"; do
        tries=$((tries + 1))
        [ "$tries" -lt 5 ] || fail 76 "$place cannot be read"
        sleep $((tries * 3))
    done
    found=$(digest "$fetched")
    [ "$found" = "$right" ] || fail 2 "$place: its SHA-256 is $found, expected $right"
    mkdir "$folder.$$"
    tar -xf "$fetched" -C "$folder.$$" --no-same-owner || fail 1 "$place could not be unpacked"
    rm -f "$fetched"
    mv -T "$folder.$$" "$folder" 2>/dev/null || rm -rf "$folder.$$" # another worker of this host was faster
}

mkdir -p "$LAUNCH_WORK" || fail 2 "$LAUNCH_WORK cannot be made"
# shellcheck disable=SC3067 # dash, bash and busybox have -O
[ -O "$LAUNCH_WORK" ] || fail 2 "$LAUNCH_WORK belongs to another user: name a folder of your own (LAUNCH_WORK)"
host=$LAUNCH_WORK/host-$LAUNCH_HOST_SHA256
code=$LAUNCH_WORK/code-$LAUNCH_CODE_SHA256
bring "$LAUNCH_FOLDER/host-$LAUNCH_HOST_SHA256.tar" "$LAUNCH_HOST_SHA256" "$host"
bring "$LAUNCH_CODE" "$LAUNCH_CODE_SHA256" "$code"
exec python3 -S "$host/attend_worker.py" run "$code"
