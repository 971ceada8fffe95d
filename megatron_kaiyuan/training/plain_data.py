"""Megatron's own datasets, for runs without a plan: `--data-path` and its relatives mean what they mean upstream."""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets import gpt_dataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.training import get_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.flags.complaints import megatron_checks
from megatron_kaiyuan.model.samples import first_outside, outside_vocabulary
from megatron_kaiyuan.model.stages import loads_data
from megatron_kaiyuan.training.parsing import known_flags

__all__ = ["PlainDatasetsProvider"]


class GPTDataset(gpt_dataset.GPTDataset):
    """Megatron's dataset, which names an id outside the vocabulary before the model meets it.

    It has the name of Megatron's own, which is part of the key of the indexes that both keep on disk.
    """

    def _query_document_sample_shuffle_indices(self, idx: int) -> Any:
        text, documents, sizes = super()._query_document_sample_shuffle_indices(idx)
        vocabulary = self.config.tokenizer.vocab_size
        place = first_outside(text[: sum(sizes)], vocabulary)  # padding may have any id, and does not count
        if place is None:
            return text, documents, sizes
        ends = np.cumsum(sizes)
        document = int(documents[int(np.searchsorted(ends, place, side="right"))])
        shard = self.dataset.path_prefix
        named = f"sample {idx} of the {self.index_split.name} part of {shard}"
        raise outside_vocabulary(named, shard, document, int(text[place]), vocabulary)


class PlainDatasetsProvider:
    """Provider of datasets without a plan, called by Megatron on every rank.

    Megatron's builder itself knows which ranks hold the data.
    """

    is_distributed = True
    """Makes Megatron call this on all ranks."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Raise ConfigError where the flags of the datasets cannot work together, or a file cannot be read."""
        self.args = args
        with megatron_checks(known_flags()):
            self._config = self._configuration()

    def __call__(self, num_samples: tuple[int, int | None, int], vp_stage: int | None = None) -> Any:
        """Train, validation and test datasets."""
        dataset = MockGPTDataset if self.args.mock_data else GPTDataset
        is_built_here = partial(loads_data, self.args, vp_stage)
        train, valid, test = num_samples
        if self.args.start_eval_at_iter is not None and valid is not None:
            valid += test  # Megatron counts one evaluation too few where that step evaluates
        builder = BlendedMegatronDatasetBuilder(dataset, (train, valid, test), is_built_here, self._config)
        if not (
            self.args.eval_iters or self.args.full_validation
        ):  # nothing to build, and a part that rounds to no document would take for ever
            parts = self._config.blend_per_split or self._config.split_matrix
            parts[1:] = [None, None]
        return builder.build()

    def _configuration(self) -> GPTDatasetConfig:
        args = self.args
        blend, blend_per_split = get_blend_and_blend_per_split(args)
        return GPTDatasetConfig(
            random_seed=args.seed,
            sequence_length=args.seq_length,
            blend=blend,
            blend_per_split=blend_per_split,
            split=args.split,
            multiple_validation_sets=args.multiple_validation_sets,
            full_validation=args.full_validation,
            num_dataset_builder_threads=args.num_dataset_builder_threads,
            path_to_cache=args.data_cache_path,
            mmap_bin_files=args.mmap_bin_files,
            tokenizer=get_tokenizer(),
            reset_position_ids=args.reset_position_ids,
            reset_attention_mask=args.reset_attention_mask,
            eod_mask_loss=args.eod_mask_loss,
            create_attention_mask=args.create_attention_mask_in_dataloader,
            object_storage_cache_path=args.object_storage_cache_path,
            mid_level_dataset_surplus=args.mid_level_dataset_surplus,
            allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
            fast_cache_load=args.dataloader_fast_cache_load,
            sequences_per_dataset=_sequences(args.per_dataset_sequences_path),
            defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        )


def _sequences(path: str | None) -> Any:
    """Counts by prefix."""
    if path is None:
        return None
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--per-dataset-sequences-path {path} cannot be read ({error}); write it again with Megatron-LM's "
            "tools/build_sequences_per_dataset.py, or leave it out"
        ) from error
