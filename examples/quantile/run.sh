#!/usr/bin/env bash
# The quantile study with a planted answer, from text to report: about five minutes on two CPU cores, no download. A GPU is
# used where there is one; KAIYUAN_DEVICE=cpu leaves it alone.
# Tasks of lm-evaluation-harness take part when it is installed: .venv/bin/pip install -c constraints.txt -e ".[eval]"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-${KAIYUAN_PYTHON:-.venv/bin/python}}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
STUDY=${STUDY:-examples/quantile/study.yaml}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if ! "$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("lm_eval") is None)'; then
    echo "lm-evaluation-harness is not installed: the study runs without its task" >&2
    mkdir -p runs/quantile
    grep -v -E '^  (tasks|task_folders|limit):' "$STUDY" >runs/quantile/study_without_tasks.yaml
    STUDY=runs/quantile/study_without_tasks.yaml
fi
# The task is written last: without it the data are missing or were left unfinished.
[ -f runs/quantile/tasks/next_words.yaml ] || "$PYTHON" examples/quantile/prepare.py planted
"$PYTHON" tools/quantile_benchmark.py slice "$STUDY"
"$PYTHON" tools/quantile_benchmark.py train "$STUDY" --concurrent 2
"$PYTHON" tools/quantile_benchmark.py evaluate "$STUDY" --task-id 1 --num-tasks 2 & # one process a core
other=$!
"$PYTHON" tools/quantile_benchmark.py evaluate "$STUDY" --task-id 0 --num-tasks 2
wait "$other"
"$PYTHON" tools/quantile_benchmark.py report "$STUDY"
