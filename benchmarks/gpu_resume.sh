#!/usr/bin/env bash
# On one GPU: 6 steps at once, and 3 steps, save, resume, 3 steps, in FP16; prints the losses of both side by side.
# Equal to the last printed digit is what a resume has to give on the same layout.
set -euo pipefail
PLAN=${PLAN:-benchmarks/one_gpu_plan.yaml}
OUT=${OUT:-runs/gpu_resume}
mkdir -p "$OUT"
FLAGS=(
    --plan "$PLAN" --num-layers 4 --hidden-size 512 --ffn-hidden-size 1536 --num-attention-heads 8 --max-position-embeddings 4096
    --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear --attention-dropout 0 --hidden-dropout 0
    --qk-layernorm --kaiyuan-sandwich-norm --kaiyuan-logit-softcap 30 --fp16 --initial-loss-scale 65536
    --micro-batch-size 4 --global-batch-size 8 --vocab-size 8192 --tokenizer-type NullTokenizer
    --eval-iters 0 --log-interval 1 --save-interval 1000 --deterministic-mode --transformer-impl local
)
export NVTE_ALLOW_NONDETERMINISTIC_ALGO=0 CUBLAS_WORKSPACE_CONFIG=:4096:8 NCCL_ALGO=Ring
train() { python3 -m megatron_kaiyuan.pretrain "${FLAGS[@]}" "$@"; }
train --exit-interval 6 --save "" >"$OUT/whole.log" 2>&1
train --exit-interval 3 --save "$OUT/checkpoints" >"$OUT/first.log" 2>&1
train --exit-interval 6 --save "$OUT/checkpoints" --load "$OUT/checkpoints" >"$OUT/second.log" 2>&1
losses() { grep -ho 'iteration  *[0-9]*/.*lm loss: [0-9.E+-]*' "$@" | sed 's/\/.*lm loss//' ; }
paste <(losses "$OUT/whole.log") <(losses "$OUT/first.log" "$OUT/second.log")
