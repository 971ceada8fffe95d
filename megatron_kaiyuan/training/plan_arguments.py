"""What a plan decides of Megatron's arguments, and where the two must agree."""

import argparse
from typing import Any

from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.shards.manifest import TokenizerRecord
from megatron_kaiyuan.shards.tokenizer_match import built_with, find_mismatch
from megatron_kaiyuan.training.longer_windows import check_longer_windows
from megatron_kaiyuan.training.scheduler import plan_has_learning_rate

__all__ = [
    "check_plan_arguments",
    "check_tokenizer_of_shards",
    "plan_argument_defaults",
    "plan_parser_defaults",
]


def plan_parser_defaults() -> dict[str, object]:
    """Defaults of Megatron's parser that differ in runs with a plan."""
    # Causal attention needs no mask, and one is seq_length^2 bytes a sample.
    return {"create_attention_mask_in_dataloader": False}


def plan_argument_defaults(
    args: argparse.Namespace, plan: Plan, saved: argparse.Namespace | None, record: TokenizerRecord | None
) -> dict[str, Any]:
    """Return values for the arguments that the command line leaves open.

    Args:
        args: Parsed, not yet validated.
        plan: The plan of the run.
        saved: Arguments of the run to continue, if there is one.
        record: The tokenizer of the plan's shards, if they name one.

    Raises:
        ConfigError: no tokenizer is given and the shards do not record the size of their vocabulary, or `--seq-length`
            is not the plan's.
    """
    if args.seq_length is not None:
        _check_seq_length(args, plan)
    values: dict[str, Any] = {"seq_length": plan.seq_length, "max_position_embeddings": plan.longest}
    if args.train_iters is None:
        values["train_samples"] = plan.num_samples
    if plan_has_learning_rate(plan):
        # Megatron matches parameter groups of a checkpoint by this value: later phases must not change it.
        values["lr"] = _peak_learning_rate(plan) if saved is None else saved.lr
    values.update(_tokenizer_defaults(args, record))
    return {name: value for name, value in values.items() if getattr(args, name) is None}


def _peak_learning_rate(plan: Plan) -> float:
    return max(max(phase.lr.start, phase.lr.end) for phase in plan.phases if phase.lr is not None)


def _tokenizer_defaults(args: argparse.Namespace, record: TokenizerRecord | None) -> dict[str, Any]:
    """Training on a plan turns no text into tokens: vocabulary size and end-of-document id are all it needs to know."""
    if args.tokenizer_type is not None:
        return {}
    if record is None and args.vocab_size is None:
        raise ConfigError(
            "the size of the vocabulary is unknown: the shards of the plan have no manifest; "
            "give --vocab-size N, or --tokenizer-type and --tokenizer-model"
        )
    if record is None:
        return {"tokenizer_type": "NullTokenizer"}
    return {
        "tokenizer_type": "NullTokenizer",
        "vocab_size": record.vocab_size,
        "null_tokenizer_eod_id": record.eod_id,
    }


def check_tokenizer_of_shards(args: argparse.Namespace, record: TokenizerRecord | None, eod_id: int | None) -> None:
    """Refuse a tokenizer that the command line names and that did not make the tokens of the plan.

    A `NullTokenizer` stands for any: only `--null-tokenizer-eod-id`, where it is given, is compared. Shards without a
    manifest cannot be compared.

    Args:
        args: Validated arguments.
        record: The tokenizer of the plan's shards, if they name one.
        eod_id: End-of-document id of the tokenizer that Megatron built from the arguments.

    Raises:
        ConfigError: its content, or the id that ends a document, is another one.
    """
    if record is None:
        return
    difference = None
    if args.tokenizer_type == "NullTokenizer":
        named, eod_id = f"--null-tokenizer-eod-id {args.null_tokenizer_eod_id}", args.null_tokenizer_eod_id
        remedy = "leave --null-tokenizer-eod-id out, with --tokenizer-type, to take it from their manifests"
    else:
        named = f"--tokenizer-type {args.tokenizer_type} --tokenizer-model {args.tokenizer_model}"
        remedy = "leave --tokenizer-type out to take it from their manifests, or name the tokenizer of the shards"
        mismatch = find_mismatch(args.tokenizer_type, args.tokenizer_model, record, _options_of_ids(args))
        difference = None if mismatch is None else mismatch.reason
    if difference is None and None not in (eod_id, record.eod_id) and eod_id != record.eod_id:
        difference = f"documents end with id {eod_id} there, and with {record.eod_id} in the shards"
    if difference is not None:
        raise ConfigError(f"{named}: {difference}. The shards of the plan were {built_with(record)}; {remedy}")


def _options_of_ids(args: argparse.Namespace) -> dict[str, Any]:
    if args.tokenizer_type != "TikTokenizer":
        return {}
    return {
        "vocab_size": args.vocab_size,
        "tiktoken_pattern": args.tiktoken_pattern or "v2",
        "tiktoken_num_special_tokens": args.tiktoken_num_special_tokens,
    }


def check_plan_arguments(args: argparse.Namespace, plan: Plan) -> None:
    """Compare the validated arguments with the plan.

    Raises:
        ConfigError: names the flag, both values and the remedy.
        PlanError: the held-out documents of a source do not fill a window.
    """
    _check_seq_length(args, plan)
    if args.dataloader_type != "single":
        raise ConfigError(
            f"--dataloader-type {args.dataloader_type} has an order of its own; a plan needs --dataloader-type single"
        )
    check_longer_windows(args, plan)
    _check_length(args, plan)
    _check_validation(args, plan)


def _check_seq_length(args: argparse.Namespace, plan: Plan) -> None:
    if args.seq_length != plan.seq_length:
        raise ConfigError(
            f"--seq-length {args.seq_length}, but the plan cuts its samples to seq_length {plan.seq_length}; "
            "make them equal, or leave --seq-length out"
        )


def _check_length(args: argparse.Namespace, plan: Plan) -> None:
    """The run must see the whole plan, but for the samples that do not fill a last batch."""
    batch = args.global_batch_size
    whole_steps = plan.num_samples // batch
    if whole_steps == 0:
        raise ConfigError(f"the plan has {counted(plan.num_samples, 'sample')}, fewer than --global-batch-size {batch}")
    if args.train_iters is not None and not args.train_samples:
        wanted = args.train_iters * batch
        flag = f"--train-iters {args.train_iters} x --global-batch-size {batch} = {counted(wanted, 'sample')}"
    else:
        wanted = args.train_samples
        flag = f"--train-samples {wanted}"
    if wanted // batch != whole_steps:
        remedy = (
            "repeat more in the plan or train less" if wanted > plan.num_samples else "--exit-interval to stop early"
        )
        raise ConfigError(
            f"{flag}, but the plan has {counted(plan.num_samples, 'sample')} ({counted(whole_steps, 'step')} of "
            f"{batch}): {remedy}, or leave "
            "--train-iters and --train-samples out to run the whole plan"
        )


def _check_validation(args: argparse.Namespace, plan: Plan) -> None:
    if args.full_validation and not plan.validation:
        raise ConfigError("--full-validation, but the plan holds out no documents; add a validation section to it")
