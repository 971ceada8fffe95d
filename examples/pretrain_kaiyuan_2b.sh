#!/usr/bin/env bash
# Pretrains the Kaiyuan-2B shape in FP16 on one or more nodes with NVIDIA GPUs. Run it on every node; further flags are
# handed on and win over those below:
#
#   NNODES=8 NODE_RANK=0 MASTER_ADDR=node0 bash examples/pretrain_kaiyuan_2b.sh --micro-batch-size 2
#
# Steps and time:
#   one step        2 048 sequences x 4 096 tokens           = 8 388 608 tokens
#   the whole run   2.2e12 tokens / 8 388 608                = 262 260 steps
#   one pass        64 GPUs x micro-batch 4 = 256 sequences, so 2 048 / 256 = 8 micro-batches a step
#   time            one H200 with Transformer Engine ran this shape at 43 717 tokens/s in FP16. 64 that scaled perfectly
#                   would do 2.80 M tokens/s: 3.0 s a step, 9.1 days. Real clusters scale less than perfectly.
#
# Disk: a checkpoint holds 14 bytes a parameter (FP16 weights; FP32 master weights and two Adam moments) x 2.03e9
# = 28.4 GB. One is saved every 1 000 steps (50 minutes at 3.0 s a step, which is what a crash costs at most), and of
# these the newest 2 are kept: 262 of them would be 7.4 TB. Beside them the run saves and keeps what the plan's
# `averaging` names, the last 8, 400 steps (3.36e9 tokens) apart. So there are never more than 8 + 2, and one that is being
# written: 11 x 28.4 = 312 GB, towards the end; 85 GB before. KEEP_CHECKPOINTS= keeps all.
set -euo pipefail

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# The environment of `make env`, where there is one that starts: in a container which mounts the checkout, .venv names the
# host's python. Our image sets KAIYUAN_IGNORE_VENV, because a .venv that does start would replace the image's torch.
if [ -z "${KAIYUAN_IGNORE_VENV:-}" ] && "$ROOT/.venv/bin/python" -c '' 2>/dev/null; then
    PATH="$ROOT/.venv/bin:$PATH"
fi

PLAN=${PLAN:-$ROOT/examples/kaiyuan_2b/plan.yaml}
TOKENIZER=${TOKENIZER:-tokenizers/qwen2} # a folder with the Qwen2 tokenizer: 151 936 entries with the unused ones
RUN=${RUN:-runs/kaiyuan_2b}              # checkpoints and TensorBoard files; on a disk that all nodes share
SAVE_INTERVAL=${SAVE_INTERVAL:-1000}
KEEP_CHECKPOINTS=${KEEP_CHECKPOINTS-2}

# Tensor and context parallelism before Blackwell need one hardware queue, so that collectives start in order.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

# One process for each GPU that this node shows; NPROC_PER_NODE says otherwise, and how many train on CPUs.
NPROC_PER_NODE=${NPROC_PER_NODE:-$(python -c 'import torch; print(torch.cuda.device_count())')}
if [ "$NPROC_PER_NODE" -eq 0 ]; then
    printf 'torch sees no GPU on this node: give it some, or set NPROC_PER_NODE to train on CPUs\n' >&2
    exit 1
fi

DISTRIBUTED_ARGS=(
    --nproc_per_node "$NPROC_PER_NODE"
    --nnodes "${NNODES:-1}"
    --node_rank "${NODE_RANK:-0}"
    --master_addr "${MASTER_ADDR:-localhost}"
    --master_port "${MASTER_PORT:-29500}"
)

# Qwen3-1.7B's shape with its own output matrix: 1.41e9 parameters in the layers + 2 x 151 936 x 2 048 = 0.62e9.
# 151 936 = 2^7 x 1 187 divides among 1, 2, 4 or 8 tensor-parallel ranks without further padding.
# Not published, hence chosen here: soft-cap 30 (Gemma 2), norm epsilon 1e-6 (Qwen3), initial deviation 0.018
# (Puro-2B, the successor).
GPT_MODEL_ARGS=(
    --num-layers 28
    --hidden-size 2048
    --ffn-hidden-size 6144
    --num-attention-heads 16
    --group-query-attention
    --num-query-groups 8
    --kv-channels 128
    --seq-length 4096
    --max-position-embeddings 4096
    --position-embedding-type rope
    --rotary-base 10000
    --normalization RMSNorm
    --norm-epsilon 1e-6
    --swiglu
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --init-method-std 0.018
    --attention-dropout 0
    --hidden-dropout 0
)

