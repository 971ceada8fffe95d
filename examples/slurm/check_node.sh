#!/usr/bin/env bash
# Checks one node before a run: as many GPUs as asked for, that torch can compute on, and the run's files in reach.
# Usage: check_node.sh GPUS. Names the node and what is wrong, and exits with 1.
set -euo pipefail

gpus=$1
if [ -d .venv/bin ]; then PATH="$PWD/.venv/bin:$PATH"; fi

fail() {
    printf '%s: %s\n' "$(hostname)" "$1" >&2
    exit 1
}

plan=${PLAN:-examples/kaiyuan_2b/plan.yaml}
[ -r "$plan" ] || fail "the plan $plan cannot be read; is its disk mounted here?"
python -c 'import megatron_kaiyuan' || fail "megatron_kaiyuan is not installed; run make env, or start the container"
python - "$gpus" <<'PYTHON' || fail "its GPUs are not fit for the run; see the line above"
import sys

import torch

wanted, found = int(sys.argv[1]), torch.cuda.device_count()
if found < wanted:
    sys.exit(f"{found} GPUs visible, {wanted} needed")
for number in range(wanted):
    values = torch.ones(1024, 1024, device=f"cuda:{number}", dtype=torch.float16)
    if not torch.equal(values @ values, torch.full_like(values, 1024)):
        sys.exit(f"GPU {number} computes wrong products")
PYTHON
