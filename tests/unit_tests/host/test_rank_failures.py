"""What a rank that failed prints: one sentence where the cause is known, on the ranks that may be the only ones."""

import errno

import pytest
import torch
from torch._utils import ExceptionWrapper
from torch.distributed.checkpoint.api import CheckpointException

from megatron_kaiyuan.errors import (
    ConfigError,
    DeviceError,
    KaiyuanError,
    MetricsError,
    SaveError,
    ShardError,
    TrainingStopped,
)
from megatron_kaiyuan.host import cut_files
from megatron_kaiyuan.host.rank_failures import failure_of


@pytest.mark.parametrize(
    ("error", "begun", "ranks"),
    [
        (ConfigError("of the flags"), False, [0]),
        (MetricsError("seen by the last rank"), False, [0, 3]),
        (DeviceError("of this rank alone"), False, [0, 3]),
        (ShardError("a sample of this rank"), True, [0, 3]),
        (TrainingStopped("agreed on by all"), True, [0]),
        (SaveError("agreed on by all"), True, [0]),
        (SaveError("of this rank", of_one_rank=True), True, [0, 3]),
    ],
)
def test_an_error_is_printed_where_it_may_be_the_only_one(
    error: KaiyuanError,
    begun: bool,  # noqa: FBT001
    ranks: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: begun)
    told = []
    for rank in (0, 3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        failure = failure_of(error)
        assert failure.text == f"{type(error).__name__}: {error}"
        if failure.is_told_here:
            told.append(rank)
    assert told == ranks


def test_an_error_of_a_loader_worker_is_one_sentence_again() -> None:
    """torch hands it on as a text that begins with the worker's traceback."""
    try:
        raise ShardError("a.bin: the end is missing: 4 bytes; copy it again")
    except ShardError:
        sent = ExceptionWrapper(where="in DataLoader worker process 1")
    with pytest.raises(ShardError, match="Original Traceback") as caught:
        sent.reraise()

    assert failure_of(caught.value).text == "ShardError: a.bin: the end is missing: 4 bytes; copy it again"


@pytest.fixture(autouse=True)
def no_file_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a test before this one in the same process."""
    monkeypatch.setattr(cut_files, "_sizes", {})


@pytest.mark.parametrize(
    ("error", "words", "is_consequence"),
    [
        (
            RuntimeError("DataLoader worker (pid 4711) is killed by signal: Killed. "),
            "a data loader worker (process 4711) is killed by signal: Killed",
            False,
        ),
        (
            RuntimeError("DataLoader worker (pid(s) 4711, 4712) exited unexpectedly"),
            "a data loader worker (process 4711, 4712) exited unexpectedly",
            False,
        ),
        (
            RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"),
            "lost another rank ([gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1)",
            True,
        ),
        (torch.distributed.DistNetworkError("the store is gone\nmore"), "lost another rank (the store is gone)", True),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "No space left on device: 'a/b': make room", False),
    ],
)
def test_a_known_fault_is_a_sentence_without_a_traceback(
    error: Exception,
    words: str,
    is_consequence: bool,  # noqa: FBT001
) -> None:
    failure = failure_of(error)

    assert words in failure.text
    assert "\n" not in failure.text
    assert (failure.is_told_here, failure.is_consequence) == (True, is_consequence)


def test_the_ranks_that_do_not_know_why_a_checkpoint_failed_leave_it_to_rank_0() -> None:
    failure = failure_of(CheckpointException("write", {}))

    assert (failure.is_told_here, failure.is_consequence) == (False, True)


def test_an_unknown_fault_keeps_its_traceback() -> None:
    try:
        raise AssertionError("of the program")
    except AssertionError as error:
        text = failure_of(error).text

    assert text.startswith("Traceback (most recent call last):")
    assert text.endswith("AssertionError: of the program")
