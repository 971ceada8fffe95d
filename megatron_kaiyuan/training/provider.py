"""Datasets of a plan, in the shape Megatron's loop asks for them."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.datasets.utils import Split
from megatron.training.utils import print_rank_0
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from megatron_kaiyuan.data import CurriculumDataset, HeldOutDataset, Plan
from megatron_kaiyuan.errors import ShardError
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.model.samples import SampleOptions, first_outside, make_sample, outside_vocabulary, part_of_sample
from megatron_kaiyuan.model.stages import loads_data
from megatron_kaiyuan.shards.source import Segment
from megatron_kaiyuan.training.document_ends import check_document_ends
from megatron_kaiyuan.training.longer_windows import SAMPLES_OF_WINDOW
from megatron_kaiyuan.training.plan_evaluations import EVERY_WINDOW

__all__ = ["HeldOutSamples", "PlanDatasetsProvider", "PlanSamples", "spread_evenly"]


class _Windows(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, NDArray[np.int64]]: ...

    def bands(self, index: int) -> NDArray[np.int8]: ...

    def segments(self, index: int) -> list[Segment]: ...


class PlanSamples(Dataset[dict[str, Tensor]]):
    """The samples of a plan in training order: `[s]` is sample `s`, whoever asks and when.

    Megatron's `single` data loader starts at `consumed_train_samples`, which is all that an exact resume needs.
    """

    split = Split.train

    def __init__(self, order: CurriculumDataset, options: SampleOptions) -> None:
        self.order = order
        self.options = options

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`make_sample` of the window, or of its part, and what the monitor counts by.

        `dataset_id` is the number of its source in the plan, int64 scalar; `band_tokens` its tokens by quantile band,
        int64 `[NUM_BANDS]`. Where phases differ in `seq_length`, `samples_of_window` counts the samples of its window.

        Raises:
            ShardError: it holds an id outside the vocabulary.
        """
        window = self.order[index]["tokens"]
        if (place := first_outside(window, self.options.vocabulary)) is not None:
            where = self.order.provenance(index)
            named = f"sample {index} (phase {where.phase!r}, source {where.source!r})"
            raise _outside(named, window, place, where.segments, self.options)
        several = self.order.plan.longest > self.order.plan.seq_length
        sample = self._part(index) if several else make_sample(window, self.options, self.order.padding(index))
        sample["dataset_id"] = _source_number(self.order.source_index(index))
        sample["band_tokens"] = torch.from_numpy(self.order.band_tokens(index))
        return sample

    def _part(self, index: int) -> dict[str, Tensor]:
        """What `make_sample` makes of a sample's part of its window."""
        place, count = self.order.place_in_window(index)
        whole, length = make_sample(self.order.window(index), self.options), self.order.plan.seq_length
        part = part_of_sample(whole, place * length, (place + 1) * length, self.order.padding(index))
        return part | {SAMPLES_OF_WINDOW: torch.tensor(count)}


def _outside(
    named: str, window: NDArray[np.int64], place: int, segments: Sequence[Segment], options: SampleOptions
) -> ShardError:
    """Return the error of a window whose id at `place` is outside the vocabulary."""
    ends = np.cumsum([segment.stop - segment.start for segment in segments])
    segment = segments[int(np.searchsorted(ends, place, side="right"))]
    assert options.vocabulary is not None, "without it nobody looks"
    return outside_vocabulary(named, segment.shard, segment.document, int(window[place]), options.vocabulary)


@lru_cache(maxsize=4096)
def _source_number(number: int) -> Tensor:
    return torch.tensor(number)


