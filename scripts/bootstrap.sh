#!/usr/bin/env bash
# Finds the project's Python environment, or creates it. Every other script starts with
#
#     source "$(dirname "${BASH_SOURCE[0]}")/bootstrap.sh"
#     clbench_help "$@"        # scripts that have nothing else to look for: prints their first comment for -h
#     clbench_bootstrap
#
# after which CLBENCH_ROOT and CLBENCH_PYTHON (an absolute path) are exported, the environment's programs come first
# on the PATH, and the variables in .env are set. When executed directly, it does the same and prints CLBENCH_PYTHON.
# It looks, in this order, for
#   1. an active environment (VIRTUAL_ENV, CONDA_PREFIX, or `python` on the PATH) in which clbench is installed, used
#      as it is; nothing is ever installed there;
#   2. otherwise .venv in the project root (or CLBENCH_VENV), which is used if its stamp matches requirements.lock,
#      pyproject.toml, its interpreter and its location, and updated if not;
#   3. if there is none, a Python >= 3.12, with which the environment is created.
# Messages go to stderr, so that stdout contains only the interpreter.

if [[ -z ${BASH_VERSINFO:-} ]] || ((BASH_VERSINFO[0] < 4)); then
    echo "clbench: bash 4 or newer is needed, this is ${BASH_VERSION:-another shell}" >&2
    # shellcheck disable=SC2317  # reached when executed rather than sourced
    return 1 2>/dev/null || exit 1
fi

CLBENCH_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
export CLBENCH_ROOT

# Prints the comment that the calling script starts with, and ends it, if -h or --help is among the arguments before --.
clbench_help() {
    local argument
    for argument in "$@"; do
        case $argument in
            --) return 0 ;;
            -h | --help)
                sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$0"
                exit 0
                ;;
        esac
    done
}

_clb_say() { printf 'clbench: %s\n' "$*" >&2; }

# --------------------------------------------------------------------------------------------- the .env file

# Sets KEY=VALUE lines of a file. Nothing in it is evaluated; variables that are already set, and empty values, are
# left alone. A value may be in single or double quotes; unquoted, it ends before " #". The clbench command reads the
# file in the same way (clbench/env_file.py): change the rules in both places.
_clb_load_env() {
    local _clb_key _clb_value # names that no file has
    [[ -f $1 && -r $1 ]] || return 0
    while IFS= read -r -d '' _clb_key && IFS= read -r -d '' _clb_value; do
        [[ -n $_clb_value && -z ${!_clb_key+set} ]] || continue
        export "$_clb_key=$_clb_value"
    done < <(
        LC_ALL=C # bytes: a file need not be in the user's locale
        _clb_read_env "$1"
    )
}

