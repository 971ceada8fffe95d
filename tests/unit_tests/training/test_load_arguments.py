"""A run that is told to start from a checkpoint finds one, or says so before anything is built."""

from pathlib import Path

import pytest
from megatron.training.arguments import parse_args

from megatron_kaiyuan.arguments import arguments_provider
from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.training.load_arguments import check_load


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tracked").mkdir()
    (tmp_path / "tracked/latest_checkpointed_iteration.txt").write_text("3")
    (tmp_path / "untracked/iter_0000003").mkdir(parents=True)
    (tmp_path / "new/torch_dist/iter_0000003").mkdir(parents=True)
    (tmp_path / "empty").mkdir()


def check(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    monkeypatch.setattr("sys.argv", ["pretrain", *words.split()])
    check_load(parse_args(arguments_provider({})))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--finetune --load typo", "^--finetune --load typo has no latest_checkpointed_iteration.txt: no checkpoint"),
        ("--finetune --load empty --save empty", "^--finetune --load empty has no latest"),
        ("--load typo", "^--load typo has no latest.*name the folder that --save had"),
        ("--load typo --save other", "^--load typo has no latest"),
        ("--load typo --save typo --exit-on-missing-checkpoint", "^--exit-on-missing-checkpoint: --load typo has no"),
        ("--pretrained-checkpoint typo", "^--pretrained-checkpoint typo has no latest"),
        ("--pretrained-checkpoint typo --load typo --save typo", "^--pretrained-checkpoint typo has no latest"),
        (
            "--load tracked --ckpt-convert-format torch_dist --ckpt-convert-save new",
            "new/torch_dist has a checkpoint",
        ),
    ],
)
def test_a_checkpoint_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, words: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check(monkeypatch, words)


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--load typo --save typo",
        "--load ./empty --save empty",
        "--finetune --load tracked",
        "--load untracked --exit-on-missing-checkpoint",
        "--pretrained-checkpoint tracked --load typo --save typo",
        "--load tracked --ckpt-convert-format torch --ckpt-convert-save new",
    ],
)
def test_a_checkpoint_that_is_there_or_will_be_is_no_mistake(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    check(monkeypatch, words)
