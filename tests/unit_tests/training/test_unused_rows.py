"""Rows of the embedding that no token has are said aloud where they are many."""

import pytest

from tests.helpers import run_distributed

QUIET = [(96, 96, 128), (128, 96, 128), (151_936, 151_646, 128), (50_304, 50_257, 128), (1024, 1, 1024)]


def lines(_rank: int, cases: list[tuple[int, int, int]]) -> list[str | None]:
    from megatron_kaiyuan.training.parsing import say_unused_rows

    return [say_unused_rows(*case, hidden_size=2048) for case in cases]


@pytest.mark.distributed
def test_many_rows_without_a_token_are_said_and_needed_padding_is_not() -> None:
    [said] = run_distributed(lines, 1, [*QUIET, (151_936, 4096, 128), (160_000, 100_000, 128)])
    assert said[: len(QUIET)] == [None] * len(QUIET)
    # 151 936 - 4 096 = 147 840 rows of 2 048
    assert "--padded-vocab-size 151,936 for 4,096 ids of the tokenizer: 147,840 rows" in said[-2]
    assert "302,776,320 parameters" in said[-2]
    assert "60,000 rows" in said[-1]
