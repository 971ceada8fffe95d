"""Models from Megatron's command lines: its own and ours, from the same initial random state.

Megatron is imported inside the functions: the test process itself must stay free of the CPU platform.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from copy import copy
from io import StringIO
from typing import Any

import torch
from torch import Tensor

from tests.unit_tests.model.tiny import portable

VOCABULARY, LENGTH, BATCH = 64, 16, 2
COMMAND = f"""--num-layers 2 --hidden-size 32 --num-attention-heads 4 --group-query-attention --num-query-groups 2
--ffn-hidden-size 48 --swiglu --disable-bias-linear --normalization RMSNorm --norm-epsilon 1e-6
--position-embedding-type rope --seq-length {LENGTH} --max-position-embeddings {LENGTH}
--untie-embeddings-and-output-weights --micro-batch-size {BATCH} --train-iters 1 --lr 1e-3 --mock-data
--tokenizer-type NullTokenizer --vocab-size {VOCABULARY - 1} --make-vocab-size-divisible-by {VOCABULARY}
--attention-dropout 0 --hidden-dropout 0 --transformer-impl local"""
FEATURES_OFF = "--kaiyuan-attention unfused --kaiyuan-fusions none"
FUSED = "--kaiyuan-fusions norm,rotary,swiglu"


def arguments_of(words: str) -> argparse.Namespace:
    """What Megatron's parser and validation make of `COMMAND` and more words.

    A word `minus:FLAG` takes a flag without value out of `COMMAND`.
    """
    from megatron.training.arguments import parse_args, validate_args

    from megatron_kaiyuan.arguments import arguments_provider
    from megatron_kaiyuan.host.cpu_platform import CPU_ARGUMENT_DEFAULTS

    removed = {word.removeprefix("minus:") for word in words.split() if word.startswith("minus:")}
    more = [word for word in words.split() if not word.startswith("minus:")]
    sys.argv = ["pretrain", *(word for word in COMMAND.split() if word not in removed), *more]
    with redirect_stdout(StringIO()):
        arguments = parse_args(extra_args_provider=arguments_provider(CPU_ARGUMENT_DEFAULTS))
        validate_args(arguments)
    arguments.padded_vocab_size = VOCABULARY
    return arguments


def build_stage(words: str) -> Any:
    """Build this rank's stage with our builder."""
    return _build(arguments_of(words), stock=False)


def _build(arguments: argparse.Namespace, *, stock: bool) -> Any:
    """Build with Megatron's own config class and builder, none of our code, or with ours; from the same seed."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.module import Float16Module
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.models.gpt import GPTModelBuilder

    from megatron_kaiyuan.model.builder import kaiyuan_builder

    torch.manual_seed(5)
    model_parallel_cuda_manual_seed(5)
    ends: dict[str, Any] = {
        "pre_process": parallel_state.is_pipeline_first_stage(),
        "post_process": parallel_state.is_pipeline_last_stage(),
    }
    if stock:
        groups = ProcessGroupCollection.use_mpu_process_groups()
        model = GPTModelBuilder(gpt_config_from_args(arguments)).build_model(groups, **ends)
    else:
        model = kaiyuan_builder(arguments, **ends)
    return Float16Module(model.config, model) if arguments.fp16 else model


def _with_flags(arguments: argparse.Namespace, flags: str) -> argparse.Namespace:
    """The same arguments with some flags of ours: Megatron's parser takes a while."""
    from megatron_kaiyuan.arguments import add_kaiyuan_arguments

    ours = add_kaiyuan_arguments(argparse.ArgumentParser()).parse_args(flags.split())
    return argparse.Namespace(**(vars(arguments) | vars(ours)))


def random_text(rank: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, positions and labels of a batch, [b, s]."""
    generator = torch.Generator().manual_seed(3 + rank)
    text = torch.randint(VOCABULARY - 1, (BATCH, LENGTH + 1), generator=generator)
    return text[:, :-1].contiguous(), torch.arange(LENGTH).expand(BATCH, LENGTH), text[:, 1:].contiguous()


def step(model: Any, rank: int = 0) -> dict[str, Tensor]:
    """Loss of each token, initial weights and their gradients after one pass over a random batch."""
    tokens, positions, labels = random_text(rank)
    torch.manual_seed(9)
    loss = model(tokens, positions, None, labels=labels, loss_mask=torch.ones(labels.shape))
    loss.float().mean().backward()
    seen = {"loss": loss.detach()}
    for name, parameter in model.named_parameters():
        seen[f"weight {name}"] = parameter.detach().clone()
        if parameter.grad is not None:
            seen[f"gradient {name}"] = parameter.grad
    return seen


def compare(
    rank: int, command_lines: Sequence[str], ours: Sequence[str], layout: dict[str, int] | None
) -> dict[str, Any]:
    """Entry of `run_distributed`: the steps of stock Megatron, and of ours with each of some flags more.

    Ranks see the same batch, but for expert parallelism, whose ranks see one each. Without a layout, that of the
    process groups is kept.
    """
    from megatron.core import parallel_state

    if layout is not None:
        parallel_state.initialize_model_parallel(**layout)
    own = rank if (layout or {}).get("expert_model_parallel_size", 1) > 1 else 0
    arguments = {words: arguments_of(words) for words in command_lines}
    undo = norms_know_sequence_parallelism()
    results: dict[str, Any] = {}
    for words in command_lines:
        results[words] = {"stock": portable(step(_build(copy(arguments[words]), stock=True), own))}
    undo()
    for words in command_lines:
        for flags in ours:
            model = _build(_with_flags(arguments[words], flags), stock=False)
            results[words][flags] = portable(step(model, own))
    return results


def norms_know_sequence_parallelism() -> Callable[[], None]:
    """Let Megatron's local RMSNorm pass its own check of sequence parallelism; returns what undoes that.

    The check is there because the norm does not mark its gain, whose gradient is then summed over the tokens of one
    rank only. Forward pass and all other gradients are right.
    """
    from megatron.core.transformer import torch_norm

    original = torch_norm.WrappedTorchNorm.__new__

    def unchecked(cls: Any, config: Any, hidden_size: int, eps: float = 1e-5, **others: Any) -> Any:
        if config.sequence_parallel:
            return torch.nn.RMSNorm(hidden_size, eps=eps)
        return original(cls, config, hidden_size, eps, **others)

    torch_norm.WrappedTorchNorm.__new__ = unchecked

    def undo() -> None:
        torch_norm.WrappedTorchNorm.__new__ = original

    return undo


def marked_layer_spec(_config: Any) -> Any:
    """A layer spec as `--spec` names one, with an attention that can be told from others."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    marked = type("MarkedAttention", (DotProductAttention,), {})
    spec.submodules.self_attention.submodules.core_attention = marked
    return spec
