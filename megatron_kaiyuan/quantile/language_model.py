"""A Megatron model behind lm-evaluation-harness's own interface. Needs the `eval` extra (`lm-eval`).

Shapes: b = requests of a batch, s = tokens of the longest of them, v = vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM

from megatron_kaiyuan.evaluation.generation import Sampling, sample_tokens

__all__ = ["MegatronLanguageModel"]

_Request = tuple[tuple[str, str], list[int], list[int]]


class MegatronLanguageModel(TemplateLM):
    """`loglikelihood`, `loglikelihood_rolling` and `generate_until` of a model that `training/loading.py` built."""

    def __init__(self, model: Any, tokenizer: Any, *, positions: int, batch_size: int) -> None:
        """Wrap a model.

        Args:
            model: In evaluation mode, called as `model(ids, positions, None)`, gives logits `[b, s, v]`.
            tokenizer: Hugging Face tokenizer with an end-of-text token.
            positions: Longest context, tokens; older tokens are forgotten.
            batch_size: Requests in one pass.
        """
        super().__init__()
        self._model, self.tokenizer = model, tokenizer
        self._positions, self._batch_size = positions, batch_size
        self._vocabulary = len(tokenizer)

    @property
    def eot_token_id(self) -> int:
        """Return the id of the end-of-text token, on which a text without context is conditioned."""
        return int(self.tokenizer.eos_token_id)

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's caches."""
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:  # noqa: FBT001
        """Token ids of a text, without special tokens around it."""
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=False)
        return ids

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:  # noqa: FBT001
        """Log likelihood of each continuation after its context, nats, and whether it is the greedy one."""
        scored: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return scored

    def _loglikelihood_tokens(self, requests: Sequence[_Request], **_: Any) -> list[tuple[float, bool]]:
        """Log likelihood of each continuation, nats, and whether it is the greedy one."""
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        # the longest first: an input that does not fit the memory fails at once, and neighbours need little padding
        order = sorted(range(len(requests)), key=lambda number: -len(requests[number][1]) - len(requests[number][2]))
        for start in range(0, len(order), self._batch_size):
            numbers = order[start : start + self._batch_size]
            pairs = [(requests[number][1], requests[number][2]) for number in numbers]
            for number, result in zip(numbers, self._score(pairs), strict=True):
                results[number] = result
        return results

    @torch.no_grad()
    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Score all pairs in one pass.

        Causal attention lets the padding stand behind.
        """
        inputs, sizes = [], []
        for context, continuation in pairs:
            whole = ((context or [self.eot_token_id]) + continuation)[-(self._positions + 1) :]
            inputs.append(whole)
            sizes.append(min(len(continuation), len(whole) - 1))
        width = max(len(whole) for whole in inputs) - 1
        ids_bs = torch.tensor([(whole[:-1] + [0] * width)[:width] for whole in inputs]).cuda()
        places_bs = torch.arange(width, device=ids_bs.device).expand_as(ids_bs)
        logits_bsv = self._model(ids_bs, places_bs, None)[..., : self._vocabulary]
        results = []
        for row, (whole, size) in enumerate(zip(inputs, sizes, strict=True)):
            last = len(whole) - 1
            logits = logits_bsv[row, last - size : last].float()
            targets = torch.tensor(whole[len(whole) - size :], device=logits.device)
            chosen = torch.log_softmax(logits, dim=-1).gather(1, targets[:, None]).double().sum()
            results.append((float(chosen), bool((logits.argmax(dim=-1) == targets).all())))
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:  # noqa: FBT001
        """Log likelihood of whole texts, nats, each cut into windows that predict every token once."""
        results = []
        for request in requests:
            windows = [(("", ""), *window) for window in self._windows(self.tok_encode(request.args[0]))]
            results.append(sum(value for value, _ in self._loglikelihood_tokens(windows)))
        return results

    def _windows(self, ids: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        """Yield context and continuation of each window.

        The last one keeps as much context as fits.
        """
        whole = [self.eot_token_id, *ids]
        for first in range(1, len(whole), self._positions):
            last = min(first + self._positions, len(whole))
            yield whole[max(0, last - self._positions - 1) : first], whole[first:last]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:  # noqa: FBT001
        """The likeliest continuation of each context, up to the first of its stop texts."""
        return [self._generate(*request.args) for request in requests]

    def _generate(self, context: str, settings: dict[str, Any]) -> str:
        stops = settings.get("until") or []
        stops = [stops] if isinstance(stops, str) else stops
        sampling = Sampling(temperature=0.0, max_new_tokens=int(settings.get("max_gen_toks", 256)))
        ids = self.tok_encode(context)[-self._positions :] or [self.eot_token_id]
        new = sample_tokens(
            self._model, ids, sampling, positions=self._positions, vocabulary=self._vocabulary, end=self.eot_token_id
        )
        text: str = self.tokenizer.decode(new)
        ends = [text.find(stop) for stop in stops if stop and stop in text]
        return text[: min(ends)] if ends else text
