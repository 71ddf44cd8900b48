#!/bin/sh
# Makes the Python environment of a host from a lock file; a repeated call, or one at the same time, does nothing more.
#
# usage: setup_host.sh LOCK ENV [WHEELHOUSE]
#
# LOCK is a requirements file with every package pinned; where it has hashes they are checked. ENV is the folder to
# make. WHEELHOUSE is a folder of wheels for hosts that reach no package index. ACCEL=tpu adds jax's plugin for TPUs.
# uv is used where there is one, and else pip (UV= keeps uv out of it); both respect HTTPS_PROXY and their own settings.
# PYTHON names the interpreter. The host's own may be too old: uv then brings one of its own.
set -eu

lock=$1
env=$2
wheelhouse=${3:-}
stamp=$env/.ready

say() { printf 'setup_host: %s\n' "$*" >&2; }
fail() { say "error: $*"; exit 2; }
new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

[ -f "$lock" ] || fail "there is no lock file $lock: bring one with the code, or name a Python that has all (--python)"
mkdir -p "$(dirname "$env")"
if command -v flock >/dev/null && [ -z "${SETUP_HOST_LOCKED:-}" ]; then # two workers of one host
    SETUP_HOST_LOCKED=1 exec flock "$env.lock" sh "$0" "$@"
fi
[ -f "$stamp" ] && exit 0

python=
for name in "${PYTHON:-}" python3.12 python3.11 python3.13 python3; do
    found=$(command -v "${name:-false}" 2>/dev/null) || continue
    if new_enough "$found"; then python=$found && break; fi
done
uv=$(command -v "${UV-uv}" 2>/dev/null || true)
if [ -n "$uv" ] && ! "$uv" --version >/dev/null 2>&1; then uv=; fi
if [ -z "$python$uv" ] && [ -z "$wheelhouse" ]; then
    say "no Python 3.11 or newer here: fetching uv, which brings one"
    python3 -m venv "$env.uv" || fail "python3 cannot make an environment (Debian, Ubuntu: python3-venv)"
    "$env.uv/bin/python" -m pip install --quiet uv || fail "no uv could be fetched"
    uv=$env.uv/bin/uv
fi
[ -n "$python$uv" ] || fail "no Python 3.11 or newer here; install one, or name it (--python)"

say "making $env with ${python:-a Python of uv} and $([ -n "$uv" ] && echo uv || echo pip)"
if [ -n "$uv" ]; then
    "$uv" venv --quiet --clear --python "${python:->=3.11}" "$env" || fail "no environment could be made"
else
    "$python" -m venv --clear "$env" || fail "$python cannot make an environment (Debian, Ubuntu: python3-venv)"
fi

install() {
    if [ -n "$wheelhouse" ]; then set -- --no-index --find-links "$wheelhouse" "$@"; fi
    if [ -n "$uv" ]; then
        "$uv" pip install --quiet --python "$env/bin/python" "$@"
    else
        "$env/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
    fi
}

hashes=
if grep -q -e '--hash=' "$lock"; then hashes=--require-hashes; fi
install ${hashes:+"$hashes"} --no-deps -r "$lock" || fail "$lock could not be installed: the reason is above"
if [ "${ACCEL:-cpu}" = tpu ]; then
    pins=$env/.pins
    sed -n 's/^\([A-Za-z0-9._-]*==[^\\ ]*\).*/\1/p' "$lock" >"$pins"
    install --constraint "$pins" "jax[tpu]" || fail "jax[tpu] could not be installed: the reason is above"
fi
: >"$stamp"
say "$env is ready"
