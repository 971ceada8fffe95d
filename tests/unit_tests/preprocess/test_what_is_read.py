"""Every entry of a folder, every format, column and special token is read, or it is named."""

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from megatron_kaiyuan.errors import ConfigError, PreprocessError, TokenizerError
from megatron_kaiyuan.preprocess import TokenizerConfig, dry_run, load_manifest, preprocess
from megatron_kaiyuan.preprocess.inputs import find_inputs
from tests.unit_tests.preprocess.corpus import (
    SilentReporter,
    build,
    null_config,
    number_rows,
    output_bytes,
    read_shard_by_hand,
    write_jsonl,
    write_parquet,
)

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": lambda data: bytes(pa.Codec("zstd").compress(data, asbytes=True)),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".lz4": lambda data: bytes(pa.Codec("lz4").compress(data, asbytes=True)),
}


def texts_of(prefix: Path) -> list[str]:
    return [" ".join(map(str, document)) for document in read_shard_by_hand(f"{prefix}_text_document")]


@pytest.fixture
def lake(tmp_path: Path) -> Path:
    """A folder with a document in every place where one can lie; the text says which."""
    folder, elsewhere = tmp_path / "lake", tmp_path / "elsewhere"
    for place in (folder / "sub" / "deep", folder / ".cache", elsewhere / "inner"):
        place.mkdir(parents=True)
    for number, path in enumerate(
        (
            folder / "a.jsonl",
            folder / "sub" / "deep" / "b.JSON",
            elsewhere / "c.ndjson",
            elsewhere / "inner" / "d.jsonl",
        )
    ):
        write_jsonl(path, [{"text": str(number)}])
    write_jsonl(folder / ".cache" / "a-checkpoint.jsonl", [{"text": "99"}])
    (folder / "web").symlink_to("../elsewhere")
    (folder / "sub" / "up").symlink_to("..")
    (folder / "notes.txt").write_text("not a document")
    (folder / "more.jsonl.br").write_bytes(b"packed")
    (folder / ".hidden.jsonl").write_text('{"text": "98"}')
    return folder


def test_a_folder_is_searched_through_links_once_and_says_what_it_leaves_out(tmp_path: Path, lake: Path) -> None:
    reporter = SilentReporter([])
    preprocess(null_config([lake], tmp_path / "out"), reporter)
    assert sorted(texts_of(tmp_path / "out")) == ["0", "1", "2", "3"]
    found = load_manifest(f"{tmp_path}/out_text_document").left_out
    assert {reason: record.names for reason, record in found.items()} == {
        "hidden": [f"{lake}/.cache/", f"{lake}/.hidden.jsonl"],
        "other_suffix": [f"{lake}/more.jsonl.br", f"{lake}/notes.txt"],
        "searched_already": [f"{lake}/sub/up/"],
    }
    assert all(record.count == len(record.names) for record in found.values())
    assert all(name in reporter.notes[0] for record in found.values() for name in record.names)


