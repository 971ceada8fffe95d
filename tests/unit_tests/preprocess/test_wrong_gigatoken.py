"""gigatoken is found to differ after shards were finished with it: none of them stays, and the rest is the reference's.

The stand-in is wrong about one word. It says so as the real check does, where that word stands in the checked excerpt.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_kaiyuan.data import open_source
from megatron_kaiyuan.errors import ShardError, TokenizerError
from megatron_kaiyuan.preprocess import RunSummary, TokenizerConfig, fast_tokenize, load_manifest, pipeline, preprocess
from megatron_kaiyuan.preprocess.fast_tokenize import DIFFERENCE_FILE, TokenizersDiffer
from megatron_kaiyuan.shards.tokenizer import TokenBatch, load_reference_tokenizer
from tests.unit_tests.preprocess.corpus import (
    SilentReporter,
    folder_bytes,
    folder_config,
    null_config,
    save_bpe,
    write_jsonl,
)

SEEN, UNSEEN = "brown", "number"
"""Words that gigatoken gets wrong: one where the check looks, one where it does not."""
GOOD = {"text": "the quick fox"}


class WrongAboutWords:
    """Gives wrong ids for both words, and notices one of them, as a check of an excerpt would."""

    vocab_size, eod_id = 500, 0

    def __init__(self, config: TokenizerConfig) -> None:
        self._reference = load_reference_tokenizer(config)
        self.special = self._reference.special

    def encode(self, texts: list[str]) -> TokenBatch:
        if any(SEEN in text for text in texts):
            raise TokenizersDiffer(f"gigatoken gives other ids than the reference for {SEEN!r}")
        batch = self._reference.encode(texts)
        wrong = [number for number, text in enumerate(texts) if UNSEEN in text]
        for number in wrong:
            batch.tokens[int(batch.lengths[:number].sum())] += 1
        return batch


@pytest.fixture
def tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TokenizerConfig:
    config = TokenizerConfig(type="HuggingFaceTokenizer", model=str(save_bpe(tmp_path / "bpe")))
    monkeypatch.setattr(fast_tokenize, "_load_gigatoken", WrongAboutWords)
    monkeypatch.setattr(pipeline, "sample_texts", lambda *_: ["the"])  # the sample has neither word
    return config


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Twelve shards of two rows; gigatoken is wrong in the first unnoticed, and noticed in the ninth."""
    rows = [GOOD] * 24
    rows[0], rows[17] = {"text": f"the {UNSEEN} fox"}, {"text": f"the {SEEN} fox"}
    return write_jsonl(tmp_path / "rows.jsonl", rows)


def build(path: Path, out: Path, tokenizer: TokenizerConfig, **settings: Any) -> tuple[RunSummary, list[str]]:
    reporter = SilentReporter([])
    config = folder_config([path], out, tokenizer=tokenizer, shard_bytes=path.stat().st_size // 12 + 1, **settings)
    return preprocess(config, reporter), reporter.notes


def finished(out: Path) -> set[int]:
    return {int(file.name[6:11]) for file in out.glob("*.manifest.json")}


def without_the_difference(out: Path) -> dict[str, bytes]:
    return {name: content for name, content in folder_bytes(out).items() if name != DIFFERENCE_FILE}


def test_what_a_wrong_gigatoken_finished_is_taken_away_and_built_by_the_reference(
    tmp_path: Path, path: Path, tokenizer: TokenizerConfig
) -> None:
    out = tmp_path / "out"
    build(path, out, tokenizer, num_tasks=3, task_id=1)
    assert load_manifest(str(out / "shard_00001_text_document")).tokenized_by.startswith("gigatoken ")  # type: ignore[union-attr]
    build(path, out, tokenizer, num_tasks=3, task_id=0, backend="reference")
    message = (
        r"other ids than the reference for 'brown'; \d shards \(shard_00001_text_document, .*the same command again"
    )
    with pytest.raises(TokenizerError, match=message):
        build(path, out, tokenizer, num_tasks=3, task_id=2)
    assert finished(out) == {0, 3, 6, 9}, "those of the reference stay"
    assert not list(out.glob("shard_00001*"))
    with pytest.raises(ShardError, match="shards are missing"):
        open_source("rows", str(out))
    for task in range(3):
        _, notes = build(path, out, tokenizer, num_tasks=3, task_id=task)
        assert task == 0 or notes[0].startswith("tokenizer: reference; gigatoken gives other ids than the reference")
    build(path, tmp_path / "reference", tokenizer, num_tasks=3, backend="reference")
    build(path, tmp_path / "reference", tokenizer, backend="reference")
    assert without_the_difference(out) == folder_bytes(tmp_path / "reference")


def test_a_task_that_was_at_work_when_another_found_the_difference_stops_too(
    tmp_path: Path, path: Path, tokenizer: TokenizerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    build_shard = pipeline.build_shard

    def find_meanwhile(*arguments: Any) -> Any:
        monkeypatch.setattr(pipeline, "build_shard", build_shard)
        with pytest.raises(TokenizerError, match="no shards were taken away"):
            build(path, out, tokenizer, num_tasks=2, task_id=0)
        return build_shard(*arguments)

    rows = [{"text": f"the {SEEN} fox"}, GOOD, *([GOOD] * 22)]
    write_jsonl(path, rows)
    monkeypatch.setattr(pipeline, "build_shard", find_meanwhile)
    with pytest.raises(TokenizerError, match=r"1 shard \(shard_00001_text_document\) was taken away"):
        build(path, out, tokenizer, num_tasks=2, task_id=1)
    assert finished(out) == set()


def test_a_difference_at_the_next_start_is_mended_in_that_run(
    tmp_path: Path, path: Path, tokenizer: TokenizerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sample holds a word that the sample of the task before it did not."""
    out = tmp_path / "out"
    write_jsonl(path, [{"text": f"the {UNSEEN} fox"}] * 24)
    build(path, out, tokenizer, num_tasks=2, task_id=0)
    monkeypatch.setattr(pipeline, "sample_texts", lambda *_: [UNSEEN])
    summary, notes = build(path, out, tokenizer, num_tasks=1)
    assert summary.shards_kept == 0
    assert any("taken away, because gigatoken had made them" in note for note in notes)
    build(path, tmp_path / "reference", tokenizer, num_tasks=2, task_id=0, backend="reference")
    build(path, tmp_path / "reference", tokenizer, backend="reference")
    assert without_the_difference(out) == folder_bytes(tmp_path / "reference")
    assert json.loads((out / DIFFERENCE_FILE).read_text())["found"] == "gigatoken gives other ids for 'number'"
    assert build(path, out, tokenizer)[0].shards_built == 0


def test_a_single_shard_stops_before_it_has_a_name(tmp_path: Path, path: Path, tokenizer: TokenizerConfig) -> None:
    config = null_config([path], tmp_path / "one", tokenizer=tokenizer)
    with pytest.raises(TokenizerError, match=r"for 'brown'; run again with --tokenizer-backend reference"):
        preprocess(config, SilentReporter([]))
    assert not list(tmp_path.glob("one*"))
    preprocess(null_config([path], tmp_path / "one", tokenizer=tokenizer, backend="reference"), SilentReporter([]))
    assert "tokenized_by" not in (tmp_path / "one_text_document.manifest.json").read_text()
