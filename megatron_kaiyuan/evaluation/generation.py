"""Continue a text with a trained model: a plain sampling loop that runs the whole context at every step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_kaiyuan.checkpoints.tokenizer import CheckpointTokenizer
from megatron_kaiyuan.errors import ConfigError

__all__ = ["Sampling", "continue_text", "sample_next", "sample_tokens"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is drawn.

    Raises:
        ConfigError: a value out of its range.
    """

    temperature: float = 0.8
    """Divides the logits; 0 = always the likeliest token."""
    top_k: int = 0
    """Draw among this many likeliest tokens; 0 = among all."""
    max_new_tokens: int = 64
    """Longest continuation, tokens."""
    seed: int = 1234
    """The same seed gives the same text on the same machine."""

    def __post_init__(self) -> None:
        if not (0.0 <= self.temperature < float("inf")):
            raise ConfigError(f"--temperature must be 0 or a positive number, got {self.temperature}")
        if self.top_k < 0:
            raise ConfigError(f"--top-k must be 0 (off) or a positive number, got {self.top_k}")
        if self.max_new_tokens < 1:
            raise ConfigError(f"--max-new-tokens must be at least 1, got {self.max_new_tokens}")


def sample_next(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw one token.

    Args:
        logits: float32 `[vocabulary]` on the CPU.
        sampling: How to draw.
        generator: Source of randomness; not used at temperature 0.
    """
    if sampling.temperature == 0.0:
        return int(logits.argmax())
    scaled = logits / sampling.temperature
    if 0 < sampling.top_k < len(scaled):
        values, candidates = torch.topk(scaled, sampling.top_k)
        choice = torch.multinomial(torch.softmax(values, dim=-1), 1, generator=generator)
        return int(candidates[choice])
    return int(torch.multinomial(torch.softmax(scaled, dim=-1), 1, generator=generator))


@torch.no_grad()
def sample_tokens(
    model: Any, context: Sequence[int], sampling: Sampling, *, positions: int, vocabulary: int, end: int | None
) -> list[int]:
    """Tokens that follow a context.

    Args:
        model: In evaluation mode.
        context: Token ids, at least one.
        sampling: How to draw.
        positions: Longest context the model takes; older tokens are forgotten.
        vocabulary: Ids from here on are padding of the embedding and never drawn.
        end: Id that ends the text and is left out; None: none does.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    ids = list(context)
    for _ in range(sampling.max_new_tokens):
        window = torch.tensor([ids[-positions:]]).cuda()
        places = torch.arange(window.shape[1], device=window.device)[None]
        logits = model(window, places, None)[0, -1, :vocabulary].float().cpu()
        following = sample_next(logits, sampling, generator)
        if following == end:
            break
        ids.append(following)
    return ids[len(context) :]


def continue_text(model: Any, tokenizer: CheckpointTokenizer, prompt: str, sampling: Sampling, positions: int) -> str:
    """Continuation of a prompt, without the prompt.

    Raises:
        ConfigError: the prompt is empty and the tokenizer has no end-of-text token to begin with.
    """
    context = tokenizer.prompt(prompt)
    if not context and tokenizer.end is None:
        raise ConfigError("--prompt is empty, and the tokenizer has no end-of-text token to begin a text with")
    if not context and tokenizer.end is not None:
        context = [tokenizer.end]
    vocabulary = tokenizer.tokenizer.vocab_size
    new = sample_tokens(model, context, sampling, positions=positions, vocabulary=vocabulary, end=tokenizer.end)
    return tokenizer.tokenizer.decode(new)
