#!/bin/sh
# One virtual environment from requirements.lock, hash-checked, with jaxops in it; a repeated call does nothing.
#
# usage: tools/install.sh VENV auto|cpu|tpu|cuda
# PYTHON names the interpreter (default python3); UV= (empty) keeps uv out of it and uses pip.
set -eu

venv=$1
accel=$2
python=${PYTHON:-python3}
uv=${UV-uv}
lock=requirements.lock
stamp=$venv/.jaxops-installed

say() { printf '%s\n' "$*" >&2; }
fail() {
    say "error: $1"
    shift
    for line in "$@"; do say "       $line"; done
    exit 2
}
loud() {
    say "********************************************************************************"
    for line in "$@"; do say "* $line"; done
    say "********************************************************************************"
}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }
have_uv() { [ -n "$uv" ] && "$uv" --version >/dev/null 2>&1; }

# --- what the machine has ---------------------------------------------------------------------------------------
has_tpu() {
    for device in "${ACCEL_DEVICES:-/dev}"/accel[0-9]*; do [ -e "$device" ] && return 0; done
    # Newer TPU VMs expose the chips through vfio, which other passed-through devices use too.
    [ -d "${ACCEL_DEVICES:-/dev}/vfio" ] &&
        [ -n "${TPU_ACCELERATOR_TYPE:-}${TPU_NAME:-}${TPU_WORKER_ID:-}${TPU_CHIPS_PER_HOST_BOUNDS:-}" ]
}
has_gpu() { nvidia-smi -L 2>/dev/null | grep -q '^GPU '; }

here=cpu
if has_tpu; then here=tpu; elif has_gpu; then here=cuda; fi
case $accel in
    auto) want=$here ;;
    cpu | tpu | cuda) want=$accel ;;
    gpu | nvidia) fail "ACCEL=$accel is not known; did you mean 'cuda'?" "expected one of: auto, cpu, tpu, cuda" ;;
    *) fail "ACCEL=$accel is not known" "expected one of: auto, cpu, tpu, cuda" ;;
esac

# --- the environment --------------------------------------------------------------------------------------------
suggest() { # the command that helps, for a Python that is missing or too old
    for name in python3.12 python3.13 python3.11 python3.14 python3; do
        for found in "$(command -v $name 2>/dev/null)" "$HOME"/.pyenv/versions/"${name#python}"*/bin/python; do
            if new_enough "$found"; then
                say "       found a newer one here; run:  make install PYTHON=$found"
                exit 2
            fi
        done
    done
    if have_uv; then
        say "       run:  uv python install 3.12 && make install PYTHON=\"\$(uv python find 3.12)\""
    else
        say "       install one (Debian, Ubuntu: apt install python3.12 python3.12-venv; macOS: brew install python@3.12)"
        say "       and run:  make install PYTHON=python3.12"
    fi
    exit 2
}

make_venv() {
    if ! "$python" -c '' >/dev/null 2>&1; then
        say "error: $python does not run; jaxops needs Python 3.11 or newer"
        suggest
    fi
    if ! new_enough "$python"; then
        say "error: $python is $("$python" --version 2>&1), jaxops needs Python 3.11 or newer"
        suggest
    fi
    say "making $venv with $("$python" --version 2>&1)"
    if have_uv; then
        "$uv" venv --quiet --clear --seed --python "$("$python" -c 'import sys; print(sys.executable)')" "$venv"
    elif ! "$python" -m venv --clear "$venv"; then
        rm -rf "$venv"
        fail "$python cannot make a virtual environment" \
            "Debian, Ubuntu:  apt install $("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
    fi
}

if ! new_enough "$venv/bin/python"; then make_venv; fi

pip_install() { # the same words for both installers
    if have_uv; then
        "$uv" pip install --quiet --python "$venv/bin/python" "$@"
    else
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
    fi
}
stamped() { grep -qsx "$1" "$stamp"; }

# --- what goes into it ------------------------------------------------------------------------------------------
lock_line="lock $(cksum <$lock)"
project_line="project $(cksum <pyproject.toml) $(pwd)"
accel_line="accel $want"

if ! stamped "$lock_line"; then
    rm -f "$stamp"
    say "installing $(grep -c '==' $lock) pinned packages from $lock with $(have_uv && echo uv || echo pip) ..."
    pip_install --require-hashes --no-deps -r $lock
fi
if ! stamped "$project_line"; then
    rm -f "$stamp"
    pip_install --no-deps --no-build-isolation --editable .
fi

plugin() { # is the accelerator's plugin for jax in the environment?
    case $1 in
        tpu) pattern='libtpu-*.dist-info' ;;
        cuda) pattern='jax_cuda*_plugin-*.dist-info' ;;
    esac
    [ -n "$(find "$venv" -maxdepth 4 -name "$pattern" 2>/dev/null | head -n 1)" ]
}
if [ "$want" != cpu ] && ! { stamped "$accel_line" && plugin "$want"; }; then
    version=$("$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("jax"))')
    extra=$want
    if [ "$want" = cuda ]; then
        driver=$(nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9]*\).*/\1/p' | head -n 1)
        extra=cuda$([ "${driver:-13}" -ge 13 ] && echo 13 || echo 12)
    fi
    constraints=$(mktemp)
    trap 'rm -f "$constraints"' EXIT
    sed -n 's/^\([A-Za-z0-9._-]*==[^\\]*[^ \\]\).*/\1/p' $lock >"$constraints"
    say "installing jax[$extra]==$version ..."
    if ! pip_install --constraint "$constraints" "jax[$extra]==$version"; then
        [ "$accel" = auto ] || fail "jax[$extra]==$version could not be installed; the reason is above"
        want=cpu accel_line="accel cpu"
    fi
fi

if ! { stamped "$lock_line" && stamped "$project_line" && stamped "$accel_line"; }; then
    printf '%s\n' "$lock_line" "$project_line" "$accel_line" >"$stamp"
    say "$venv is ready ($("$venv/bin/python" -c 'import importlib.metadata as m; print("jax", m.version("jax"))'), $want)"
fi
if [ "$here" != cpu ] && ! plugin "$here"; then
    kind=$([ "$here" = tpu ] && echo "A TPU" || echo "An NVIDIA GPU")
    loud "$kind is here, but the jax in $venv is CPU-only: everything will run on the CPU." \
        "To use it:  make install ACCEL=$here"
fi
if [ "$accel" != auto ] && [ "$want" != cpu ] && [ "$here" != "$want" ]; then
    say "note: ACCEL=$accel was asked for, but no such device is seen on this machine"
fi
