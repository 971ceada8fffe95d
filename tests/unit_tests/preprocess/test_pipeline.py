import gzip
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_kaiyuan.errors import ConfigError, KaiyuanError, PreprocessError, ShardError, TokenizerError
from megatron_kaiyuan.preprocess import TokenizerConfig, load_manifest, pipeline, preprocess, verify_manifest
from megatron_kaiyuan.shards.manifest import manifest_path
from tests.unit_tests.preprocess.corpus import (
    NULL_VOCABULARY,
    SilentReporter,
    build,
    needs_gigatoken,
    null_config,
    number_rows,
    output_bytes,
    read_shard_by_hand,
    save_bpe,
    write_jsonl,
    write_parquet,
)

SCORES = ("score", "metadata.quality")


def expected_documents(rows: list[dict[str, Any]], eod: bool) -> list[list[int]]:  # noqa: FBT001
    return [[*map(int, row["text"].split()), *([NULL_VOCABULARY - 1] if eod else [])] for row in rows]


@pytest.mark.parametrize("append_eod", [True, False])
def test_documents_and_scores_arrive_in_input_order(tmp_path: Path, append_eod: bool) -> None:  # noqa: FBT001
    rows = number_rows(50)
    inputs = [write_jsonl(tmp_path / "b.jsonl", rows[:20]), write_jsonl(tmp_path / "a.jsonl.gz", rows[20:])]
    build(inputs, tmp_path / "out", score_keys=SCORES, append_eod=append_eod, block_bytes=100)
    assert read_shard_by_hand(tmp_path / "out_text_document") == expected_documents(rows, append_eod)
    quality = np.load(tmp_path / "out_text_document.scores.metadata.quality.npy")
    score = np.load(tmp_path / "out_text_document.scores.score.npy")
    assert quality.tolist() == list(range(50))
    assert score.tolist() == [np.float32(row["score"]) for row in rows]


def without_table(files: dict[str, bytes]) -> dict[str, bytes]:
    """Less the table that names the input file of each document."""
    assert ".documents.parquet" in files
    return {name: content for name, content in files.items() if name != ".documents.parquet"}


def test_every_input_format_gives_the_same_bytes(tmp_path: Path) -> None:
    rows = number_rows(60)
    plain = write_jsonl(tmp_path / "rows.jsonl", rows)
    build([plain], tmp_path / "plain", score_keys=SCORES)
    others = {
        "gzip": write_jsonl(tmp_path / "rows.jsonl.gz", rows),
        "zstd": write_jsonl(tmp_path / "rows.jsonl.zst", rows),
        "parquet": write_parquet(tmp_path / "rows.parquet", rows),
    }
    for name, path in others.items():
        build([path], tmp_path / name, score_keys=SCORES)
        assert without_table(output_bytes(tmp_path / name)) == without_table(output_bytes(tmp_path / "plain")), name


def test_number_of_workers_and_size_of_blocks_do_not_change_the_output(tmp_path: Path) -> None:
    rows = number_rows(80)
    inputs = [write_jsonl(tmp_path / "a.jsonl", rows[:60]), write_parquet(tmp_path / "b.parquet", rows[60:])]
    settings = {"score_keys": SCORES, "append_eod": True}
    build(inputs, tmp_path / "one" / "out", **settings)
    build(inputs, tmp_path / "two" / "out", workers=2, block_bytes=300, **settings)
    assert output_bytes(tmp_path / "one" / "out") == output_bytes(tmp_path / "two" / "out")
    manifests = [manifest_path(str(tmp_path / name / "out_text_document")) for name in ("one", "two")]
    assert manifests[0].read_bytes() == manifests[1].read_bytes()


@needs_gigatoken
def test_real_tokenizer_gives_the_same_shard_fast_and_slow(tmp_path: Path) -> None:
    rows = [{"text": text} for text in ("", "The quick brown fox", "naïve 日本語 \u200d 1234", "  spaces \n\t")]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    tokenizer = TokenizerConfig(type="HuggingFaceTokenizer", model=str(save_bpe(tmp_path / "bpe", with_bos=True)))
    notes = []
    for backend in ("auto", "reference"):
        reporter = SilentReporter([])
        preprocess(
            null_config(
                [path], tmp_path / backend, tokenizer=tokenizer, backend=backend, append_eod=True, on_error="skip"
            ),
            reporter,
        )
        assert load_manifest(str(tmp_path / f"{backend}_text_document")).skipped == {"empty_document": 1}
        notes.append(reporter.notes)
    assert output_bytes(tmp_path / "auto") == output_bytes(tmp_path / "reference")
    assert [note.partition(";")[0] for note in notes[0]][1:] == ["tokenizer: gigatoken"]
    assert notes[1] == notes[0][:1]
    assert notes[1][0].startswith("warning: the tokenizer's post-processor ends each text with id 0 itself")


