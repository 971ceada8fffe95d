"""Conditions under which an architecture flag would have no effect, or another one than it says.

All look at the arguments as parsed, not yet validated.
"""

import argparse
import importlib.util

from megatron_kaiyuan.flags.rules import Condition

__all__ = [
    "ENCODERS_POSITIONS",
    "FUSED_SWIGLU",
    "LOCAL",
    "LOCAL_AND_DENSE",
    "LOCAL_WITHOUT_APEX",
    "NOTHING_LOADED",
    "NO_SDPA",
    "QK_LAYERNORM",
    "RECOMPUTED_WITHOUT_TE",
    "RMS_NORM",
    "SDPA",
    "SQUARED_RELU",
    "gated",
    "rotates",
    "uses",
]

_RECOMPUTED_BY_TE = {"layernorm", "moe_act", "mla_up_proj"}


def uses(*names: str) -> "_Uses":
    """Return whether any of these arguments has a value that is on, as a function of the arguments."""
    return _Uses(names)


class _Uses:
    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def __call__(self, args: argparse.Namespace) -> bool:
        return any(getattr(args, name, None) not in (None, False, 0, "none") for name in self.names)


def rotates(args: argparse.Namespace) -> bool:
    """Return whether queries and keys are rotated."""
    return args.position_embedding_type in ("rope", "yarn") or args.use_rotary_position_embeddings


def gated(args: argparse.Namespace) -> bool:
    """Return whether the activation has a gate."""
    return bool(args.swiglu or args.quick_geglu)


def _is_local(args: argparse.Namespace) -> bool:
    return bool(args.transformer_impl == "local")


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _recomputes_by_te(args: argparse.Namespace) -> bool:
    return not _has("transformer_engine") and not _RECOMPUTED_BY_TE.isdisjoint(args.recompute_modules or ())


LOCAL = Condition("with --transformer-impl local", _is_local)
LOCAL_AND_DENSE = Condition(
    "with --transformer-impl local and no experts", lambda args: _is_local(args) and not args.num_experts
)
LOCAL_WITHOUT_APEX = Condition(
    "with --transformer-impl local and without the package apex", lambda args: _is_local(args) and not _has("apex")
)
RMS_NORM = Condition(
    "with --transformer-impl local and --normalization RMSNorm",
    lambda args: _is_local(args) and _has("apex") and args.normalization == "RMSNorm",
)
SDPA = Condition(
    "with --transformer-impl local and SDPA", lambda args: _is_local(args) and args.kaiyuan_attention != "unfused"
)
NO_SDPA = Condition("without SDPA", lambda args: not SDPA.holds(args))
NOTHING_LOADED = Condition(
    "without --load and --pretrained-checkpoint", lambda args: args.load is None and args.pretrained_checkpoint is None
)
QK_LAYERNORM = Condition("with --qk-layernorm", lambda args: bool(args.qk_layernorm))
SQUARED_RELU = Condition("with --squared-relu", lambda args: bool(args.squared_relu))
FUSED_SWIGLU = Condition("with Megatron's fused SwiGLU", lambda args: bool(args.swiglu and args.bias_swiglu_fusion))
ENCODERS_POSITIONS = Condition("in a text model", lambda args: args.position_embedding_type in ("mrope", "relative"))
RECOMPUTED_WITHOUT_TE = Condition("without the package transformer_engine", _recomputes_by_te)
