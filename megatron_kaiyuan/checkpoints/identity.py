"""What makes two checkpoints those of one run, beside the order of its samples: seed, tokenizer and model."""

import argparse
import hashlib

from megatron_kaiyuan.errors import ResumeError
from megatron_kaiyuan.shards.manifest import TokenizerRecord

__all__ = [
    "AVERAGING",
    "COMMAND_LINE_TOKENIZER",
    "PLAN_RECORD",
    "TOKENIZER",
    "check_same_run",
    "first_difference",
    "store_tokenizer",
]

TOKENIZER = "kaiyuan_tokenizer"
"""Name of the argument that holds a fingerprint of what the tokenizer does; None where nothing tells."""

COMMAND_LINE_TOKENIZER = "kaiyuan_command_line_tokenizer"
"""What a tokenizer that the command line names does; apart from it, for manifests may be added to the shards later."""

PLAN_RECORD = "kaiyuan_plan_record"
"""Name of the argument that holds `Plan.order_record()`."""

AVERAGING = "kaiyuan_averaging"
"""Name of the argument that holds which iterations the plan averages; `tools/average_checkpoints.py --planned`."""

_FLAGS = {
    "seed": "--seed",
    TOKENIZER: "the tokenizer (its fingerprint)",
    COMMAND_LINE_TOKENIZER: "--tokenizer-model (the fingerprint of what it does)",
    "num_layers": "--num-layers",
    "hidden_size": "--hidden-size",
    "ffn_hidden_size": "--ffn-hidden-size",
    "num_attention_heads": "--num-attention-heads",
    "group_query_attention": "--group-query-attention",
    "kv_channels": "--kv-channels",
    "position_embedding_type": "--position-embedding-type",
    "rotary_base": "--rotary-base",
    "rotary_percent": "--rotary-percent",
    "normalization": "--normalization",
    "norm_epsilon": "--norm-epsilon",
    "layernorm_epsilon": "--norm-epsilon",
    "swiglu": "--swiglu",
    "add_bias_linear": "--disable-bias-linear",
    "qk_layernorm": "--qk-layernorm",
    "untie_embeddings_and_output_weights": "--untie-embeddings-and-output-weights",
    "kaiyuan_sandwich_norm": "--kaiyuan-sandwich-norm",
    "kaiyuan_logit_softcap": "--kaiyuan-logit-softcap",
}
_PROBE = "The 3 naïve Zürich engineers’ café: def f(x):\n\treturn x ** 2.5  # 数据\n\n«да»   end"


def store_tokenizer(
    args: argparse.Namespace, record: TokenizerRecord | None, tokenizer: object, *, planned: bool
) -> None:
    """Let every checkpoint of this run say what its tokenizer does.

    A plan's tokens come from its shards, of which stock Megatron's do not tell: they have no manifest. The tokenizer of
    the command line is asked for the ids of a text as well. Paths are no part.

    Args:
        args: Where it is stored.
        record: The tokenizer of the plan's shards, if they tell.
        tokenizer: The one that Megatron built from the arguments.
        planned: Whether the run has a plan.
    """
    told = _of_text(tokenizer)
    of_shards = None if record is None else record.fingerprint
    setattr(args, TOKENIZER, of_shards if planned else told)
    setattr(args, COMMAND_LINE_TOKENIZER, told if planned else None)


def _of_text(tokenizer: object) -> str | None:
    try:
        ids = tokenizer.tokenize(_PROBE)  # type: ignore[attr-defined]  # Megatron's base class is not exported
    except (ValueError, NotImplementedError):  # a NullTokenizer reads numbers
        return None
    return hashlib.sha256(repr(list(ids)).encode()).hexdigest()


def first_difference(one: argparse.Namespace, other: argparse.Namespace) -> str | None:
    """The first flag in which two runs differ, with both values; None if they may be the same run."""
    flags = dict(_FLAGS)
    if getattr(one, "group_query_attention", False):  # else Megatron changes the number while it builds the model
        flags["num_query_groups"] = "--num-query-groups"
    for name, flag in flags.items():
        before, now = getattr(one, name, None), getattr(other, name, None)
        if before is not None and now is not None and before != now:
            return f"{flag} was {before} and is now {now}"
    return None


def check_same_run(args: argparse.Namespace, saved: argparse.Namespace | None) -> None:
    """Refuse to continue a run with another seed, tokenizer or model.

    Args:
        args: Validated arguments, `store_tokenizer` included.
        saved: Arguments of the run to continue, if there is one.

    Raises:
        ResumeError: names the flag and both values.
    """
    difference = None if saved is None else first_difference(saved, args)
    if difference is not None:
        raise ResumeError(
            f"--load {args.load}: {difference}. Restore it to continue that run; for a new one leave --load out (or "
            "add --finetune to start from these weights, where they fit) and name another --save directory"
        )
