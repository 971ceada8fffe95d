"""Which processes print the error that ended a run."""

import sys
from types import SimpleNamespace

import pytest
import torch

from megatron_kaiyuan import pretrain
from megatron_kaiyuan.errors import ConfigError, DeviceError, KaiyuanError, MetricsError, ShardError, TrainingStopped


@pytest.mark.parametrize(
    ("error", "begun", "ranks"),
    [
        (ConfigError("of the flags"), False, [0]),
        (MetricsError("seen by the last rank"), False, [0, 3]),
        (DeviceError("of this rank alone"), False, [0, 3]),
        (ShardError("a sample of this rank"), True, [0, 3]),
        (TrainingStopped("agreed on by all"), True, [0]),
    ],
)
def test_an_error_is_printed_where_it_may_be_the_only_one(
    error: KaiyuanError,
    begun: bool,  # noqa: FBT001
    ranks: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(pretrain, "start_device", lambda: "device: one of the test")
    monkeypatch.setitem(sys.modules, "megatron_kaiyuan.training.launch", SimpleNamespace(run_pretraining=fail))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: begun)
    told = []
    for rank in (0, 3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert pretrain.main() == 1
        if f"{type(error).__name__}: {error}" in capfd.readouterr().err:
            told.append(rank)
    assert told == ranks
