"""Held-out windows of a study, and which document each predicted token belongs to."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.data import HeldOutDataset, Plan
from megatron_kaiyuan.documents import groups
from megatron_kaiyuan.errors import PlanError, ScoreError, StudyError
from megatron_kaiyuan.host.terminal import counted

__all__ = ["LEAST_GROUPS", "LEAST_HELD_OUT", "HeldOutDocuments", "group_numbers"]

LEAST_GROUPS = 10
"""Groups of the documents of a held-out set; of fewer the spread between groups is not known."""
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
                f"evaluation.held_out.{name}: {counted(runs.num_documents, 'document')} have "
                f"{counted(runs.num_tokens, 'token')}, less than "
                f"one window of {plan.seq_length + 1}; hold out more"
            ) from error
        self.num_windows = min(len(self._windows), max_windows or len(self._windows))
        owners = [self._windows.documents(window) for window in range(self.num_windows)]
        numbers, inverse = np.unique(np.concatenate(owners), return_inverse=True)
        self._numbers = np.asarray(numbers, dtype=np.int64)
        self.num_documents = len(numbers)
        self._document = inverse.reshape(self.num_windows, plan.seq_length)
        if self.num_documents < least:
            cut = self.num_windows < len(self._windows)
            remedy = "raise evaluation.max_windows, or leave it out" if cut else "hold out more"
            raise StudyError(
                f"evaluation.held_out.{name}: {self.num_windows} of {counted(len(self._windows), 'window')} are "
                "evaluated, with "
                f"parts of {counted(self.num_documents, 'document')}, too few to tell the spread between documents; "
                f"{least} are "
                f"needed: {remedy}"
            )

    @property
    def documents(self) -> NDArray[np.int64]:
        """Numbers in their source of the documents that come to be evaluated, ascending, `[num_documents]`."""
        return self._numbers

    def rows(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens of windows, int64 `[stop - start, seq_length + 1]`."""
        return np.stack([self._windows[window]["tokens"] for window in range(start, stop)])

    def sum_by_document(self, start: int, values: NDArray[Any]) -> NDArray[np.float64]:
        """Return the sums over the tokens of each document.

        `values` is `[windows, seq_length]` from window `start` on.
        """
        documents = self._document[start : start + len(values)]
        return np.bincount(documents.ravel(), weights=values.ravel(), minlength=self.num_documents)


def group_numbers(plan: Plan, name: str, sidecar: str, documents: NDArray[np.int64]) -> tuple[int, ...]:
    """Return the group of each document, from a score sidecar of the set.

    Raises:
        StudyError: the sidecar is missing, its numbers are not whole, or there are too few groups.
    """
    place = f"evaluation.held_out.{name}.groups"
    try:
        numbers = groups.group_numbers(plan.opened[name].source, sidecar, documents)
    except (ScoreError, PlanError) as error:
        raise StudyError(f"{place}: {error}") from error
    found = len(np.unique(numbers))
    if found < LEAST_GROUPS:
        raise StudyError(
            f"{place}: {counted(len(documents), 'document')} are of {counted(found, 'group')}, too few to tell the "
            "spread "
            f"between groups; {LEAST_GROUPS} are needed: hold out more documents, or documents of more groups"
        )
    return tuple(numbers.tolist())
