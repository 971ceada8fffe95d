"""What `benchmarks/training_throughput.py` can measure: the model's size and the rows, in named groups."""

from dataclasses import dataclass, field

__all__ = ["GROUPS", "KAIYUAN", "NATIVE_LOSS", "PEAK_FLOPS", "ROWS", "TINY", "UNFUSED", "Row", "Size"]

PEAK_FLOPS = 989e12
LOCAL = ("--transformer-impl", "local")
ENGINE = ("--transformer-impl", "transformer_engine")
# The last word on a flag wins; --qk-layernorm has no opposite, so the script leaves its three features to
# MODEL_FEATURES.
STOCK = {"MODEL_FEATURES": ""}
UNFUSED = ("--kaiyuan-fusions", "none", "--no-gradient-accumulation-fusion")
NATIVE_LOSS = ("--cross-entropy-loss-fusion", "--cross-entropy-fusion-impl", "native")
TORCH_ORDER = ("--kaiyuan-attention", "sdpa-torch-order")
BF16 = {"PRECISION": "bf16"}
# The demo's shards end their documents with id 0, which the benchmark's tokenizer for a large vocabulary cannot know.
APART = ("--reset-attention-mask", "--reset-position-ids", "--null-tokenizer-eod-id", "0")
TIMERS = ("--timing-log-level", "2")
FULL_RECOMPUTE = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")
SELECTIVE = ("--recompute-granularity", "selective")


@dataclass(frozen=True)
class Size:
    """What is trained, in the numbers that the rates are computed from."""

    sequences: int = 16
    seq_length: int = 4096
    layers: int = 28
    hidden: int = 2048
    vocabulary: int = 151_936
    parameters: int = 2_031_739_904
    flags: tuple[str, ...] = ()
    """Of the script, where they differ from its own."""

    @property
    def flops_per_token(self) -> float:
        """Operations that the formula counts for a token, forward and backward."""
        of_matrices = 6 * (self.parameters - self.vocabulary * self.hidden)
        return of_matrices + 12 * self.layers * self.hidden * self.seq_length / 2

    def formula(self) -> str:
        """What MFU counts, with its numbers."""
        return (
            f"MFU: tokens/s x FLOP a token / {PEAK_FLOPS / 1e12:.0f} TFLOP/s (data sheet, dense FP16 or bf16).\n"
            "FLOP a token = 6 (P - V h) + 12 L h s / 2 = "
            f"6 ({self.parameters:,} - {self.vocabulary:,} x {self.hidden:,})"
            f" + 12 x {self.layers} x {self.hidden:,} x {self.seq_length:,} / 2 = {self.flops_per_token / 1e9:.4g} G:\n"
            "all matrix products without the input embedding, and causal attention at half; no recomputation."
        )


KAIYUAN = Size()
TINY = Size(
    sequences=16, seq_length=64, layers=2, hidden=64, vocabulary=256, parameters=131_456,
    flags=(
        "--num-layers", "2", "--hidden-size", "64", "--ffn-hidden-size", "192", "--num-attention-heads", "4",
        "--num-query-groups", "2", "--kv-channels", "16", "--seq-length", "64", "--max-position-embeddings", "64",
        "--padded-vocab-size", "256", "--distributed-backend", "gloo", "--no-masked-softmax-fusion",
        "--no-bias-swiglu-fusion", "--no-rope-fusion", "--no-gradient-accumulation-fusion",
    ),
)  # fmt: skip
"""For `--smoke`."""


@dataclass(frozen=True)
class Row:
    """One configuration."""

    key: str
    name: str
    flags: tuple[str, ...] = LOCAL
    environment: dict[str, str] = field(default_factory=dict)
    micro_batch: int | None = None
    """None: that of the whole table."""
    engine: bool = False
    """Whether Transformer Engine is on its path; Megatron then takes its fused Adam, whatever the layers are."""
    large_data: bool = False
    """Whether it reads a shard of gigabytes, made on the spot."""


def without(fusion: str) -> tuple[str, ...]:
    """Flags of ours with one fusion left out."""
    left = ",".join(name for name in ("norm", "rotary", "swiglu", "loss") if name != fusion)
    return (*LOCAL, "--kaiyuan-fusions", left)


