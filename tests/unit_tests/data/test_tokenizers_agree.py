"""A plan refuses sources that were built with different tokenizers, or with another one than it names."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_kaiyuan.data import Plan, vocabulary
from megatron_kaiyuan.errors import PlanError, ShardError
from megatron_kaiyuan.inspection.describe import describe_source
from megatron_kaiyuan.preprocess import TokenizerConfig
from megatron_kaiyuan.shards.shard import Shard
from tests.unit_tests.data.tiny import numbered_documents, phase_of, write_manifest, write_source
from tests.unit_tests.preprocess.corpus import build_folder, save_bpe, save_tiktoken, write_jsonl


def plan_of(
    folders: list[Path], tokenizer: Path | str | None = None, kind: str = "HuggingFaceTokenizer"
) -> dict[str, Any]:
    names = [f"s{number}" for number in range(len(folders))]
    plan: dict[str, Any] = {
        "seq_length": 4,
        "seed": 1,
        "sources": {name: {"shards": str(folder)} for name, folder in zip(names, folders, strict=True)},
        "phases": [{"name": "only", "order": "shuffled", "sources": {name: {} for name in names}}],
    }
    if tokenizer is not None:
        plan["tokenizer"] = {"type": kind, "model": str(tokenizer)}
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
    with pytest.raises(ShardError, match=r"tokenizer: Hugging.*second: it is another one.*build the shards again"):
        Plan.from_spec(plan_of([folders["a"]], tokenizer=second))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of shards, and the tokenizer they were built with."""
    folder = tmp_path_factory.mktemp("built")
    path = write_jsonl(folder / "rows.jsonl", [{"text": "the quick brown fox"}] * 9)
    tokenizer = save_bpe(folder / "bpe")
    config = TokenizerConfig(type="HuggingFaceTokenizer", model=str(tokenizer))
    build_folder([path], folder / "shards", tokenizer=config)
    return folder / "shards", tokenizer


def test_a_tokenizer_that_is_not_there_is_refused_with_the_path_the_shards_were_built_with(
    built: tuple[Path, Path], tmp_path: Path
) -> None:
    shards, tokenizer = built
    with pytest.raises(PlanError, match=r"missing: it cannot be compared .*No such file") as caught:
        Plan.from_spec(plan_of([shards], tmp_path / "missing"))
    assert str(tokenizer) in str(caught.value)
    assert "or leave tokenizer: out" in str(caught.value)
    with pytest.raises(PlanError, match=r"the directory has no tokenizer\.json"):
        Plan.from_spec(plan_of([shards], tmp_path))


@pytest.mark.parametrize(
    "kind", ["SentencePieceTokenizer", "Llama2Tokenizer", "TikTokenizer", "NullTokenizer", "GPT2BPETokenizer"]
)
def test_another_type_is_refused_though_the_file_is_the_same(built: tuple[Path, Path], kind: str) -> None:
    shards, tokenizer = built
    with pytest.raises(ShardError, match=rf"tokenizer: {kind} .*built with HuggingFaceTokenizer .*; build the shards"):
        Plan.from_spec(plan_of([shards], tokenizer / "tokenizer.json", kind))


def test_a_tokenizer_that_was_moved_is_the_same(built: tuple[Path, Path], tmp_path: Path) -> None:
    shards, tokenizer = built
    shutil.copytree(tokenizer, tmp_path / "elsewhere")
    assert Plan.from_spec(plan_of([shards], tmp_path / "elsewhere")).num_samples > 0
    assert Plan.from_spec(plan_of([shards], tmp_path / "elsewhere" / "tokenizer.json")).num_samples > 0


def edit_manifests(folder: Path, **tokenizer: Any) -> None:
    for path in folder.glob("*.manifest.json"):
        edit_manifest(path, **tokenizer)


def edit_manifest(path: Path, **tokenizer: Any) -> None:
    manifest = json.loads(path.read_text())
    manifest["tokenizer"] |= tokenizer
    path.write_text(json.dumps(manifest))


def test_names_of_one_tokenizer_type_are_one_type(built: tuple[Path, Path], tmp_path: Path) -> None:
    """Megatron has three names for SentencePiece; the content decides the ids."""
    shards, tokenizer = tmp_path / "shards", built[1]
    shutil.copytree(built[0], shards)
    edit_manifests(shards, type="Llama2Tokenizer")
    for kind in ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"):
        assert Plan.from_spec(plan_of([shards], tokenizer / "tokenizer.json", kind)).num_samples > 0
    with pytest.raises(ShardError, match="it is another one"):
        Plan.from_spec(plan_of([shards], tokenizer / "tokenizer_config.json", "Llama2Tokenizer"))


def test_shards_without_a_tokenizer_record_are_not_compared(built: tuple[Path, Path], tmp_path: Path) -> None:
    """Stock Megatron's shards have no manifest, and its tokenizer may have a name that is no path."""
    stock = tmp_path / "stock"
    write_source(stock, numbered_documents([5] * 9))
    assert Plan.from_spec(plan_of([stock], "some/hub-name")).num_samples > 0
    assert Plan.from_spec(plan_of([stock, built[0]], built[1])).num_samples > 0


