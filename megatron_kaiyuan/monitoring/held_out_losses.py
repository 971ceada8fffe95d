"""Loss on the held-out documents by source and by quantile band, summed on the device over one evaluation.

Shapes: n = sources, q = quantile bands, b = micro-batch, s = sequence on this context-parallel rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_kaiyuan.data import NUM_BANDS

__all__ = ["HeldOutLosses", "HeldOutSums"]


@dataclass(frozen=True, slots=True)
class HeldOutSums:
    """One source in one evaluation, all ranks together."""

    loss_sums: tuple[float, ...]
    """Sum of the token losses that count, nats, by band, lowest scores first, and last without one: `[q + 1]`."""
    tokens: tuple[int, ...]
    """Predicted tokens that count, likewise `[q + 1]`."""

    @property
    def loss(self) -> float | None:
        """Return the mean loss in nats a token, None where no token was seen."""
        total = sum(self.tokens)
        return sum(self.loss_sums) / total if total else None

    @property
    def bands(self) -> tuple[float | None, ...]:
        """Return the mean loss by band, `[q]`, None where no token of the band was seen."""
        pairs = zip(self.loss_sums[:NUM_BANDS], self.tokens[:NUM_BANDS], strict=True)
        return tuple(loss / tokens if tokens else None for loss, tokens in pairs)


class HeldOutLosses:
    """Sums on this rank's device, float64."""

    def __init__(self, sources: Sequence[str]) -> None:
        self.sources = tuple(sources)
        self._sums: Tensor | None = None  # [n * (q + 1), 2], made where the first batch is

    def add(self, source_ids: Tensor, bands: Tensor, losses: Tensor, loss_mask: Tensor) -> None:
        """Count a micro-batch.

        Args:
            source_ids: int64 `[b]`.
            bands: Quantile band of each predicted token, `[b, s]`; -1 where there is none.
            losses: Loss of each token, `[b, s]`.
            loss_mask: 1 for tokens that count, `[b, s]`.
        """
        sums = self._device_sums(losses.device)
        mask = loss_mask.detach().double()
        weighted = torch.where(mask == 0, 0.0, losses.detach().double() * mask)
        own = bands.to(sums.device).long()
        cells = source_ids.to(sums.device)[:, None] * (NUM_BANDS + 1) + torch.where(own < 0, NUM_BANDS, own)
        sums.index_add_(0, cells.reshape(-1), torch.stack((weighted.reshape(-1), mask.reshape(-1)), dim=1))

    def take(self) -> dict[str, HeldOutSums]:
        """Return sums over all ranks since the last call, by source.

        Every rank has to call this, and all get the same.
        """
        device = torch.device("cuda", torch.cuda.current_device()) if self._sums is None else self._sums.device
        sums = self._device_sums(device)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        cells = sums.view(len(self.sources), NUM_BANDS + 1, 2).tolist()
        sums.zero_()
        return {
            name: HeldOutSums(tuple(loss for loss, _ in rows), tuple(round(tokens) for _, tokens in rows))
            for name, rows in zip(self.sources, cells, strict=True)
        }

    def _device_sums(self, device: torch.device) -> Tensor:
        if self._sums is None:
            shape = (len(self.sources) * (NUM_BANDS + 1), 2)
            self._sums = torch.zeros(shape, dtype=torch.float64, device=device)
        return self._sums