def test_several_text_keys_give_shards_that_stay_row_by_row_together(tmp_path: Path) -> None:
    rows = [{"a": "1 2", "b": "3", "score": 0}, {"a": "4", "b": "", "score": 1}, {"a": "5", "b": "6 7", "score": 2}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    build([path], tmp_path / "out", json_keys=("a", "b"), score_keys=("score",), on_error="skip")
    assert read_shard_by_hand(tmp_path / "out_a_document") == [[1, 2], [5]]
    assert read_shard_by_hand(tmp_path / "out_b_document") == [[3], [6, 7]]
    for key in ("a", "b"):
        assert np.load(tmp_path / f"out_{key}_document.scores.score.npy").tolist() == [0, 2]


def test_manifest_says_what_the_shard_holds(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "5 7", "score": 1}, {"text": "", "score": 9}])
    with path.open("a") as stream:
        stream.write("\n")
    build([path], tmp_path / "out", score_keys=("score",), append_eod=True, on_error="skip")
    manifest = verify_manifest(str(tmp_path / "out_text_document"))
    assert (manifest.documents, manifest.tokens, manifest.max_token_id) == (1, 3, NULL_VOCABULARY - 1)
    assert manifest.skipped == {"blank_line": 1, "empty_document": 1}
    assert manifest.inputs[0].model_dump() == {
        "name": str(path),
        "bytes": path.stat().st_size,
        "rows": 3,
        "start": 0,
        "stop": None,
    }
    assert manifest.scores["score"].model_dump() == {"min": 1, "max": 1, "mean": 1}
    assert manifest.tokenizer.eod_id == NULL_VOCABULARY - 1
    assert set(manifest.files) == {"bin", "idx", "documents", "scores.score"}
    assert manifest.dtype == "uint16"


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".scores.score.npy"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_verifying_names_the_file_that_differs(tmp_path: Path, suffix: str, damage: str) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", number_rows(5))
    build([path], tmp_path / "out", score_keys=("score",))
    prefix = str(tmp_path / "out_text_document")
    victim = Path(prefix + suffix)
    data = victim.read_bytes()
    victim.write_bytes(data[:-1] if damage == "truncated" else data[:-1] + bytes([data[-1] ^ 1]))
    if damage == "missing":
        victim.unlink()
    with pytest.raises(ShardError, match=victim.name.replace(".", r"\.")):
        verify_manifest(prefix)


def test_damaged_manifest_names_the_field(tmp_path: Path) -> None:
    build([write_jsonl(tmp_path / "rows.jsonl", number_rows(5))], tmp_path / "out")
    prefix = str(tmp_path / "out_text_document")
    content = json.loads(manifest_path(prefix).read_text())
    manifest_path(prefix).write_text(json.dumps({**content, "extra": 1}))
    with pytest.raises(ShardError, match="extra: no field that this version knows"):
        load_manifest(prefix)
    manifest_path(prefix).unlink()
    with pytest.raises(ShardError, match="no such manifest"):
        load_manifest(prefix)