class HeldOutSamples(Dataset[dict[str, Tensor]]):
    """Held-out windows of one or several sources, evenly interleaved.

    The loop asks for ever new validation samples. Here number `i` is window `i` modulo `samples_per_evaluation`, so
    that each evaluation of a run, and of a resumed run, sees the same text and their losses compare. An evaluation that
    asks for more windows than there are starts over within itself.
    """

    split = Split.valid

    def __init__(
        self,
        sources: Mapping[int, _Windows],
        options: SampleOptions,
        num_samples: int,
        samples_per_evaluation: int,
        *,
        once: bool = False,
    ) -> None:
        """Interleave the sources.

        Args:
            sources: Held-out windows of each source, by its number in the plan.
            options: Document boundaries.
            num_samples: Length of this dataset, over all evaluations of the run.
            samples_per_evaluation: Windows of one evaluation.
            once: Windows that come again within an evaluation do not count.
        """
        self.numbers, self.sources = list(sources), list(sources.values())
        self.options = options
        self.order = spread_evenly([len(source) for source in self.sources])
        self.period = min(samples_per_evaluation, len(self.order))
        self.num_samples = num_samples
        self.cycle = samples_per_evaluation
        self.once = once

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`make_sample` of the window, and what its losses are booked by.

        `dataset_id` is the number of its source in the plan, int64 scalar; `token_bands` the quantile band of each
        predicted token, int8 `[seq_length]`, -1 for none.

        Raises:
            ShardError: it holds an id outside the vocabulary.
        """
        place = index % self.cycle
        source, window = self.order[place % self.period].tolist()
        tokens, number = self.sources[source][window]["tokens"], self.numbers[source]
        if (wrong := first_outside(tokens, self.options.vocabulary)) is not None:
            named = f"held-out window {window} of source {number} of the plan"
            raise _outside(named, tokens, wrong, self.sources[source].segments(window), self.options)
        sample = make_sample(tokens, self.options)
        if self.once and place >= self.period:
            sample["loss_mask"] = torch.zeros_like(sample["loss_mask"])
        sample["dataset_id"] = torch.tensor(number)
        sample["token_bands"] = torch.from_numpy(self.sources[source].bands(window))
        return sample


def spread_evenly(lengths: Sequence[int]) -> NDArray[np.int64]:
    """Order all items of several lists so that each list is spread over the whole.

    Item `j` of a list of `n` sits at `(j + 0.5) / n`; ties go to the earlier list.

    Returns:
        int64 `[sum(lengths), 2]`: list number and item number.
    """
    lists = np.concatenate([np.full(length, number, dtype=np.int64) for number, length in enumerate(lengths)])
    items = np.concatenate([np.arange(length, dtype=np.int64) for length in lengths])
    places = (items + 0.5) / np.asarray(lengths, dtype=np.float64)[lists]
    return np.stack([lists, items], axis=1)[np.argsort(places, kind="stable")]


class PlanDatasetsProvider:
    """Provider of a plan's datasets, called by Megatron on every rank.

    Builds on those that feed a model stage, and returns None on the others.
    """

    is_distributed = True
    """Makes Megatron call this on all ranks."""

    def __init__(
        self, plan: Plan, args: argparse.Namespace, eod_token: int | None, vocabulary: int | None = None
    ) -> None:
        """Errors as `check_document_ends`."""
        self.plan = plan
        self.args = args
        self.options = SampleOptions(
            eod_token=eod_token,
            eod_mask_loss=args.eod_mask_loss,
            reset_position_ids=args.reset_position_ids,
            reset_attention_mask=args.reset_attention_mask,
            create_attention_mask=args.create_attention_mask_in_dataloader,
            vocabulary=vocabulary,
        )
        check_document_ends(plan, self.options)

    def __call__(
        self, num_samples: tuple[int, int, int], vp_stage: int | None = None
    ) -> tuple[PlanSamples | None, HeldOutSamples | None, None]:
        """Return train, validation and test datasets.

        A plan has no test documents.
        """
        if not self._feeds(vp_stage):
            return None, None, None
        return (
            PlanSamples(CurriculumDataset(self.plan, parts=True), self.options),
            self._validation(num_samples[1]),
            None,
        )

    def evaluation_batches(self) -> Any:
        """The micro-batches of one evaluation for this rank: the windows that each evaluation of the run sees.

        They are read here and now, and draw no random numbers, which starting a data loader would do.

        Returns:
            An iterator; None on a rank that feeds no model stage; a list of these with a virtual pipeline.
        """
        stages = self.args.virtual_pipeline_model_parallel_size
        return self._batches(None) if stages is None else [self._batches(stage) for stage in range(stages)]

    def _batches(self, vp_stage: int | None) -> Iterator[dict[str, Tensor]] | None:
        if not self._feeds(vp_stage):
            return None
        samples = self._held_out(self._held_out_sources(), wanted := self._wanted())
        size = self.args.eval_micro_batch_size
        rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        starts = range(rank * size, wanted, ranks * size)  # as Megatron's sampler deals them out
        return (default_collate([samples[start + place] for place in range(size)]) for start in starts)

    def _feeds(self, vp_stage: int | None) -> bool:
        return loads_data(self.args, vp_stage)

    def _wanted(self) -> int:
        """Samples of one evaluation."""
        return int(self.args.eval_iters * self.args.eval_global_batch_size)

    def _held_out_sources(self) -> dict[int, HeldOutDataset]:
        numbers = {name: number for number, name in enumerate(self.plan.sources)}
        return {numbers[name]: HeldOutDataset(self.plan, name) for name in self.plan.validation}

    def _validation(self, num_samples: int) -> HeldOutSamples | None:
        sources = self._held_out_sources()
        if not sources or not self._wanted():
            return None
        # The loop plans with the present --eval-interval, starts after what evaluations at another one took, and counts
        # one too few where --start-eval-at-iter is a step that evaluates.
        samples = self._held_out(sources, num_samples + self._wanted() + self.args.consumed_valid_samples)
        if samples.period < self._wanted() and not samples.once:
            print_rank_0(
                f"> the plan holds out {counted(samples.period, 'window')}, an evaluation asks for {self._wanted()}: "
                "some are "
                "used again; lower --eval-iters, or hold out more documents"
            )
        return samples

    def _held_out(self, sources: Mapping[int, HeldOutDataset], num_samples: int) -> HeldOutSamples:
        once = getattr(self.args, EVERY_WINDOW)
        return HeldOutSamples(sources, self.options, num_samples, self._wanted(), once=once)
