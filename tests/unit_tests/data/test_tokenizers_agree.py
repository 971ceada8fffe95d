"""A plan refuses sources that were built with different tokenizers, or with another one than it names."""

from pathlib import Path
from typing import Any

import pytest

from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.errors import ShardError
from megatron_kaiyuan.preprocess import TokenizerConfig
from tests.unit_tests.preprocess.corpus import build_folder, save_bpe, write_jsonl


def plan_of(folders: list[Path], tokenizer: Path | None = None) -> dict[str, Any]:
    names = [f"s{number}" for number in range(len(folders))]
    plan: dict[str, Any] = {
        "seq_length": 4,
        "seed": 1,
        "sources": {name: {"shards": str(folder)} for name, folder in zip(names, folders, strict=True)},
        "phases": [{"name": "only", "order": "shuffled", "sources": {name: {} for name in names}}],
    }
    if tokenizer is not None:
        plan["tokenizer"] = {"type": "HuggingFaceTokenizer", "model": str(tokenizer)}
    return plan


def test_one_vocabulary_for_all_sources_and_the_plan(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "the quick brown fox"}] * 9)
    first, second = save_bpe(tmp_path / "first"), save_bpe(tmp_path / "second")
    content = (second / "tokenizer.json").read_text()
    (second / "tokenizer.json").write_text(content.replace("<|endoftext|>", "<|end|>"))
    (second / "tokenizer_config.json").unlink()
    folders = {}
    for name, model in (("a", first), ("b", first), ("c", second)):
        folders[name] = tmp_path / name
        build_folder([path], folders[name], tokenizer=TokenizerConfig(type="HuggingFaceTokenizer", model=str(model)))
    assert Plan.from_spec(plan_of([folders["a"], folders["b"]], tokenizer=first)).num_samples > 0
    with pytest.raises(ShardError, match=r"a/shard_00000.* and .*c/shard_00000.* were built with different tokenizers"):
        Plan.from_spec(plan_of([folders["a"], folders["c"]]))
    with pytest.raises(ShardError, match=r"the plan names HuggingFaceTokenizer .*second.*build the shards again"):
        Plan.from_spec(plan_of([folders["a"]], tokenizer=second))
