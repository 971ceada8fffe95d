"""Held-out windows of a study, and which document each predicted token belongs to."""

from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.data.stream import Stream
from megatron_kaiyuan.errors import StudyError

__all__ = ["HeldOutDocuments"]


class HeldOutDocuments:
    """Held-out windows of one set, and which document each predicted token belongs to."""

    def __init__(self, plan: Plan, name: str, max_windows: int | None) -> None:
        """Cut the windows.

        Raises:
            StudyError: they do not fill one window.
        """
        runs = plan.opened[name].held_out_runs
        self._stream = Stream(runs, 1, None, Fraction(1), plan.seq_length, ascending=False, key=0)
        self.num_windows = min(self._stream.num_windows, max_windows or self._stream.num_windows)
        if self.num_windows == 0:
            raise StudyError(
                f"evaluation.held_out.{name}: {runs.num_documents} documents have {runs.num_tokens} tokens, less than "
                f"one window of {plan.seq_length + 1}; hold out more"
            )
        owners = [self._owners(window) for window in range(self.num_windows)]
        numbers, inverse = np.unique(np.concatenate(owners), return_inverse=True)
        self.num_documents = len(numbers)
        self._document = inverse.reshape(self.num_windows, plan.seq_length)

    def _owners(self, window: int) -> NDArray[np.int64]:
        """The document, numbered within the source, of each predicted token of a window; int64 `[seq_length]`."""
        source = self._stream.selected.order.source
        segments = self._stream.segments(window)
        counts = [segment.stop - segment.start for segment in segments]
        return np.repeat([source.number(segment) for segment in segments], counts)[1:]

    def rows(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens of windows, int64 `[stop - start, seq_length + 1]`."""
        return np.stack([self._stream.read(window) for window in range(start, stop)])

    def sum_by_document(self, start: int, values: NDArray[Any]) -> NDArray[np.float64]:
        """Sums over the tokens of each document; `values` is `[windows, seq_length]` from window `start` on."""
        documents = self._document[start : start + len(values)]
        return np.bincount(documents.ravel(), weights=values.ravel(), minlength=self.num_documents)