STEADY = ("--kaiyuan-raise-branch-scale-below", "0")
UNSCALED = ("--kaiyuan-branch-scale-bits", "0", *STEADY)
STOCK_LOCAL = LOCAL + UNFUSED + NATIVE_LOSS
OURS_TE = Row("te", "ours, Transformer Engine, FP16", ENGINE, engine=True)
STOCK_TE = Row(
    "testock", "stock, Transformer Engine, native loss fusion, bf16", ENGINE + UNFUSED + NATIVE_LOSS, STOCK | BF16,
    engine=True,
)  # fmt: skip
GROUPS = {
    "headline": (
        Row("stocktorch", "stock, local, SDPA in torch's order, bf16", STOCK_LOCAL + TORCH_ORDER, STOCK | BF16),
        Row("stock", "stock, local, SDPA in our order, bf16", STOCK_LOCAL, STOCK | BF16),
        Row("ours", "ours, local, FP16"),
        Row("oursbf", "ours, local, bf16", LOCAL, BF16),
        OURS_TE,
        STOCK_TE,
    ),
    "monitor": (
        Row("nomonitor", "ours, activations never metered", (*LOCAL, "--kaiyuan-activation-interval", "0")),
        Row("monitor1", "ours, activations metered at every step", (*LOCAL, "--kaiyuan-activation-interval", "1")),
        Row("data", "ours, with timers, a shard of gigabytes", (*LOCAL, *TIMERS), large_data=True),
    ),
    "engine": (
        OURS_TE,
        STOCK_TE,
        Row("oursteadam", "ours, local, FP16, TE's fused Adam", engine=True),
        Row("stockteadam", "stock, local, SDPA in our order, bf16, TE's fused Adam", STOCK_LOCAL, STOCK | BF16,
            engine=True),
        Row("bfflash", "ours, local, bf16, SDPA without cuDNN", (*LOCAL, "--kaiyuan-attention", "sdpa-flash"), BF16),
        Row("tebf", "ours, Transformer Engine, bf16", ENGINE, BF16, engine=True),
        Row("terecswiglu", "ours, TE, SwiGLU recomputed", (*ENGINE, "--kaiyuan-recompute-swiglu"), engine=True),
        Row("teunscaled", "ours, TE, branches not scaled", ENGINE + UNSCALED, engine=True),
    ),
    "variants": (
        Row("unscaled", "ours, branches not scaled", LOCAL + UNSCALED),
        Row("recswiglu", "ours, SwiGLU's output recomputed", (*LOCAL, "--kaiyuan-recompute-swiglu")),
        Row("documents", "ours, documents kept apart", LOCAL + APART),
        Row("stock16", "stock, local, SDPA in our order, FP16", STOCK_LOCAL, STOCK),
        Row("graphs", "ours, local CUDA graphs", (*LOCAL, *STEADY, "--cuda-graph-impl", "local")),
        Row("selective", "ours, attention recomputed", LOCAL + SELECTIVE),
        Row("recmlp", "ours, MLPs recomputed", (*LOCAL, *SELECTIVE, "--recompute-modules", "mlp")),
    ),
    "micro": (
        Row("mb1", "ours, micro-batch 1", micro_batch=1),
        Row("mb2", "ours, micro-batch 2", micro_batch=2),
        Row("mb4", "ours, micro-batch 4", micro_batch=4),
        Row("mb8", "ours, micro-batch 8", micro_batch=8),
        Row("mb16", "ours, micro-batch 16", micro_batch=16),
        Row("mb16full", "ours, micro-batch 16, all layers recomputed", LOCAL + FULL_RECOMPUTE, micro_batch=16),
        *(Row(f"stockmb{size}", f"stock in torch's order, bf16, micro-batch {size}", STOCK_LOCAL + TORCH_ORDER,
              STOCK | BF16, size) for size in (1, 2, 4)),
    ),
    "fusions": (
        *(Row(f"no{name}", f"ours, without the fusion {name}", without(name)) for name in
          ("norm", "rotary", "swiglu", "loss")),
        Row("nowgrad", "ours, weight gradients unfused", (*LOCAL, "--no-gradient-accumulation-fusion")),
        Row("torchorder", "ours, SDPA in torch's order", LOCAL + TORCH_ORDER),
        Row("unfused", "ours, no fusion at all", LOCAL + UNFUSED),
    ),
    "slow": (
        Row("naive", "stock, local, unfused attention, bf16",
            LOCAL + UNFUSED + ("--kaiyuan-attention", "unfused"), STOCK | BF16, 1),
    ),
}  # fmt: skip
ROWS = tuple({row.key: row for group in GROUPS.values() for row in group}.values())
