"""Data without a plan: every part that the run asks for has documents, tokens and samples enough, or the start says no.

What is refused here ends Megatron in an endless loop, a StopIteration in the middle of the run, or an assertion at the
first evaluation.
"""

import argparse
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from megatron.training.arguments import parse_args

from megatron_kaiyuan.arguments import arguments_provider
from megatron_kaiyuan.errors import ConfigError, ShardError
from megatron_kaiyuan.training.plain_data import PlainDatasetsProvider
from megatron_kaiyuan.training.plain_splits import settle_splits
from tests.unit_tests.data.tiny import write_shard


@pytest.fixture(autouse=True)
def _shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two shards of 20 documents of 40 tokens, and one whose last two documents are empty."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        write_shard(tmp_path / name, [[5] * 40] * 20)
    write_shard(tmp_path / "hollow", [*[[5] * 40] * 18, [], []])


def run(monkeypatch: pytest.MonkeyPatch, words: str) -> argparse.Namespace:
    """As validation leaves the arguments of a run of 10 steps of 2 samples of 16, evaluated after each 5."""
    flags = "--train-iters 10 --micro-batch-size 2 --global-batch-size 2 --seq-length 16 --eval-interval 5"
    monkeypatch.setattr("sys.argv", ["pretrain", *flags.split(), *words.split()])
    args: argparse.Namespace = parse_args(arguments_provider({}))
    args.eval_global_batch_size = 2
    if args.data_path is not None and args.split is None:
        args.split = "969, 30, 1"
    return args


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            "--data-path a --split 99,1,0 --eval-iters 1",
            "^--split 99,1,0 leaves 0 of 20 documents of a for valid; give it a larger share, or --eval-iters 0$",
        ),
        ("--data-path a --eval-iters 1", "^--split 969, 30, 1 leaves 0 of 20 documents of a for test"),
        (
            "--data-path 1 a 1 b --split 1,99,0 --eval-iters 0",
            "leaves 0 of 20 documents of a for train; give it a larger",
        ),
        ("--data-path hollow --split 90,10,0 --eval-iters 1", "leaves 2 documents without a token of hollow for valid"),
        ("--data-path a --split 0,1,0", "^--split 0,1,0: nothing is left to train on"),
        ("--valid-data-path a", "^--valid-data-path alone: nothing is left to train on"),
        ("--train-data-path a --test-data-path b", "data to test on, but none to validate on"),
        ("--data-path a --split 90,0,10", "^--split 90,0,10: data to test on, but none to validate on"),
        ("--data-path a --split x", "^--split x: up to three shares"),
        ("--data-path a --split 1,2,3,4", "^--split 1,2,3,4: up to three shares"),
        ("--data-path a --split=-1,2", "^--split -1,2: up to three shares"),
        ("--data-path a --split 0,0", "^--split 0,0: all shares are 0"),
        # 800 tokens a prefix: 49 samples of 16 and one more.
        (
            "--data-path a b --split 1 --train-iters 50",
            r"--split 1 names 2 prefixes without weights, which are read once: 98 samples to train, .* asks for 100",
        ),
        ("--data-path a a --split 1 --train-iters 50", "names 2 prefixes .*: 98 samples to train, .* asks for 100"),
        (
            "--train-data-path 1 a --valid-data-path a b --eval-iters 20",
            "^--valid-data-path names 2 prefixes without weights.*: 98 samples to valid, but the run asks for 120",
        ),
        (
            "--data-path a b --split 99.8,0.1,0.1 --eval-iters 0 --seq-length 900",
            "has fewer tokens than a sample of 900",
        ),
    ],
)
def test_data_that_would_not_last_are_refused(monkeypatch: pytest.MonkeyPatch, words: str, told: str) -> None:
    args = run(monkeypatch, words)
    with pytest.raises(ConfigError, match=told):
        settle_splits(args)


