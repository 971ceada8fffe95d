"""The words of a blend are read strictly, where Megatron would guess."""

import argparse
import json
from pathlib import Path

import pytest

from megatron_kaiyuan.errors import ConfigError, ShardError
from megatron_kaiyuan.training.blend import check_blend, check_data_arguments
from tests.unit_tests.data.tiny import write_shard


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Shards p1, p2 and 2024 in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("p1", "p2", "2024"):
        write_shard(Path(name), [[1, 2, 3], [4, 5]])
    return tmp_path


def arguments(**given: object) -> argparse.Namespace:
    values: dict[str, object] = dict.fromkeys(
        (
            "data_path",
            "train_data_path",
            "valid_data_path",
            "test_data_path",
            "data_args_path",
            "per_split_data_args_path",
        )
    )
    return argparse.Namespace(**(values | {"mock_data": False} | given))


@pytest.mark.usefixtures("shards")
@pytest.mark.parametrize(
    "words", ["p1", "p1 p2", "0.3 p1 0.7 p2", "1 p1", "1e-3 p1 7 p2", "2024 p1", "0.5 2024 0.5 p1"]
)
def test_prefixes_and_pairs_are_accepted(words: str) -> None:
    check_blend(words.split(), "--data-path")


@pytest.mark.usefixtures("shards")
@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("0.3 p1 foo p2", "word 3, 'foo', should be a weight"),
        ("foo p1 0.3 p2", "word 1, 'foo', should be a weight"),
        ("30 p1 70", "the last weight, 70, has no prefix after it"),
        ("0.3 0.7 p1 p2", "word 2, '0.7', should be a prefix"),
        ("p1 0.3 p2 0.7", "word 1, 'p1', should be a weight"),
        ("0 p1 1 p2", "weight 0 must be above 0"),
        ("-1 p1", "weight -1 must be above 0"),
        ("nan p1", "weight nan must be above 0"),
        ("inf p1", "weight inf must be above 0"),
        ("", "--data-path is empty"),
    ],
)
def test_a_word_out_of_place_is_an_error_that_names_it(words: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        check_blend(words.split(), "--data-path")


@pytest.mark.usefixtures("shards")
def test_a_missing_prefix_is_an_error_that_names_the_file() -> None:
    with pytest.raises(ShardError, match=r"p3\.idx does not exist"):
        check_blend(["0.5", "p1", "0.5", "p3"], "--data-path")


def test_a_truncated_bin_is_an_error(shards: Path) -> None:
    path = shards / "p2.bin"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ShardError, match=r"p2\.bin: 16 bytes.*truncated"):
        check_data_arguments(arguments(data_path=["p1", "p2"]))


def test_a_run_without_data_is_an_error() -> None:
    with pytest.raises(ConfigError, match="the run has no data: give --plan FILE, or --data-path"):
        check_data_arguments(arguments())


def test_mock_data_needs_no_files() -> None:
    check_data_arguments(arguments(mock_data=True))


@pytest.mark.parametrize("flag", ["train_data_path", "valid_data_path", "test_data_path"])
@pytest.mark.usefixtures("shards")
def test_each_flag_of_a_split_is_checked_under_its_own_name(flag: str) -> None:
    with pytest.raises(ConfigError, match="--" + flag.replace("_", "-")):
        check_data_arguments(arguments(**{flag: ["0.5", "p1", "p2"]}))


def test_the_words_of_a_file_are_checked(shards: Path) -> None:
    (shards / "words.txt").write_text("0.5 p1\n0.5 p2\n")
    check_data_arguments(arguments(data_args_path="words.txt"))
    (shards / "words.txt").write_text("0.5 p1 p2\n")
    with pytest.raises(ConfigError, match=r"--data-args-path words\.txt.*word 3"):
        check_data_arguments(arguments(data_args_path="words.txt"))


def test_the_blends_of_a_split_file_are_checked(shards: Path) -> None:
    path = shards / "splits.json"
    path.write_text(json.dumps({"train": "1 p1", "valid": ["p2"], "test": None}))
    check_data_arguments(arguments(per_split_data_args_path=str(path)))
    path.write_text(json.dumps({"train": "1 p1", "valid": ["1", "p2", "p1"], "test": None}))
    with pytest.raises(ConfigError, match=r"\(valid\).*word 3"):
        check_data_arguments(arguments(per_split_data_args_path=str(path)))
    path.write_text(json.dumps({"train": "p1"}))
    with pytest.raises(ConfigError, match="keys should be exactly train, valid and test"):
        check_data_arguments(arguments(per_split_data_args_path=str(path)))


def test_a_file_of_words_that_is_not_there_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"words\.txt cannot be read"):
        check_data_arguments(arguments(data_args_path=str(tmp_path / "words.txt")))