# Prints keys and values, with a NUL after each.
_clb_read_env() {
    local line key value
    while IFS= read -r line || [[ -n $line ]]; do
        line=${line%$'\r'}
        [[ $line =~ ^[[:space:]]*(export[[:space:]]+)?([A-Za-z_][A-Za-z0-9_]*)=(.*)$ ]] || continue
        key=${BASH_REMATCH[2]} value=${BASH_REMATCH[3]}
        if [[ $value =~ ^\"([^\"]*)\" || $value =~ ^\'([^\']*)\' ]]; then
            value=${BASH_REMATCH[1]}
        else
            [[ $value == \#* ]] && value=""
            value=${value%%[[:space:]]#*}
            value=${value%"${value##*[![:space:]]}"}
        fi
        # shellcheck disable=SC2088  # a literal ~/ is intended
        [[ $value == "~/"* ]] && value=${HOME:-}/${value:2}
        printf '%s\0%s\0' "$key" "$value"
    done <"$1"
}

# ----------------------------------------------------------------------------------------- using what exists

# Runs a Python with no influence from PYTHONPATH and PYTHONHOME, for at most 30 seconds (shims can hang).
_clb_python() {
    if command -v timeout >/dev/null; then
        env -u PYTHONPATH -u PYTHONHOME timeout 30 "$@" </dev/null
    else
        env -u PYTHONPATH -u PYTHONHOME "$@" </dev/null
    fi
}

# Is clbench installed for this interpreter, from this checkout or as a package (not from another checkout)?
# Started with -P, so that the current directory does not count. Prints the interpreter's absolute path.
_clb_python_has_clbench() {
    _clb_python "$1" -P -c '
import importlib.metadata, importlib.util, os, sys
if sys.version_info < (3, 12):
    sys.exit(1)
try:
    for name in ("clbench", "torch", "lerobot"):
        importlib.metadata.version(name)
except importlib.metadata.PackageNotFoundError:
    sys.exit(1)
spec = importlib.util.find_spec("clbench")
if spec is None or not spec.origin:
    sys.exit(1)
place = os.path.dirname(os.path.dirname(os.path.realpath(spec.origin)))
here = os.path.realpath(sys.argv[1])
if place != here and os.path.basename(place) not in ("site-packages", "dist-packages"):
    sys.exit(1)
print(sys.executable)' "$CLBENCH_ROOT" 2>/dev/null
}

# The active environment, if clbench can be used from it. $1 = quick: the PATH is consulted only if
# a folder shows that clbench is installed, so that the usual call starts no Python for this.
_clb_find_active() {
    local mode=$1 venv=$2 prefix python found
    for prefix in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}"; do
        [[ -n $prefix && -x $prefix/bin/python ]] || continue
        [[ $(readlink -f "$prefix") != "$venv" ]] || continue
        if found=$(_clb_python_has_clbench "$prefix/bin/python"); then
            printf '%s\n' "$found"
            return 0
        fi
    done
    for python in python python3; do
        python=$(command -v "$python") || continue
        prefix=$(readlink -f "$(dirname "$python")/..")
        [[ $prefix != "$venv" ]] || continue
        if [[ $mode == quick ]]; then
            compgen -G "$prefix/lib/python3.*/*-packages/clbench-*.dist-info" >/dev/null || continue
        fi
        if found=$(_clb_python_has_clbench "$python"); then
            printf '%s\n' "$found"
            return 0
        fi
    done
    return 1
}

# What the stamp must say for the environment to be up to date: a hash of everything it was made from.
_clb_fingerprint() {
    local venv=$1
    {
        printf '%s\n' 1 "$CLBENCH_ROOT" "$venv" "$(readlink -f "$venv/bin/python")"
        cat "$venv/pyvenv.cfg" "$CLBENCH_ROOT/requirements.lock" "$CLBENCH_ROOT/pyproject.toml"
    } 2>/dev/null | sha256sum | cut -d' ' -f1
}

_clb_is_current() {
    local venv=$1 stamp
    [[ -r $venv/.clbench-stamp && -x $venv/bin/python ]] || return 1
    read -r stamp <"$venv/.clbench-stamp" || return 1
    [[ $stamp == "$(_clb_fingerprint "$venv")" ]] || return 1
    compgen -G "$venv/lib/python3.*/site-packages/clbench-*.dist-info" >/dev/null || return 1
    _clb_python "$venv/bin/python" -I -S -c '' 2>/dev/null
}

# ------------------------------------------------------------------------------------------ finding a Python

# Prints MINOR of a Python 3 that can create environments; fails if it does not run, is too old or is incomplete.
_clb_python_minor() {
    [[ -x $1 && ! -d $1 ]] || return 1
    _clb_python "$1" -I -c '
import sys, venv, ssl, zlib, ctypes
print(sys.version_info[1]) if sys.version_info >= (3, 12) else sys.exit(1)' 2>/dev/null
}

# Folders outside the home directory that are searched for interpreters.
_clb_system_folders() {
    printf '%s\n' /opt/python/*/ /opt/conda/ /opt/conda/envs/*/ /opt/miniconda3/ /usr/local/ /usr/
}

# Every place where a Python may be found, one per line, best first: programs on the PATH, version managers, the system.
_clb_python_candidates() {
    local name folder home=${HOME:-/nonexistent}
    for name in python3.12 python3 python python3.13 python3.14; do
        type -P -a "$name" || true
    done
    {
        printf '%s\n' "${PYENV_ROOT:-$home/.pyenv}"/versions/*/ "$home"/.pyenv/versions/*/
        printf '%s\n' "${UV_PYTHON_INSTALL_DIR:-$home/.local/share/uv/python}"/*/
        printf '%s\n' "${ASDF_DATA_DIR:-$home/.asdf}"/installs/python/*/
        printf '%s\n' "${MISE_DATA_DIR:-$home/.local/share/mise}"/installs/python/*/
        for folder in ${CONDA_EXE:+"$(dirname "$(dirname "$CONDA_EXE")")"} "$home"/{miniconda3,anaconda3,miniforge3,mambaforge,.conda}; do
            printf '%s\n' "$folder/" "$folder"/envs/*/
        done
        _clb_system_folders
    } | sort -V -r | while IFS= read -r folder; do
        for name in python3.12 python3.13 python3.14 python3; do
            [[ ! -x ${folder}bin/$name ]] || printf '%s\n' "${folder}bin/$name"
        done
    done
}

# Prints the interpreter to use: the first 3.12 found, else 3.13, else the oldest newer one.
_clb_find_python() {
    local candidate real minor best="" best_minor=999
    local -A seen=()
    while IFS= read -r candidate; do
        real=$(readlink -f "$candidate") || continue
        # A shim is one file with many names, so the name counts too.
        [[ -z ${seen["$real:${candidate##*/}"]:-} ]] || continue
        seen["$real:${candidate##*/}"]=1
        minor=$(_clb_python_minor "$candidate") || continue
        if ((minor < best_minor)); then
            best=$candidate best_minor=$minor
        fi
        ((best_minor > 12)) || break
    done < <(_clb_python_candidates)
    [[ -n $best ]] || return 1
    printf '%s\n' "$best"
}

_clb_no_python() {
    _clb_say "no usable Python 3.12 or newer was found (3.12 is what clbench is tested with). What was looked at:"
    _clb_say "  the PATH, and the folders of pyenv, uv, asdf, mise and conda, /opt/python, /usr/local, /usr"
    _clb_say "Install one in any of these ways and call this again:"
    _clb_say "  uv python install 3.12                      (any Linux, no root)"
    _clb_say "  pyenv install 3.12                          (builds it)"
    _clb_say "  conda create -n py312 python=3.12           (any conda)"
    _clb_say "  sudo apt install python3.12 python3.12-venv (Debian, Ubuntu, where the release has it)"
}

# ------------------------------------------------------------------------------------------------ installing

# Runs a command with its output in a log, a line on stderr every 20 s while it runs, and the end of the log on failure.
_clb_step() {
    local what=$1 log=$2 status=0 started=$SECONDS ticker
    shift 2
    (
        while sleep 20 2>/dev/null && kill -0 $$ 2>/dev/null; do
            _clb_say "  ... $what: $((SECONDS - started)) s"
        done
    ) >/dev/null 9>&- &
    ticker=$!
    printf '\n$ %s\n' "$*" >>"$log"
    "$@" >>"$log" 2>&1 </dev/null 9>&- || status=$?
    kill "$ticker" 2>/dev/null
    wait "$ticker" 2>/dev/null
    if ((status != 0)); then
        _clb_say "FAILED (exit code $status): $what"
        _clb_say "  command: $*"
        _clb_say "  the last lines of $log:"
        tail -n 15 "$log" | sed 's/^/    /' >&2
    fi
    return "$status"
}

# Makes the folder a virtual environment, with pip if the interpreter can provide it.
_clb_make_venv() {
    local python=$1 venv=$2 log=$3
    if ! _clb_python "$python" -I -c 'import ensurepip' 2>/dev/null ||
        ! "$python" -m venv "$venv" >>"$log" 2>&1 9>&-; then
        _clb_say "this Python has no ensurepip: making the environment without pip"
        _clb_step "making the environment" "$log" "$python" -m venv --without-pip "$venv" || return 1
    fi
}

# Prints a working uv: the one on the PATH, else the environment's, installed with whichever pip is available.
_clb_get_uv() {
    local base=$1 venv=$2 log=$3 uv pip_python
    for uv in "$(command -v uv || true)" "$venv/bin/uv"; do
        if [[ -n $uv ]] && "$uv" --version >/dev/null 2>&1; then
            printf '%s\n' "$uv"
            return 0
        fi
    done
    # An interrupted call may have left an environment without its pip.
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip >>"$log" 2>&1 9>&- || true
    for pip_python in "$venv/bin/python" "$base" python3; do
        "$pip_python" -m pip --version >/dev/null 2>&1 || continue
        printf '\n$ %s -m pip --python %s install uv\n' "$pip_python" "$venv/bin/python" >>"$log"
        if "$pip_python" -m pip --python "$venv/bin/python" --disable-pip-version-check --no-input \
            install --quiet uv >>"$log" 2>&1 </dev/null 9>&- && "$venv/bin/uv" --version >/dev/null 2>&1; then
            printf '%s\n' "$venv/bin/uv"
            return 0
        fi
    done
    return 1
}

# Installs the lock and then this checkout, with uv or (slower) with pip.
_clb_install_with() {
    local tool=$1 venv=$2 log=$3
    local -a install
    if [[ $tool == pip ]]; then
        install=("$venv/bin/python" -m pip --disable-pip-version-check --no-input install --progress-bar off)
    else
        # As pip does by itself. Otherwise every process would compile what it imports where PYTHONDONTWRITEBYTECODE is
        # set, as it is in many container images: 12 s more for each.
        install=("$tool" pip install --python "$venv/bin/python" --compile-bytecode)
    fi
    # The lock is complete; some requirements of its packages are left out on purpose (tool.uv in pyproject.toml).
    _clb_step "installing requirements.lock with ${tool##*/}" "$log" "${install[@]}" --no-deps -r requirements.lock || return
    # The lock includes setuptools: built without isolation, this step needs no network.
    _clb_step "installing clbench itself with ${tool##*/}" "$log" "${install[@]}" -e . --no-deps --no-build-isolation
}

# Creates or updates the environment; runs in a subshell that holds the lock on file descriptor 9.
_clb_install_locked() {
    local venv=$1 log=$1/clbench-install.log base uv free_kb index status=0 started=$SECONDS
    if command -v flock >/dev/null; then
        flock -n 9 || {
            _clb_say "another process is installing into $venv: waiting for it"
            flock 9 || return 1
        }
    else
        _clb_say "no flock here: do not run this twice at the same time while it installs"
    fi
    ! _clb_is_current "$venv" || return 0

    # Our stamp or marker from another location: the folder was moved or copied, and its programs point elsewhere.
    if [[ -e $venv/.clbench-made ]] && {
        [[ $(cat "$venv/.clbench-made") != "$venv" ]] || ! _clb_python_minor "$venv/bin/python" >/dev/null
    }; then
        _clb_say "the environment in $venv was moved or does not run: making it anew"
        find "$venv" -mindepth 1 -maxdepth 1 ! -name .clbench-lock -exec rm -rf {} + || return 1
    elif [[ -e $venv/pyvenv.cfg && ! -e $venv/.clbench-made ]] && ! _clb_python_minor "$venv/bin/python" >/dev/null; then
        _clb_say "$venv exists, was not made by this script, and holds no usable Python >= 3.12."
        _clb_say "Remove it, or name another folder with CLBENCH_VENV."
        return 1
    fi
    rm -f "$venv/.clbench-stamp"

    if [[ -e $venv/pyvenv.cfg ]]; then
        base=$venv/bin/python
        _clb_say "bringing the environment in $venv up to date"
    else
        base=$(_clb_find_python) || {
            _clb_no_python
            return 1
        }
        _clb_say "making the environment in $venv with $("$base" -V 2>&1) ($base)"
        _clb_say "this takes about 7 GB of disk; under a minute with uv and a warm cache, some minutes with pip or a slow network"
        free_kb=$(df -Pk "$venv" 2>/dev/null | awk 'NR == 2 {print $4}') || free_kb=""
        if [[ $free_kb =~ ^[0-9]+$ ]] && ((free_kb < 8 * 1024 * 1024)); then
            _clb_say "WARNING: only $((free_kb / 1024)) MB are free there; CLBENCH_VENV can name a folder on another disk"
        fi
    fi
    : >"$log" || return 1
    if [[ ! -e $venv/pyvenv.cfg || ! -x $venv/bin/python ]]; then
        printf '%s\n' "$venv" >"$venv/.clbench-made"
        _clb_make_venv "$base" "$venv" "$log" || return 1
    fi

    cd "$CLBENCH_ROOT" || return 1
    if uv=$(_clb_get_uv "$base" "$venv" "$log"); then
        # uv does not read pip's configuration: pass on a mirror that is set there.
        if [[ -z ${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-} ]]; then
            index=${PIP_INDEX_URL:-$("$venv/bin/python" -m pip config get global.index-url 2>/dev/null || true)}
            [[ -z $index ]] || export UV_DEFAULT_INDEX=$index
        fi
        # Nor does it use the system's certificates by default, which a company's proxy may require.
        if [[ -e /etc/ssl/certs/ca-certificates.crt || -e /etc/pki/tls/certs/ca-bundle.crt ]]; then
            export UV_SYSTEM_CERTS=${UV_SYSTEM_CERTS:-1}
        fi
        _clb_install_with "$uv" "$venv" "$log" || status=$?
        ((status < 128)) || return "$status" # stopped by a signal: the next call continues
    else
        _clb_say "uv could not be had (see $log)"
        status=1
    fi
    if ((status != 0)); then
        if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
            _clb_say "and there is no pip in the environment to fall back to: install uv or python3-venv, call this again"
            return 1
        fi
        _clb_say "falling back to pip, which takes several minutes"
        _clb_install_with pip "$venv" "$log" || return
    fi

    _clb_fingerprint "$venv" >"$venv/.clbench-stamp.new" && mv -f "$venv/.clbench-stamp.new" "$venv/.clbench-stamp" || return 1
    _clb_say "the environment is ready after $((SECONDS - started)) s"
}

_clb_install() {
    local venv=$1 status=0
    mkdir -p "$venv" 2>/dev/null && [[ -w $venv ]] || {
        _clb_say "cannot write to $venv; CLBENCH_VENV can name another folder"
        return 1
    }
    # Subshell: the lock ends with it, and the caller's directory, options and variables are unchanged.
    (
        set +e
        _clb_install_locked "$venv"
    ) 9>"$venv/.clbench-lock" || status=$?
    ((status == 0)) || _clb_say "the environment is not ready; a further call continues where this one stopped"
    return "$status"
}

# ------------------------------------------------------------------------------------------- the entry point

clbench_bootstrap() {
    if [[ -n ${CLBENCH_ENV_FILE:-} && ! (-f $CLBENCH_ENV_FILE && -r $CLBENCH_ENV_FILE) ]]; then
        _clb_say "CLBENCH_ENV_FILE=$CLBENCH_ENV_FILE is not a readable file. Unset it to use the project's .env."
        return 2
    fi
    _clb_load_env "${CLBENCH_ENV_FILE-$CLBENCH_ROOT/.env}" # before the names below hide any of its
    local venv python bin
    venv=${CLBENCH_VENV:-.venv}
    [[ $venv == /* ]] || venv=$CLBENCH_ROOT/$venv
    venv=$(readlink -m "$venv")

    if python=$(_clb_find_active quick "$venv"); then
        :
    elif _clb_is_current "$venv"; then
        python=$venv/bin/python
    elif [[ ! -e $venv/pyvenv.cfg ]] && python=$(_clb_find_active thorough "$venv"); then
        :
    else
        if [[ -n ${VIRTUAL_ENV:-} && $(readlink -m "$VIRTUAL_ENV") != "$venv" ]]; then
            _clb_say "clbench is not installed in the active environment $VIRTUAL_ENV: using $venv"
        fi
        _clb_install "$venv" || return
        python=$venv/bin/python
    fi

    export CLBENCH_PYTHON=$python
    bin=${python%/*}
    [[ ${PATH%%:*} == "$bin" ]] || export PATH="$bin:$PATH"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    set -euo pipefail
    case ${1:-} in
        "")
            clbench_bootstrap
            printf '%s\n' "$CLBENCH_PYTHON"
            ;;
        -h | --help)
            sed -n '2,/^$/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
            ;;
        *)
            _clb_say "unknown argument: $1 (there is only -h)"
            exit 2
            ;;
    esac
fi
