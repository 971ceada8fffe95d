"""Tools that read a checkpoint tell bad input in a line."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from megatron_kaiyuan.checkpoints.identity import TOKENIZER
from megatron_kaiyuan.checkpoints.recovery import open_intact_checkpoint
from megatron_kaiyuan.commands.evaluate import _tokenizer_of_all
from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.errors import ConfigError, TokenizerError
from megatron_kaiyuan.evaluation.held_out import check_counts
from megatron_kaiyuan.evaluation.token_bytes import check_tokenizer, token_bytes
from tests.unit_tests.data.tiny import numbered_documents, write_shard
from tests.unit_tests.export.small_models import KAIYUAN, save_model
from tests.unit_tests.export.test_tokenizers import train_sentencepiece
from tests.unit_tests.export.test_transformers import write_tokenizer
from tests.unit_tests.preprocess.corpus import save_bpe, save_tiktoken

TOOLS = Path(__file__).parents[3] / "tools"


def run(tool: str, *words: object) -> str:
    """What a tool says on stderr, which must not be a traceback, when it fails."""
    command = [sys.executable, str(TOOLS / f"{tool}.py"), *map(str, words)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 1, finished.stderr
    assert "Traceback" not in finished.stderr
    return finished.stderr


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    write_shard(tmp_path / "text", numbered_documents([20, 21]))
    phase = {"name": "only", "order": "shuffled", "sources": {"text": "all"}}
    path = tmp_path / "plan.yaml"
    path.write_text(
        json.dumps({"seq_length": 4, "sources": {"text": {"shards": str(tmp_path / "text")}}, "phases": [phase]})
    )
    return path


def test_a_truncated_checkpoint_is_named(tmp_path: Path, plan: Path) -> None:
    folder = save_model(KAIYUAN, tmp_path / "run", torch.float16).folder
    tokenizer = save_bpe(tmp_path / "bpe")
    assert open_intact_checkpoint(tmp_path / "run").folder == folder
    data = next(folder.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    for said in (
        run("convert_checkpoint", "export", folder, "--output", tmp_path / "hf"),
        run("evaluate", folder, "--plan", plan),
        run("generate", folder, "--tokenizer", tokenizer, "--prompt", "the"),
    ):
        assert f"{data.name}" in said
        assert "has only" in said
        assert "name another checkpoint" in said


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(tmp_path: Path) -> None:
    save_model(KAIYUAN, tmp_path / "run", torch.float16)
    said = run("generate", tmp_path / "run", "--tokenizer", save_bpe(tmp_path / "bpe"), "--prompt", "the")
    assert "the model has 64 rows" in said


def test_a_tokenizer_that_cannot_be_that_of_the_losses_is_refused(plan: Path, tmp_path: Path) -> None:
    opened, rows = Plan.load(plan), Namespace(padded_vocab_size=64, vocab_size=64)
    for size, complaint in (
        (65, "its ids go up to 64, the model has 64 rows"),
        (30, "token id 40, but the vocabulary"),
    ):
        folder = write_tokenizer(tmp_path / str(size), size)
        with pytest.raises(TokenizerError, match=f"--tokenizer-model {folder}: .*{complaint}"):
            check_tokenizer(folder, rows, opened)
    check_tokenizer(write_tokenizer(tmp_path / "fits", 50), rows, opened)


def test_the_tokenizer_must_be_that_of_every_checkpoint(tmp_path: Path) -> None:
    folder = str(write_tokenizer(tmp_path / "tokenizer", 50))
    first = Namespace(padded_vocab_size=64, vocab_size=64)
    other = Namespace(**vars(first), **{TOKENIZER: "0" * 64})
    assert _tokenizer_of_all(folder, [first, first], None) is not None
    with pytest.raises(TokenizerError, match=f"--tokenizer-model {folder}: another one than the model was trained"):
        _tokenizer_of_all(folder, [first, other], None)


def test_losses_are_told_without_bytes_where_the_tokenizer_is_not_byte_level(plan: Path, tmp_path: Path) -> None:
    ranks = save_tiktoken(tmp_path / "ranks.json")
    pieces = train_sentencepiece(tmp_path / "t.model", model_type="bpe")
    for path, size in ((ranks, 1263), (pieces, 1000)):
        check_tokenizer(path, Namespace(padded_vocab_size=1280, vocab_size=size), Plan.load(plan))
        assert token_bytes(path) is None


@pytest.mark.parametrize(("flag", "windows", "batch_size"), [("--windows", 0, 8), ("--batch-size", None, 0)])
def test_counts_below_one_are_refused(flag: str, windows: int | None, batch_size: int) -> None:
    with pytest.raises(ConfigError, match=rf"{flag} must be at least 1, got 0"):
        check_counts(windows, batch_size)
    check_counts(None, 1)
    check_counts(1, 8)