@pytest.mark.parametrize("pattern", ["**/*.[jnJ]*", "**", "*"])
def test_a_glob_reaches_what_the_folder_does(
    tmp_path: Path, lake: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    monkeypatch.chdir(lake)
    (lake / "notes.txt").unlink()
    (lake / "more.jsonl.br").unlink()
    names = [[file.name for file in find_inputs([form])[0]] for form in (pattern, f"{lake}/{pattern}")]
    assert [f"{lake}/{name}" for name in names[0]] == names[1]
    assert sorted(Path(name).name for name in names[0]) == ["a.jsonl", "b.JSON", "c.ndjson", "d.jsonl"]


def test_a_hidden_folder_is_read_when_it_is_named(tmp_path: Path, lake: Path) -> None:
    build([lake / ".cache"], tmp_path / "out")
    assert texts_of(tmp_path / "out") == ["99"]
    build([lake / ".*.jsonl"], tmp_path / "glob")
    assert texts_of(tmp_path / "glob") == ["98"]


def test_a_folder_that_cannot_be_opened_is_an_unreadable_file(
    tmp_path: Path, lake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = os.scandir

    def refusing(path: str) -> Any:
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(PreprocessError, match="deep: Permission denied"):
        build([lake], tmp_path / "out")
    assert build([lake], tmp_path / "out", on_error="skip").skipped == {"unreadable_file": 1}


def test_one_file_under_two_names_is_refused_whatever_the_link(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", [{"text": "1"}])
    (tmp_path / "b.jsonl").hardlink_to(first)
    with pytest.raises(PreprocessError, match=r"b\.jsonl is named twice \(also as .*a\.jsonl"):
        build([tmp_path / "*.jsonl"], tmp_path / "out" / "p")


def test_the_output_may_not_lie_behind_a_link_that_is_searched(tmp_path: Path, lake: Path) -> None:
    with pytest.raises(ConfigError, match="is searched for documents"):
        build([lake], tmp_path / "elsewhere" / "out")


def test_a_name_that_no_manifest_can_hold_is_refused(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl")
    Path(path).write_text('{"text": "1"}')
    with pytest.raises(PreprocessError, match=r"caf\\xe9\.jsonl': the name is not UTF-8"):
        build([tmp_path / "*.jsonl"], tmp_path / "out" / "p")


@pytest.mark.parametrize("name", ["a\n\x1b[2Jb.jsonl", "a*[b].jsonl", "-a 'b\".jsonl", "ü🙂.jsonl"])
def test_any_other_name_is_read(tmp_path: Path, name: str) -> None:
    write_jsonl(tmp_path / name, [{"text": "1"}])
    build([tmp_path / name], tmp_path / "out")
    assert load_manifest(f"{tmp_path}/out_text_document").inputs[0].name == f"{tmp_path}/{name}"


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_compressed_file_gives_the_shard_of_the_plain_one(tmp_path: Path, suffix: str) -> None:
    rows = number_rows(300)
    data = write_jsonl(tmp_path / "plain.jsonl", rows).read_bytes()
    (tmp_path / "in").mkdir()
    packed = PACKERS[suffix]
    (tmp_path / "in" / f"rows.jsonl{suffix}").write_bytes(packed(data[:5000]) + packed(data[5000:]))
    build([tmp_path / "plain.jsonl"], tmp_path / "plain", score_keys=("score",))
    build([tmp_path / "in"], tmp_path / "packed", score_keys=("score",), block_bytes=700)
    for end in (".bin", ".idx", ".scores.score.npy"):
        assert output_bytes(tmp_path / "packed")[end] == output_bytes(tmp_path / "plain")[end]


@pytest.mark.parametrize("suffix", [".bz2", ".xz", ".lz4"])
@pytest.mark.parametrize("damage", ["cut", "rubbish"])
def test_damage_is_one_unreadable_file_and_costs_no_whole_row_before_it(
    tmp_path: Path, suffix: str, damage: str
) -> None:
    rows = number_rows(3000)
    whole = PACKERS[suffix](b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(whole[:-1] if damage == "cut" else whole + b"rubbish")
    assert build([path], tmp_path / "out", on_error="skip").skipped == {"unreadable_file": 1}
    texts = texts_of(tmp_path / "out")
    assert texts == [row["text"] for row in rows[: len(texts)]]
    assert len(texts) > 2980


def utf16(text: str) -> bytes:
    return text.encode("utf-16")


FOREIGN = {
    "array.json": (b'[\n {"text": "1 2"},\n {"text": "3"}\n]\n', r"JSON array over the whole file.*jq -c '\.\[\]'"),
    "line.json": (b'[{"text": "1 2"}, {"text": "3"}]', r"JSON array over the whole file"),
    "empty.json": (b" [ ]\n", "JSON array over the whole file"),
    "u16.jsonl": (utf16('{"text": "1 2"}\n'), "UTF-16 .*iconv -f UTF-16 -t UTF-8"),
    "u16le.jsonl": ('{"text": "1 2"}\n'.encode("utf-16-le"), "iconv -f UTF-16LE -t UTF-8"),
    "u16be.jsonl": ('{"text": "1 2"}\n'.encode("utf-16-be"), "iconv -f UTF-16BE -t UTF-8"),
    "u32.jsonl": ('{"text": "1 2"}\n'.encode("utf-32"), "iconv -f UTF-32 -t UTF-8"),
    "u16.jsonl.gz": (gzip.compress(utf16('{"text": "1 2"}\n')), "iconv -f UTF-16 -t UTF-8"),
    "latin.jsonl": (b'{"text":"caf\xe9"}\n', "byte 12 of the line: not UTF-8 .*iconv -f WINDOWS-1252"),
    "pretty.json": (b'{\n  "text": "1 2"\n}\n', "JSON over several lines.*jq -c"),
    "rows.zip": (b"PK\x03\x04" + b"\0" * 40, "a ZIP archive; unpack it"),
    "rows.feather": (b"ARROW1\0\0", "an Arrow .* as JSONL or Parquet"),
    "rows.tar": (b"a.jsonl".ljust(257, b"\0") + b"ustar\x0000", "a tar archive"),
    "rows.idx": (b"MMIDIDX\0\0", "needs no preprocessing"),
    "empty.jsonl.xz": (b"", "belie its suffix: it is not xz"),
    "binary.jsonl": (b'{"text": "\x00\x01"}\n', "zero bytes"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_jsonl_is_named_with_its_remedy(tmp_path: Path, name: str) -> None:
    content, told = FOREIGN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PreprocessError, match=f"{name}.*{told}"):
        build([tmp_path / name], tmp_path / "out")


def test_a_row_that_is_an_array_is_one_faulty_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'[1, 2]\n{"text": "3"}\n[4]\n')
    assert build([tmp_path / "a.jsonl"], tmp_path / "out", on_error="skip").skipped == {"broken_json": 2}
    assert texts_of(tmp_path / "out") == ["3"]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"text": "1"}, "no field 'metadata'; the fields here are text"),
        ({"text": "1", "metadata": {"q": 1}}, r"no field 'metadata.quality'; the fields in 'metadata' here are q"),
        ({"text": "1", "metadata": '{"quality": 1}'}, "'metadata' is the text .*, without fields of its own"),
        ({"text": "1", "metadata": None}, "'metadata' is null, without fields of its own"),
    ],
)
def test_a_missing_nested_field_says_where_the_way_ends(tmp_path: Path, row: dict[str, Any], told: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    with pytest.raises(PreprocessError, match=told):
        build([path], tmp_path / "out", score_keys=("metadata.quality",))


def test_whole_numbers_keep_their_order(tmp_path: Path) -> None:
    """Neighbours of 2^24 and 2^53 are ties in float32 and float64."""
    scores = [2**24, 2**24 + 1, 2**53 - 1, 2**53]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "1", "score": score} for score in scores])
    build([path], tmp_path / "out", score_keys=("score",))
    assert np.load(tmp_path / "out_text_document.scores.score.npy").tolist() == scores
    path = write_jsonl(tmp_path / "b.jsonl", [{"text": "1", "score": score} for score in (2**53 + 1, 2**60, 0.25)])
    summary = build([path], tmp_path / "more", score_keys=("score",), on_error="skip")
    assert summary.skipped == {"inexact_score": 1}
    assert np.load(tmp_path / "more_text_document.scores.score.npy").dtype == np.float32