# Rows of the embedding: as many as Qwen2's own models have where the tokenizer is Qwen2's, with its unused ids or without. Of
# any other, Megatron takes its ids and pads them to a multiple of 128 for each tensor-parallel rank.
IDS=$(python -c 'import sys, tokenizers; print(tokenizers.Tokenizer.from_file(sys.argv[1]).get_vocab_size())' \
    "$TOKENIZER/tokenizer.json" 2>/dev/null) || IDS=0
if [ "$IDS" -ge 151643 ] && [ "$IDS" -le 151936 ]; then GPT_MODEL_ARGS+=(--padded-vocab-size 151936); fi

# What keeps FP16 in range; MODEL_FEATURES="" trains Megatron's own GPT of the same shape, for comparison. The branch scale
# is no part of the model: it rises by itself, up to 8, when the monitor finds less than 8 times the room.
FEATURES="--qk-layernorm --kaiyuan-sandwich-norm --kaiyuan-logit-softcap 30"
FEATURES="$FEATURES --kaiyuan-branch-scale-bits 4 --kaiyuan-raise-branch-scale-below 8"
read -r -a FEATURE_ARGS <<<"${MODEL_FEATURES-$FEATURES}"

# The plan sets the number of samples and the learning rate of each phase.
TRAINING_ARGS=(
    --micro-batch-size 4
    --global-batch-size 2048
    --weight-decay 0.1
    --adam-beta1 0.9
    --adam-beta2 0.95
    --clip-grad 1.0
    --seed 1234
)

# FP16 with a dynamic loss scale. It starts at 2^16 instead of 2^32: each halving on the way down costs a step.
# Gradients are summed in FP32: hundreds of micro-batches and ranks would lose bits, or overflow, in FP16.
PRECISION=${PRECISION:-fp16} # or bf16, on GPUs that have it, without a loss scale
PRECISION_ARGS=("--$PRECISION" --attention-softmax-in-fp32 --accumulate-allreduce-grads-in-fp32)
if [ "$PRECISION" = fp16 ]; then
    PRECISION_ARGS+=(--initial-loss-scale 65536 --min-loss-scale 1 --loss-scale-window 1000 --hysteresis 2)
fi

# 2e9 parameters fit one GPU: plain data parallelism with the optimizer's state spread over all ranks is fastest.
MODEL_PARALLEL_ARGS=(
    --tensor-model-parallel-size 1
    --pipeline-model-parallel-size 1
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
)

# Transformer Engine where it is installed; Megatron's local layers otherwise. No fused cross-entropy: Megatron 0.19
# refuses that of Transformer Engine, and its own rounds the gradient of soft-capped logits to bf16.
if python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("transformer_engine") is None)'; then
    KERNEL_ARGS=(--transformer-impl transformer_engine)
else
    KERNEL_ARGS=(--transformer-impl local)
fi

DATA_ARGS=(
    --plan "$PLAN"
    --tokenizer-type HuggingFaceTokenizer
    --tokenizer-model "$TOKENIZER"
    --num-workers 2
    --no-create-attention-mask-in-dataloader
)

# The same folder to load and to save: started again, the run continues where its last checkpoint is.
EVAL_AND_LOGGING_ARGS=(
    --save "$RUN/checkpoints"
    --load "$RUN/checkpoints"
    --save-interval "$SAVE_INTERVAL"
    --ckpt-format torch_dist
    --exit-signal-handler
    --eval-interval 1000
    --eval-iters 8
    --log-interval 10
    --log-throughput
    --tensorboard-dir "$RUN/tensorboard"
)
if [ -n "$KEEP_CHECKPOINTS" ]; then EVAL_AND_LOGGING_ARGS+=(--kaiyuan-keep-checkpoints "$KEEP_CHECKPOINTS"); fi

# torchrun as a module of ours, which waits until the ranks have saved: SIGTERM, SIGUSR1 or Ctrl-C to this script or to its
# process group ends the run with a checkpoint, however long that takes. torchrun itself kills the ranks after 30 seconds.
exec python -m megatron_kaiyuan.host.torchrun "${DISTRIBUTED_ARGS[@]}" -m megatron_kaiyuan.pretrain \
    "${GPT_MODEL_ARGS[@]}" \
    "${FEATURE_ARGS[@]}" \
    "${TRAINING_ARGS[@]}" \
    "${PRECISION_ARGS[@]}" \
    "${MODEL_PARALLEL_ARGS[@]}" \
    "${KERNEL_ARGS[@]}" \
    "${DATA_ARGS[@]}" \
    "${EVAL_AND_LOGGING_ARGS[@]}" \
    "$@"
