"""Loss and tokens of a run by source and by quantile band, summed on the device between two log lines.

Megatron's own loss dictionary cannot hold them: a source that does not occur in a step would be 0 / 0, which Megatron
counts as a NaN iteration. Here the sums are kept, added over all ranks once a log line, and divided then.

Shapes: n = sources, q = quantile bands, b = micro-batch, s = sequence on this context-parallel rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_kaiyuan.data import NUM_BANDS

__all__ = ["NUM_BANDS", "SourceCounters", "SourceSums"]


@dataclass(frozen=True, slots=True)
class SourceSums:
    """What one source contributed since the last log line, all ranks together."""

    loss_sum: float
    """Sum of the token losses that count, nats."""
    tokens: int
    """Predicted tokens that count."""
    bands: tuple[int, ...]
    """Tokens by quantile band of the document they are from, lowest scores first; all zero for an unscored source."""

    @property
    def loss(self) -> float | None:
        """Return the mean loss in nats a token, None where no token was seen."""
        return self.loss_sum / self.tokens if self.tokens else None


class SourceCounters:
    """Sums on this rank's device, in float64 so that counts stay exact far beyond any run's interval."""

    def __init__(self, sources: Sequence[str]) -> None:
        self.sources = tuple(sources)
        self._sums: Tensor | None = None  # [n, 2 + q], made where the first batch is

    def add(self, source_ids: Tensor, band_tokens: Tensor, losses: Tensor, loss_mask: Tensor) -> None:
        """Count a micro-batch.

        Args:
            source_ids: int64 [b].
            band_tokens: int64 [b, q]; zeros on all but the first context-parallel rank.
            losses: Loss of each token, [b, s].
            loss_mask: 1 for tokens that count, [b, s].
        """
        sums = self._device_sums(losses.device)
        mask = loss_mask.detach().double()
        weighted = torch.where(mask == 0, 0.0, losses.detach().double() * mask)
        rows = torch.stack((weighted.sum(dim=1), mask.sum(dim=1)), dim=1)
        sums.index_add_(0, source_ids.to(sums.device), torch.cat((rows, band_tokens.to(sums)), dim=1))

    def take(self) -> dict[str, SourceSums]:
        """Return sums over all ranks since the last call, by source.

        Every rank has to call this, and all get the same.
        """
        device = torch.device("cuda", torch.cuda.current_device()) if self._sums is None else self._sums.device
        sums = self._device_sums(device)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        rows = sums.tolist()
        sums.zero_()
        return {
            name: SourceSums(row[0], round(row[1]), tuple(round(tokens) for tokens in row[2:]))
            for name, row in zip(self.sources, rows, strict=True)
        }

    def _device_sums(self, device: torch.device) -> Tensor:
        if self._sums is None:
            self._sums = torch.zeros(len(self.sources), 2 + NUM_BANDS, dtype=torch.float64, device=device)
        return self._sums
