"""A plan's training order as the datasets provider of stock Megatron-LM, for its own pretrain_gpt.py.

    from megatron_provider import PlanProvider
    pretrain(PlanProvider("plan.yaml", "web"), model_provider, ModelType.encoder_or_decoder, forward_step)

Run it with `--dataloader-type single` (the default; it resumes at `consumed_train_samples`), `--seq-length` equal to
the plan's, at most the plan's number of samples, and without `--reset-position-ids` and its relatives.
"""

import torch
from megatron.core.datasets.utils import Split
from torch.utils.data import Dataset

from megatron_kaiyuan.data import CurriculumDataset, HeldOutDataset


class Samples(Dataset[dict[str, torch.Tensor]]):
    """Windows as the samples that Megatron's forward step for GPT takes.

    Each tensor is `[seq_length]`.
    """

    def __init__(self, windows: CurriculumDataset | HeldOutDataset, split: Split, length: int) -> None:
        self.windows, self.split, self.length = windows, split, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = torch.from_numpy(self.windows[index % len(self.windows)]["tokens"])
        ones, positions = torch.ones(len(window) - 1), torch.arange(len(window) - 1)
        return {"tokens": window[:-1], "labels": window[1:], "loss_mask": ones, "position_ids": positions}


class PlanProvider:
    """Provider of a plan's samples, called by Megatron with the number of samples it wants.

    Opening a plan builds no index, so no rank waits for another.
    """

    def __init__(self, plan: str, held_out: str) -> None:
        self.plan, self.held_out = plan, held_out

    def __call__(self, num_samples: tuple[int, int, int], vp_stage: int | None = None) -> tuple[Samples, Samples, None]:
        """Return train, validation and no test samples.

        Validation repeats its windows as often as the loop asks.
        """
        order = CurriculumDataset(self.plan)
        held_out = HeldOutDataset(order.plan, self.held_out)
        return Samples(order, Split.train, len(order)), Samples(held_out, Split.valid, num_samples[1]), None