def test_ids_that_were_numbers_already_need_no_file(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "1 2 3 4 5 6 7"}] * 9)
    build_folder([path], tmp_path / "shards", tokenizer=TokenizerConfig(type="NullTokenizer", vocab_size=9))
    assert Plan.from_spec(plan_of([tmp_path / "shards"])).num_samples > 0
    assert Plan.from_spec(plan_of([tmp_path / "shards"], "none", "NullTokenizer")).num_samples > 0


def test_the_file_of_a_tiktokenizer_must_be_there_and_its_options_are_not_compared(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "the quick brown fox"}] * 9)
    vocabulary = save_tiktoken(tmp_path / "vocabulary.json")
    config = TokenizerConfig(type="TikTokenizer", model=str(vocabulary), vocab_size=283, tiktoken_num_special_tokens=20)
    build_folder([path], tmp_path / "shards", tokenizer=config)
    assert Plan.from_spec(plan_of([tmp_path / "shards"], vocabulary, "TikTokenizer")).num_samples > 0
    with pytest.raises(PlanError, match="cannot be compared"):
        Plan.from_spec(plan_of([tmp_path / "shards"], tmp_path / "other.json", "TikTokenizer"))


def test_shards_without_a_manifest_are_probed_where_there_are_too_many_to_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest id stands at the end of the last shard, where a probe always looks."""
    documents = numbered_documents([50_000] * 4)
    source = write_source(tmp_path / "s", documents, cuts=(1, 2, 3))
    spec = {"seq_length": 4, "sources": {"s": source}, "phases": [phase_of("shuffled", {"s": "all"})]}
    read: list[int] = []
    original = vocabulary.largest_token_id
    monkeypatch.setattr(vocabulary, "largest_token_id", lambda shard, most: read.append(most) or original(shard, most))
    for limit in (1 << 30, 100_000):
        monkeypatch.setattr(vocabulary, "_FULL_SCAN_IN_ALL", limit)
        plan = Plan.from_spec(spec)
        plan.check_vocabulary(200_000)
        with pytest.raises(ShardError, match=r"part-003: token id 199999, but the vocabulary has 199,999 ids"):
            plan.check_vocabulary(199_999)
    assert set(read) == {1 << 26, 25_000}


def test_largest_ids_that_manifests_tell_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_source(tmp_path / "s", numbered_documents([4, 4]), cuts=(1,))
    spec = {"seq_length": 4, "sources": {"s": source}, "phases": [phase_of("shuffled", {"s": "all"})]}
    known, unknown = (shard.prefix for shard in Plan.from_spec(spec).opened["s"].source.shards)

    def read(shard: Shard, _: int) -> int:
        assert shard.prefix == unknown
        return 7

    monkeypatch.setattr(vocabulary, "largest_token_id", read)
    for largest, size, named in ((8, 8, known), (6, 7, unknown)):
        write_manifest(known, max_token_id=largest)
        with pytest.raises(ShardError, match=rf"{named}: token id \d, but the vocabulary has {size:,} ids?; the shard"):
            Plan.from_spec(spec).check_vocabulary(size)
    write_manifest(known, max_token_id=9, tokenizer={"vocab_size": 9})
    with pytest.raises(ShardError, match="has gaps: train with --tokenizer-type NullTokenizer --vocab-size 10 or more"):
        Plan.from_spec(spec).check_vocabulary(9)


def copied_shards(built: Path, folder: Path, count: int) -> Path:
    """A folder with the same shard several times, under numbers."""
    folder.mkdir()
    for number in range(count):
        for path in built.glob("shard_00000_text_document*"):
            shutil.copy(path, folder / path.name.replace("00000", f"{number:05}"))
    return folder


@pytest.mark.parametrize("odd", [0, 1, 4, 8])
def test_one_shard_of_another_tokenizer_is_found_wherever_it_stands_in_its_source(
    built: tuple[Path, Path], tmp_path: Path, odd: int
) -> None:
    """Only the first and the last shard of a source were compared."""
    folder = copied_shards(built[0], tmp_path / "s", 9)
    assert Plan.from_spec(plan_of([folder])).num_samples > 0
    edit_manifest(folder / f"shard_{odd:05}_text_document.manifest.json", fingerprint="0" * 64)
    with pytest.raises(ShardError, match=r"were built with different tokenizers .* of 9 shards differ") as caught:
        Plan.from_spec(plan_of([folder]))
    assert f"shard_{odd:05}" in str(caught.value)


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_shards_of_one_source_end_their_documents_alike(built: tuple[Path, Path], tmp_path: Path, odd: int) -> None:
    folder = copied_shards(built[0], tmp_path / "s", 3)
    path = folder / f"shard_{odd:05}_text_document.manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"append_eod": True}))
    with pytest.raises(ShardError, match=r"source 's0': documents of .* end with .*--append-eod or all") as caught:
        Plan.from_spec(plan_of([folder]))
    assert f"shard_{odd:05}" in str(caught.value)
    (finding,) = (row for row in describe_source("s", str(folder))["findings"] if row["kind"] == "eod")
    assert finding["file"] == str(path)
    assert "documents with the end-of-document id at their end, other shards without; build" in finding["message"]
    parts = [tmp_path / "with", tmp_path / "without"]
    for part, numbers in zip(parts, ([odd], [n for n in range(3) if n != odd]), strict=True):
        part.mkdir()
        for number in numbers:
            for file in folder.glob(f"shard_{number:05}*"):
                shutil.copy(file, part)
    assert Plan.from_spec(plan_of(parts)).num_samples > 0  # as two sources they may
