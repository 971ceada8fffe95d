#!/usr/bin/env bash
# Makes .venv ready: finds Python 3.12 or later, creates the environment, installs what setup.py asks for in the
# versions of constraints.txt. Run again, it sees that nothing changed and does nothing. PYTHON=... names the Python.
# KAIYUAN_PYTHON=... names one to be used as it is, without .venv.
set -euo pipefail
cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."

readonly VENV=.venv
readonly STAMP=$VENV/ready          # what was installed; written last
readonly UNFINISHED=$VENV/unfinished # there while an install runs, so that an interrupted one is seen
readonly LOG=$VENV/install.log
readonly EXTRAS=test,preprocess
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

fail() {
    printf 'env: %s\n' "$1" >&2
    exit 1
}

is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

can_make_environments() {
    "$1" -c 'import ensurepip, venv' >/dev/null 2>&1
}

# One candidate a line, best first. A name on PATH may be a shim of a version manager that exists and does not run,
# so each is tried before it is believed, and the folders of the version managers are looked into.
list_pythons() {
    local minor folder
    for minor in 12 13 14; do
        type -aP "python3.$minor" || true
        for folder in "${PYENV_ROOT:-}/versions" ~/.pyenv/versions "${CONDA_PREFIX:-}/envs" \
            ~/{miniconda3,miniforge3,anaconda3}{,/envs}; do
            ls -d "$folder"/{,*/}"bin/python3.$minor" 2>/dev/null || true
        done
        uv python find "3.$minor" --no-python-downloads --system 2>/dev/null || true
    done
    type -aP python3 python || true
}

# Prints the Python to use, or says in one sentence how to get one.
find_python() {
    local candidate lacking=
    if [ -n "${PYTHON:-}" ]; then
        is_new_enough "$PYTHON" || fail "PYTHON=$PYTHON does not run or is older than Python 3.12; name another one."
        can_make_environments "$PYTHON" || lacking=$PYTHON
        [ -n "$lacking" ] || { printf '%s\n' "$PYTHON"; return; }
    else
        while IFS= read -r candidate; do
            is_new_enough "$candidate" || continue
            can_make_environments "$candidate" && { printf '%s\n' "$candidate"; return; }
            lacking=${lacking:-$candidate}
        done < <(list_pythons)
    fi
    [ -z "$lacking" ] || fail "$lacking cannot create environments because it lacks ensurepip; install that part \
(on Debian and Ubuntu: apt-get install python3-venv) and run this again."
    fail "no Python 3.12 or later was found; install one (apt-get install python3.12-venv, brew install python@3.12, \
pyenv install 3.12, or uv python install 3.12) and run this again, or name it: make env PYTHON=/path/to/python3.12"
}

# Changes when what to install, the Python, or this folder's place changes (an environment does not survive a move).
fingerprint() {
    { "$VENV/bin/python" -V && pwd -P && cat setup.py pyproject.toml constraints.txt tools/dev/env.sh; } 2>/dev/null | cksum
}

is_ready() {
    [ -f "$STAMP" ] && [ ! -e "$UNFINISHED" ] && [ "$(cat "$STAMP")" = "$(fingerprint)" ]
}

# An environment can be added to only if it was made for this place, still runs, and no install broke off in it.
is_usable() {
    [ ! -e "$UNFINISHED" ] && is_new_enough "$VENV/bin/python" && "$VENV/bin/python" -c 'import pip' 2>/dev/null &&
        grep -qF "$(pwd -P)/$VENV" "$VENV/bin/activate"
}

create() {
    local python
    python=$(find_python)
    printf 'env: %s (%s)\n' "$("$python" -V)" "$python"
    rm -rf "$VENV"
    "$python" -m venv "$VENV" || fail "$python -m venv $VENV failed; see the lines above."
}

# pip's words go to the log; a terminal also shows which package is being fetched.
quiet_pip() {
    "$VENV/bin/python" -m pip install --progress-bar off -c constraints.txt "$@" 2>&1 | tee -a "$LOG" | show_progress
}

show_progress() {
    if [ -t 1 ]; then
        awk '/Downloading|Installing collected/ { printf "\r\033[Kenv: %.90s", $0; fflush() } END { printf "\r\033[K" }'
    else
        cat >/dev/null
    fi
}

install() {
    : >"$UNFINISHED"
    rm -f "$STAMP" "$LOG"
    printf 'env: installing into %s (about 95 packages; on Linux torch brings CUDA: 2 GB to fetch, 5 GB on disk); log: %s\n' \
        "$VENV" "$LOG"
    # setuptools first and no build isolation: the build uses the pinned one instead of fetching the newest.
    if ! { quiet_pip setuptools && quiet_pip --no-build-isolation -e ".[$EXTRAS]"; }; then
        tail -n 20 "$LOG" >&2
        fail "installing failed; the end of $LOG is above. Running this again starts afresh."
    fi
    fingerprint >"$STAMP"
    rm -f "$UNFINISHED"
}

# A Python that is given keeps its packages: what it lacks is named, and nothing is installed.
check_given_python() {
    is_new_enough "$KAIYUAN_PYTHON" ||
        fail "KAIYUAN_PYTHON=$KAIYUAN_PYTHON does not run or is older than Python 3.12; name another one."
    exec "$KAIYUAN_PYTHON" tools/dev/versions.py ${KAIYUAN_TESTS:+--tests}
}

main() {
    local started=$SECONDS
    [ -z "${KAIYUAN_PYTHON:-}" ] || check_given_python
    if is_ready; then
        printf 'env: %s is ready, nothing to install\n' "$VENV"
        return
    fi
    is_usable || create
    install
    printf 'env: installed in %d s (%s)\n' "$((SECONDS - started))" "$(du -sh "$VENV" | cut -f1)"
}

main