def test_one_pass_counts_every_reason_and_writes_nothing(tmp_path: Path) -> None:
    lines = [
        {"text": "1 2", "score": 1},
        {"text": "1"},
        {"text": "1", "score": None},
        {"text": "", "score": 1},
        {"score": 1},
        {"text": "x", "score": 1},
        {"text": "3 999", "score": 1},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", lines)
    told = dry_run(null_config([path], tmp_path / "o", score_keys=("score",), append_eod=True), SilentReporter([]))
    assert told.skipped == {
        "missing_score": 1,
        "null_score": 1,
        "empty_document": 1,
        "missing_key": 1,
        "not_tokenizable": 1,
    }
    assert (told.rows, told.documents, told.tokens, told.faulty_rows) == (7, 2, {"text": 6}, 5)
    assert told.special_tokens["text"].documents_with_eod == 1
    assert sorted(tmp_path.iterdir()) == [path]


def test_the_dry_run_refuses_what_the_run_refuses(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "1"}])
    build([path], tmp_path / "o")
    with pytest.raises(ConfigError, match="exists"):
        dry_run(null_config([path], tmp_path / "o", append_eod=True), SilentReporter([]))


def words_tokenizer(folder: Path, *, ends_itself: bool = False, gap: int = 0) -> TokenizerConfig:
    """Words with ids 0 to 3, of which 0 is the special end of text."""
    vocabulary = {"<|endoftext|>": 0, "a": 1, "b": 2, "<": 3 + gap, "|": 4 + gap, "endoftext": 5 + gap, ">": 6 + gap}
    tokenizer = Tokenizer(models.WordLevel({**vocabulary, "[UNK]": 7 + gap}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    if ends_itself:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
        )
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return TokenizerConfig(type="HuggingFaceTokenizer", model=str(folder))


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("ends_itself", [False, True])
def test_special_tokens_in_texts_are_counted_or_split(tmp_path: Path, split: bool, ends_itself: bool) -> None:  # noqa: FBT001
    base = words_tokenizer(tmp_path / "t", ends_itself=ends_itself)
    config = TokenizerConfig(type=base.type, model=base.model, split_special_tokens=split)
    rows = [{"text": "a b"}, {"text": "a <|endoftext|> b <|endoftext|>"}, {"text": "<|endoftext|>"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    build([path], tmp_path / "o", tokenizer=config, append_eod=True)
    end = [0, 0] if ends_itself else [0]
    token = [3, 4, 5, 4, 6] if split else [0]
    assert read_shard_by_hand(tmp_path / "o_text_document") == [
        [1, 2, *end],
        [1, *token, 2, *token, *end],
        [*token, *end],
    ]
    found = load_manifest(f"{tmp_path}/o_text_document").special_tokens
    assert found is not None
    assert found.occurrences == ({} if split else {"<|endoftext|>": 3})
    assert found.documents_with_eod == (0 if split else 2)
    assert found.documents_ending_twice == (3 if ends_itself else 0 if split else 2)


def test_the_flag_is_part_of_what_the_tokenizer_is(tmp_path: Path) -> None:
    base = words_tokenizer(tmp_path / "t")
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    build([path], tmp_path / "o", tokenizer=base)
    split = TokenizerConfig(type=base.type, model=base.model, split_special_tokens=True)
    with pytest.raises(ConfigError, match="other flags"):
        build([path], tmp_path / "o", tokenizer=split)
    with pytest.raises(TokenizerError, match="--split-special-tokens: the text of a NullTokenizer is ids"):
        TokenizerConfig(type="NullTokenizer", vocab_size=9, split_special_tokens=True)


def test_a_vocabulary_with_gaps_is_refused_and_its_remedy_works(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a <"}])
    gapped = words_tokenizer(tmp_path / "t", gap=5)
    with pytest.raises(TokenizerError, match=r"8 entries with ids up to 12, no entry for 5 of them \(3, 4, 5, 6, 7\)"):
        build([path], tmp_path / "o", tokenizer=gapped)
    file = tmp_path / "t" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"] |= {f"<unused{number}>": number for number in range(3, 8)}
    file.write_text(json.dumps(content))
    build([path], tmp_path / "o", tokenizer=gapped)
    manifest = load_manifest(f"{tmp_path}/o_text_document")
    assert (manifest.tokenizer.vocab_size, manifest.max_token_id) == (13, 8)


def test_documents_of_parquet_and_jsonl_lie_side_by_side(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_parquet(tmp_path / "in" / "a.PARQUET", number_rows(5))
    write_jsonl(tmp_path / "in" / "b.jsonl", number_rows(5))
    build([tmp_path / "in"], tmp_path / "out")
    assert len(texts_of(tmp_path / "out")) == 10
