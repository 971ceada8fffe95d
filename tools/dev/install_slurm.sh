#!/usr/bin/env bash
# Installs what tests/functional_tests/test_slurm.py needs on Debian or Ubuntu: the Slurm daemons and munge. Needs root.
# Nothing is configured and no service is left running: the test starts daemons of its own, with keys of its own.
set -euo pipefail

if [ "$(id -u)" -ne 0 ]; then
    printf 'install_slurm.sh: needs root; without it the Slurm tests are skipped\n' >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# Not started by their packages: a daemon without a configuration would fail, and the test wants none of the machine's.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then # containers often have one
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
    trap 'rm -f "$policy"' EXIT
fi
apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge
