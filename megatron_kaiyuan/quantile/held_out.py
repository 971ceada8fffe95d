"""Held-out windows of a study, and which document each predicted token belongs to."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.data import HeldOutDataset, Plan
from megatron_kaiyuan.errors import PlanError, StudyError

__all__ = ["LEAST_HELD_OUT", "HeldOutDocuments"]

LEAST_HELD_OUT = 20
"""Documents of a held-out set; of fewer the spread between documents is not known."""


class HeldOutDocuments:
    """Held-out windows of one set, and which document each predicted token belongs to."""

    def __init__(self, plan: Plan, name: str, max_windows: int | None, *, least: int = LEAST_HELD_OUT) -> None:
        """Cut the windows.

        Args:
            plan: Names the set.
            name: Its name there.
            max_windows: Only so many from the first on; None: all.
            least: Documents that must have a part in them.

        Raises:
            StudyError: the documents do not fill one window, or too few of them come to be evaluated.
        """
        try:
            self._windows = HeldOutDataset(plan, name)
        except PlanError as error:
            runs = plan.opened[name].held_out_runs
            raise StudyError(
                f"evaluation.held_out.{name}: {runs.num_documents} documents have {runs.num_tokens} tokens, less than "
                f"one window of {plan.seq_length + 1}; hold out more"
            ) from error
        self.num_windows = min(len(self._windows), max_windows or len(self._windows))
        owners = [self._windows.documents(window) for window in range(self.num_windows)]
        numbers, inverse = np.unique(np.concatenate(owners), return_inverse=True)
        self.num_documents = len(numbers)
        self._document = inverse.reshape(self.num_windows, plan.seq_length)
        if self.num_documents < least:
            cut = self.num_windows < len(self._windows)
            remedy = "raise evaluation.max_windows, or leave it out" if cut else "hold out more"
            raise StudyError(
                f"evaluation.held_out.{name}: {self.num_windows} of {len(self._windows)} windows are evaluated, with "
                f"parts of {self.num_documents} documents, too few to tell the spread between documents; {least} are "
                f"needed: {remedy}"
            )

    def rows(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens of windows, int64 `[stop - start, seq_length + 1]`."""
        return np.stack([self._windows[window]["tokens"] for window in range(start, stop)])

    def sum_by_document(self, start: int, values: NDArray[Any]) -> NDArray[np.float64]:
        """Sums over the tokens of each document; `values` is `[windows, seq_length]` from window `start` on."""
        documents = self._document[start : start + len(values)]
        return np.bincount(documents.ravel(), weights=values.ravel(), minlength=self.num_documents)