GOOD = b'{"text": "1 2", "score": 0.5}\n'
FAULTS = {
    "invalid_utf8": (b'{"text": "1 \xff", "score": 1}\n', "byte 12 of the line"),
    "surrogate": (b'{"text": "1 \\ud800", "score": 1}\n', "half of a surrogate pair"),
    "broken_json": (b'{"text": "1 2", "sco\n', "not JSON"),
    "array": (b'[{"text": "1"}]\n', "a JSON array instead of an object"),
    "missing_key": (b'{"body": "1 2", "score": 1}\n', "no field 'text'; the fields here are body, score"),
    "not_text": (b'{"text": 12, "score": 1}\n', "holds the number 12 instead of text"),
    "missing_score": (b'{"text": "1 2"}\n', "no score: no field 'score'; the fields here are text"),
    "null_score": (b'{"text": "1 2", "score": null}\n', "score 'score' is null"),
    "non_numeric_score": (b'{"text": "1 2", "score": "high"}\n', "is the text 'high' instead of a number"),
    "boolean_score": (b'{"text": "1 2", "score": true}\n', "is the truth value True instead of a number"),
    "nan_score": (b'{"text": "1 2", "score": NaN}\n', "not a finite float32"),
    "infinite_score": (b'{"text": "1 2", "score": 1e39}\n', "not a finite float32"),
    "huge_score": (b'{"text": "1 2", "score": 1' + b"0" * 400 + b"}\n", "not a finite float32"),
    "inexact_score": (b'{"text": "1 2", "score": 9007199254740993}\n', "beyond 2.53 that float64 rounds to 9007"),
    "not_tokenizable": (b'{"text": "one", "score": 1}\n', "field 'text': 'one' is not a list of ids"),
    "empty_document": (b'{"text": "", "score": 1}\n', "has no tokens"),
    "too_long": (b'{"text": "1 2 3 4", "score": 1}\n', "has 4 tokens, the limit is 3"),
}
REASONS = {
    "surrogate": "invalid_utf8",
    "array": "broken_json",
    "boolean_score": "non_numeric_score",
    "infinite_score": "nan_score",
    "huge_score": "nan_score",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_stops_with_its_line_or_is_counted(tmp_path: Path, fault: str) -> None:
    line, message = FAULTS[fault]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD * 3 + line + GOOD)
    settings: dict[str, Any] = {"score_keys": ("score",), "max_document_tokens": 3, "block_bytes": 40}
    with pytest.raises(PreprocessError, match=rf"rows\.jsonl:4: .*{message}.*--on-error skip"):
        build([path], tmp_path / "stop", **settings)
    assert list(tmp_path.iterdir()) == [path]
    summary = build([path], tmp_path / "skip", on_error="skip", **settings)
    reason = REASONS.get(fault, fault)
    assert summary.skipped == {reason: 1}
    assert summary.examples[reason].startswith(f"{path}:4: ")
    assert read_shard_by_hand(tmp_path / "skip_text_document") == [[1, 2]] * 4
    assert load_manifest(str(tmp_path / "skip_text_document")).skipped == {reason: 1}


def test_the_first_fault_of_a_block_is_the_one_reported(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + FAULTS["empty_document"][0] + FAULTS["broken_json"][0])
    with pytest.raises(PreprocessError, match=r"rows\.jsonl:2: field 'text' has no tokens"):
        build([path], tmp_path / "out")


def test_parquet_faults_name_the_row(tmp_path: Path) -> None:
    text = pa.array([b"1", b"2", b"\xff", None], type=pa.binary()).view(pa.string())
    scores = pa.StructArray.from_arrays([pa.array([1.0, math.nan, 1.0, 1.0])], names=["quality"])
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": text, "metadata": scores, "unused": [0, 1, 2, 3]}), path)
    with pytest.raises(PreprocessError, match=r"rows\.parquet:2: score 'metadata\.quality' is nan"):
        build([path], tmp_path / "out", score_keys=("metadata.quality",))
    summary = build([path], tmp_path / "out", score_keys=("metadata.quality",), on_error="skip")
    assert summary.skipped == {"nan_score": 1, "invalid_utf8": 1, "not_text": 1}
    with pytest.raises(PreprocessError, match=r"rows\.parquet:1: no field 'body'; the fields here are metadata, "):
        build([path], tmp_path / "other", json_keys=("body",))


def test_parquet_keeps_dictionaries_and_names_with_dots(tmp_path: Path) -> None:
    table = pa.table({"text": pa.array(["1", "2", "1"]).dictionary_encode(), "a.b": [1, 2, 3]})
    pq.write_table(table, tmp_path / "rows.parquet")
    build([tmp_path / "rows.parquet"], tmp_path / "out", score_keys=("a.b",))
    assert read_shard_by_hand(tmp_path / "out_text_document") == [[1], [2], [1]]
    assert np.load(tmp_path / "out_text_document.scores.a.b.npy").tolist() == [1, 2, 3]


def damaged_files(folder: Path) -> dict[str, Path]:
    files = {name: folder / name for name in ("cut.gz", "cut.zst", "cut.parquet", "empty.gz")}
    for suffix, path in ((".gz", files["cut.gz"]), (".zst", files["cut.zst"])):
        whole = write_jsonl(folder / f"whole{suffix}", number_rows(200)).read_bytes()
        path.write_bytes(whole[: len(whole) - 20])
        (folder / f"whole{suffix}").unlink()
    write_parquet(files["cut.parquet"], number_rows(20))
    files["cut.parquet"].write_bytes(files["cut.parquet"].read_bytes()[:-30])
    files["empty.gz"].write_bytes(b"")
    return files


