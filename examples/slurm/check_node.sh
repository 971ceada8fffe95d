#!/usr/bin/env bash
# Checks one node before a run: GPUs that compute, the plan and its data in reach, room for checkpoints, the clock.
# Usage: check_node.sh GPUS TIME, where TIME is EPOCHREALTIME of the batch script; 0 GPUs checks none. Prints one line,
# "NODE FINGERPRINT VERSIONS", which must be the same on all nodes but for its first word; or says on stderr what is wrong
# with which node, and exits with 1.
#
# PLAN, RUN as for the run itself; MIN_FREE_GB is the room that RUN must have free. Its default is the 312 GB of
# examples/pretrain_kaiyuan_2b.sh less what the run's checkpoints take already, but at least two of 28.4 GB: the next one is
# written before an older one is deleted. MAX_CLOCK_SECONDS is how far clocks may differ (what measures a time on one node and compares it on another breaks silently: caches, timeouts, file times).
set -euo pipefail

now=$EPOCHREALTIME
gpus=$1
reference=$2
plan=${PLAN:-examples/kaiyuan_2b/plan.yaml}
run=${RUN:-runs/kaiyuan_2b}
max_clock_seconds=${MAX_CLOCK_SECONDS:-60}
node=${SLURMD_NODENAME:-$(hostname)}

fail() {
    printf '%s: %s\n' "$node" "$1" >&2
    exit 1
}

# Starting the task takes a moment too, which the limit must allow for.
awk -v a="$now" -v b="$reference" -v limit="$max_clock_seconds" 'BEGIN { d = a - b; exit !(d < limit && -d < limit) }' ||
    fail "its clock says $now, that of the first node $reference when it started this; synchronise them (chrony)"

if ! mkdir -p "$run" 2>/dev/null || ! [ -w "$run" ]; then fail "$run cannot be written; is its disk mounted here?"; fi
free_gb=$(df -Pk "$run" | awk 'NR == 2 { print int($4 / 1000000) }')
min_free_gb=${MIN_FREE_GB:-}
if [ -z "$min_free_gb" ]; then
    # What another node deletes meanwhile makes du complain.
    used_gb=$({ du -sk "$run/checkpoints" 2>/dev/null || true; } | awk '{ print int($1 / 1000000) }')
    min_free_gb=$((312 - ${used_gb:-0}))
    if [ "$min_free_gb" -lt 57 ]; then min_free_gb=57; fi
fi
[ "$free_gb" -ge "$min_free_gb" ] ||
    fail "$run has $free_gb GB free, $min_free_gb GB are asked for; remove old checkpoints, or set MIN_FREE_GB"

# Which environment, by the rule of examples/pretrain_kaiyuan_2b.sh.
if [ -z "${KAIYUAN_IGNORE_VENV:-}" ] && .venv/bin/python -c '' 2>/dev/null; then PATH="$PWD/.venv/bin:$PATH"; fi
[ -r "$plan" ] || fail "the plan $plan cannot be read; is its disk mounted here?"
python -c 'import megatron_kaiyuan' || fail "megatron_kaiyuan is not installed; run make env, or start the container"
python - "$gpus" <<'PYTHON' || fail "its GPUs are not fit for the run; see the line above"
import sys

wanted = int(sys.argv[1])
if not wanted:
    sys.exit()

import torch

found = torch.cuda.device_count()
if found < wanted:
    sys.exit(f"{found} GPUs visible, {wanted} needed")
for number in range(wanted):
    values = torch.ones(1024, 1024, device=f"cuda:{number}", dtype=torch.float16)
    if not torch.equal(values @ values, torch.full_like(values, 1024)):
        sys.exit(f"GPU {number} computes wrong products")
PYTHON

# Opening the plan opens every shard and index of it. Another fingerprint would be another order of samples.
python - "$plan" "$node" <<'PYTHON' || fail "the data of $plan are not what the run needs; see the line above"
import sys
from importlib.metadata import version

from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.errors import KaiyuanError

try:
    fingerprint = Plan.load(sys.argv[1]).fingerprint
except KaiyuanError as error:
    sys.exit(str(error))
print(sys.argv[2], fingerprint, *(f"{name}-{version(name)}" for name in ("megatron_kaiyuan", "megatron-core", "torch")))
PYTHON