@pytest.mark.parametrize(
    ("words", "told", "eval_iters"),
    [
        ("--data-path a --split 100,0,0", "--split 100,0,0 holds out no data: no evaluation (--eval-iters 0)", 0),
        ("--train-data-path a", "--train-data-path alone holds out no data: no evaluation (--eval-iters 0)", 0),
        ("--data-path a --split 99,1,0 --eval-iters 0", None, 0),
        ("--data-path a --split 90,10,0 --eval-iters 3", None, 3),
        (
            "--data-path a b --split 1 --train-iters 49",
            "--split 1 holds out no data: no evaluation (--eval-iters 0)",
            0,
        ),
        ("--data-path a b --split 1 --train-iters 999 --dataloader-type cyclic --eval-iters 0", None, 0),
        ("--data-path 1 a 1 b --split 1 --train-iters 999 --eval-iters 0", None, 0),
        ("--mock-data --eval-iters 2", None, 2),
        ("--valid-data-path a --skip-train --eval-iters 2", None, 2),
    ],
)
def test_data_that_last_are_taken_and_no_data_to_evaluate_on_switches_evaluation_off(
    monkeypatch: pytest.MonkeyPatch, words: str, told: str | None, eval_iters: int
) -> None:
    args = run(monkeypatch, words)
    assert settle_splits(args) == told
    assert args.eval_iters == eval_iters


def test_a_part_that_nobody_asks_for_is_not_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Megatron counts passes over it without end, though it is asked for no sample."""
    args = run(monkeypatch, "--data-path a --split 99,1,0 --eval-iters 0")
    monkeypatch.setattr("megatron_kaiyuan.training.plain_data.get_tokenizer", lambda: None)
    monkeypatch.setattr("megatron_kaiyuan.training.plain_data.loads_data", lambda _args, _stage: True)
    monkeypatch.setattr("megatron.core.datasets.gpt_dataset.GPTDatasetConfig.__post_init__", _without_tokenizer)
    train, valid, test = PlainDatasetsProvider(args)((20, 0, 0))
    assert type(train).__name__ == "GPTDataset", "the name is part of the key under which Megatron keeps its indexes"
    assert (valid, test) == (None, None)
    assert len(train) >= 20
    assert np.all(train.dataset.get(0)[:40] == 5)


def _without_tokenizer(config: object) -> None:
    from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig

    BlendedMegatronDatasetConfig.__post_init__(config)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--data-path a --split 1 --per-dataset-sequences-path no", "^--per-dataset-sequences-path no cannot be read"),
        ("--train-data-path a --split 90,10", "--split 90,10.*: split and blend_per_split are incompatible"),
    ],
)
def test_flags_of_the_datasets_that_cannot_work_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, words: str, told: str
) -> None:
    monkeypatch.setattr("megatron_kaiyuan.training.plain_data.get_tokenizer", lambda: None)
    with pytest.raises(ConfigError, match=told):
        PlainDatasetsProvider(run(monkeypatch, words))


def test_an_id_outside_the_vocabulary_is_named_with_its_document(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_shard(tmp_path / "c", [[5] * 40, [5] * 7 + [9] + [5] * 32, *[[5] * 40] * 18])
    args = run(monkeypatch, "--data-path c --split 1 --eval-iters 0")
    tokenizer = SimpleNamespace(vocab_size=9, eod=0, unique_identifiers={})
    monkeypatch.setattr("megatron_kaiyuan.training.plain_data.get_tokenizer", lambda: tokenizer)
    monkeypatch.setattr("megatron_kaiyuan.training.plain_data.loads_data", lambda _args, _stage: True)
    monkeypatch.setattr("megatron.core.datasets.gpt_dataset.GPTDatasetConfig.__post_init__", _without_tokenizer)
    train, _, _ = PlainDatasetsProvider(args)((49, 0, 0))
    train._pad_token_id = -1
    refused = 0
    for number in range(49):
        text, _, _ = super(type(train), train)._query_document_sample_shuffle_indices(number)
        if 9 not in text:
            assert train._query_document_sample_shuffle_indices(number)[0].tolist() == text.tolist()
            continue
        refused += 1
        told = (
            f"sample {number} of the train part of c: token id 9 in document 1 of c.bin, but the vocabulary has 9 ids"
        )
        with pytest.raises(ShardError, match="^" + re.escape(told)):
            train._query_document_sample_shuffle_indices(number)
    assert refused in (1, 2), "once, or where two windows meet"