@pytest.mark.parametrize("name", ["cut.gz", "cut.zst", "cut.parquet", "empty.gz"])
def test_damaged_files_stop_or_are_counted(tmp_path: Path, name: str) -> None:
    path = damaged_files(tmp_path)[name]
    good = write_jsonl(tmp_path / "good.jsonl", [{"text": "7"}])
    with pytest.raises(PreprocessError, match=rf"{name}: .*--on-error skip"):
        build([path, good], tmp_path / "out")
    summary = build([path, good], tmp_path / "out", on_error="skip")
    # the last line before the damage may be torn, and is then counted too
    assert summary.skipped["unreadable_file"] == 1
    assert read_shard_by_hand(tmp_path / "out_text_document")[-1] == [7]


def test_byte_order_mark_and_windows_line_ends_are_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "1 2"}\r\n{"text": "3"}\r\n')
    build([path], tmp_path / "out")
    assert read_shard_by_hand(tmp_path / "out_text_document") == [[1, 2], [3]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no document in 0 rows; the input is empty"),
        (b'{"text": ""}\n', "no document in 1 row; skipped: 1 x empty"),
    ],
)
def test_no_document_at_all_is_an_error(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(PreprocessError, match=message):
        build([path], tmp_path / "out", on_error="skip")
    assert list(tmp_path.iterdir()) == [path]


def test_end_token_that_does_not_exist_is_an_error_before_any_work(tmp_path: Path) -> None:
    folder = save_bpe(tmp_path / "bpe", eos=None)
    content = json.loads((folder / "tokenizer.json").read_text().replace("<|endoftext|>", "<unknown>"))
    (folder / "tokenizer.json").write_text(json.dumps(content))
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a"}])
    tokenizer = TokenizerConfig(type="HuggingFaceTokenizer", model=str(folder))
    build([path], tmp_path / "without", tokenizer=tokenizer)
    with pytest.raises(TokenizerError, match=r"--append-eod: .*--eod-token"):
        build([path], tmp_path / "with", tokenizer=tokenizer, append_eod=True)


def test_id_that_does_not_fit_its_type_is_an_error_and_not_another_id(tmp_path: Path) -> None:
    folder = save_bpe(tmp_path / "bpe")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 70_000, "content": "<far>"})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = TokenizerConfig(type="HuggingFaceTokenizer", model=str(folder))
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a <far> b"}])
    try:
        build([path], tmp_path / "out", tokenizer=tokenizer, backend="reference")
    except KaiyuanError:
        assert not (tmp_path / "out_text_document.bin").exists()
    else:  # the library may renumber the token instead of leaving a gap
        assert max(read_shard_by_hand(tmp_path / "out_text_document")[0]) < 65500


def test_id_over_the_type_on_disk_is_never_wrapped_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "optimal_dtype", lambda vocab_size: np.dtype(np.uint16))
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "65535"}, {"text": "65536"}])
    tokenizer = TokenizerConfig(type="NullTokenizer", vocab_size=100_000)
    with pytest.raises(TokenizerError, match="token id 65536 does not fit uint16"):
        build([path], tmp_path / "out", tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == [path]


def test_the_end_token_does_not_count_towards_the_limit(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "1 2 3"}, {"text": "1 2 3 4"}])
    summary = build([path], tmp_path / "out", max_document_tokens=3, append_eod=True, on_error="skip")
    assert summary.skipped == {"too_long": 1}
    assert read_shard_by_hand(tmp_path / "out_text_document") == [[1, 2, 3, NULL_VOCABULARY - 1]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": 0}, "--workers 0: must be at least 1"),
        ({"max_document_tokens": 0}, "--max-document-tokens 0"),
        ({"json_keys": ("a", "a")}, "--json-keys a a: a key is given twice"),
        ({"json_keys": ()}, "--json-keys: name at least one"),
        ({"score_keys": ("a/b",)}, "--score-key 'a/b'"),
        ({"output_prefix": ""}, "--output-prefix '': names nothing; give a path"),
        ({"output_prefix": None, "output_dir": ""}, "--output-dir '': names nothing"),
        ({"inputs": ("",)}, "--input '': names nothing"),
    ],
)
def test_flags_that_cannot_work_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(null_config([tmp_path], tmp_path / "out"), **settings)


def test_compressed_input_is_not_held_in_memory_at_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD * 2000))
    reporter = SilentReporter([])
    preprocess(null_config([path], tmp_path / "out", block_bytes=1000), reporter)
    assert reporter.last is not None
    assert reporter.last.input_bytes == reporter.total_bytes == path.stat().st_size
    assert reporter.last.documents == 2000
