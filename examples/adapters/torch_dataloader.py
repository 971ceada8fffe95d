"""A plan's training order in a plain PyTorch DataLoader: no Megatron, no trainer of this package.

    python examples/adapters/torch_dataloader.py plan.yaml [consumed samples]

Several data-parallel ranks: give rank `r` of `n` the range `range(consumed + r, len(order), n)`.
"""

import sys
from collections.abc import Iterator

from torch import Tensor
from torch.utils.data import DataLoader, Subset

from megatron_kaiyuan.data import CurriculumDataset


def batches(plan: str, consumed_samples: int = 0, batch_size: int = 8) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and targets, int64 `[batch, seq_length]`, from any sample on.

    The order needs no state but the sample's number.
    """
    order = CurriculumDataset(plan)
    rest = Subset(order, range(consumed_samples, len(order)))
    for batch in DataLoader(rest, batch_size=batch_size, num_workers=2):  # no shuffle=True: the order is the point
        yield batch["tokens"][:, :-1], batch["tokens"][:, 1:]


if __name__ == "__main__":
    for number, (inputs, _) in enumerate(batches(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0)):
        print(f"batch {number}: {tuple(inputs.shape)}, first tokens {inputs[0, :5].tolist()}")
