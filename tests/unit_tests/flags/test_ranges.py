"""Numbers that no run can use are named before anything is built."""

import pytest
from megatron.training.arguments import parse_args

from megatron_kaiyuan.arguments import arguments_provider
from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.flags.ranges import check_ranges
from megatron_kaiyuan.training.parsing import known_flags


def check(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("sys.argv", ["pretrain", *words.split()])
    check_ranges(parse_args(arguments_provider({})), known_flags())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--num-workers -1", "^--num-workers -1: give at least 0$"),
        ("--lr-warmup-iters -1 --seed -3", "--seed -3: give at least 0; --lr-warmup-iters -1: give at least 0"),
        ("--log-interval 0", "^--log-interval 0: give at least 1$"),
        ("--eval-interval 0", "^--eval-interval 0: give at least 1$"),
        ("--adam-eps -1", "^--adam-eps -1.0: give at least 0$"),
        ("--adam-beta2 1", "^--adam-beta2 1.0: give less than 1$"),
        ("--lr nan", "^--lr nan: give at least 0$"),
    ],
)
def test_a_number_out_of_range_is_named(monkeypatch: pytest.MonkeyPatch, words: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check(monkeypatch, words)


@pytest.mark.parametrize("words", ["", "--exit-interval 0 --null-tokenizer-pad-id -2", "--train-sync-interval 0"])
def test_numbers_that_mean_something_are_taken(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    check(monkeypatch, words)
