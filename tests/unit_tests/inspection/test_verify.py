"""The full check of shards: whatever is done to a file is found, and the file and the kind of damage are named."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest

from megatron_kaiyuan.data import open_source
from megatron_kaiyuan.documents.rank_index import build_rank_index, index_path, save_rank_index
from megatron_kaiyuan.errors import ShardError
from megatron_kaiyuan.inspection.verify import verify_shards
from megatron_kaiyuan.preprocess import TokenizerConfig
from tests.unit_tests.data.tiny import UINT16_CODE, write_shard
from tests.unit_tests.preprocess.corpus import build, number_rows, write_jsonl

NAMES = ("a", "b", "c")
VOCABULARY = 1000


def stem(name):
    return f"{name}_text_document"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Three shards as the tool writes them, of 6, 7 and 8 documents."""
    folder = tmp_path_factory.mktemp("built")
    for number, name in enumerate(NAMES):
        rows = write_jsonl(folder / f"{name}.jsonl", number_rows(6 + number, seed=number))
        build([rows], folder / "shards" / name, score_keys=("score",))
    return {path.name: path.read_bytes() for path in (folder / "shards").iterdir()}


@pytest.fixture
def folder(built, tmp_path):
    for name, data in built.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def found(folder, **options):
    """Kind and file name of every finding."""
    return {(item.kind, Path(item.file).name) for item in verify_shards(str(folder), **options).findings}


def messages(folder, **options):
    return "\n".join(item.message for item in verify_shards(str(folder), **options).findings)


def change(path, edit):
    data = bytearray(path.read_bytes())
    path.write_bytes(bytes(edit(data) or data))


def flip(place, bit=0):
    def edit(data):
        data[place] ^= 1 << bit

    return edit


def swap(first, second):
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)


def drop_manifests(folder):
    for path in folder.glob("*.manifest.json"):
        path.unlink()


def test_whole_shards_have_no_findings_and_every_byte_of_them_is_read(folder, built):
    checked = verify_shards(str(folder))
    assert (checked.findings, checked.unchecked, checked.shards) == ([], [], 3)
    assert checked.bytes == sum(len(data) for name, data in built.items() if not name.endswith(".json"))


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".scores.score.npy"])
def test_one_flipped_bit_at_any_byte_of_a_file_is_found_in_that_file(folder, suffix):
    path = folder / f"{stem('b')}{suffix}"
    rng = random.Random(suffix)
    whole = path.read_bytes()
    for place in range(len(whole)):
        change(path, flip(place, rng.randrange(8)))
        kinds = {kind for kind, name in found(folder) if name == path.name}
        assert kinds & {"checksum", "index", "scores"}, f"byte {place}"
        path.write_bytes(whole)


def test_a_flipped_bit_among_lengths_pointers_or_boundaries_is_found_without_a_manifest(folder):
    drop_manifests(folder)
    path = folder / f"{stem('a')}.idx"
    whole = path.read_bytes()
    for place in range(34, len(whole)):
        change(path, flip(place, place % 8))
        # the end of the last document is also compared with the size of the .bin, when the shard is opened
        assert found(folder) & {("index", path.name), ("size", f"{stem('a')}.bin")}, f"byte {place}"
        path.write_bytes(whole)


def test_a_damaged_index_is_told_with_the_document_and_both_bytes(folder):
    path = folder / f"{stem('a')}.idx"
    lengths = np.frombuffer(path.read_bytes(), np.int32, 6, 34)
    wrong = np.array([-1, lengths[0] + lengths[1] + 1, *lengths[2:]], np.int32)
    change(path, lambda data: data[:34] + wrong.tobytes() + data[58:])
    told = messages(folder)
    assert "negative lengths: 1, the first: document 0 has -1" in told
    assert f"the first: document 1 begins at byte {2 * lengths[0]}, not at -2" in told


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".scores.score.npy", ".manifest.json"])
@pytest.mark.parametrize("damage", ["one byte short", "half", "empty", "one byte more", "gone"])
def test_a_file_of_another_size_is_found_and_named(folder, suffix, damage):
    path = folder / f"{stem('b')}{suffix}"
    edits = {
        "one byte short": lambda data: data[:-3],  # the manifest ends with a newline
        "half": lambda data: data[: len(data) // 2],
        "one byte more": lambda data: data + b"{",
    }
    if damage == "gone":
        path.unlink()
        if suffix == ".idx":  # then the .bin is all that is left of the shard, together with what belongs to it
            assert ("leftover", f"{stem('b')}.bin") in found(folder)
            return
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        change(path, edits[damage])
    expected = {"missing"} if damage == "gone" else {"size", "index", "scores", "manifest"}
    assert {kind for kind, name in found(folder) if name == path.name} & expected


def test_a_scores_file_that_the_manifest_lists_is_missed_even_if_no_shard_has_it(folder):
    for path in folder.glob("*.npy"):
        path.unlink()
    assert found(folder) == {("missing", f"{stem(name)}.scores.score.npy") for name in NAMES}


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".scores.score.npy"])
def test_files_swapped_between_shards_are_found_and_each_is_told_whose_bytes_it_holds(folder, suffix):
    first, second = (folder / f"{stem(name)}{suffix}" for name in "ac")
    swap(first, second)
    assert {("swapped", first.name), ("swapped", second.name)} <= found(folder)
    told = messages(folder)
    assert f"holds the bytes of {second}" in told
    assert f"holds the bytes of {first}" in told
    assert not [item for item in verify_shards(str(folder)).findings if stem("b") in item.file]


def test_swapped_manifests_are_found_as_such_and_not_as_damage_of_their_shards(folder):
    first, second = (folder / f"{stem(name)}.manifest.json" for name in "ac")
    swap(first, second)
    kinds = found(folder)
    assert {name for kind, name in kinds} == {first.name, second.name}
    assert {("swapped", first.name), ("swapped", second.name)} <= kinds


def test_a_shard_renamed_without_its_manifest_is_named(folder):
    for path in list(folder.glob(f"{stem('a')}.*")):
        path.rename(folder / path.name.replace("a_", "z_"))
    assert found(folder) == {("swapped", f"{stem('z')}.manifest.json")}
    assert f"describes {stem('a')}.bin, not {stem('z')}.bin" in messages(folder)


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        (np.zeros(8), r"shape \(8,\), but the shard has 7 documents"),
        (np.zeros((7, 1)), r"shape \(7, 1\)"),
        (np.array(["x"] * 7), "is not a number"),
        (np.array([0, np.nan, 1, np.nan, 0, 0, 0], np.float32), "2 scores are NaN, the first for document 1"),
    ],
)
def test_scores_that_do_not_fit_their_shard_are_found(folder, scores, words):
    path = folder / f"{stem('b')}.scores.score.npy"
    np.save(path, scores)
    assert ("scores", path.name) in found(folder)
    assert any(item.kind == "scores" and re.search(words, item.message) for item in verify_shards(str(folder)).findings)


def test_scores_written_again_after_the_manifest_are_told_apart_from_damage_only_as_possible(folder):
    path = folder / f"{stem('b')}.scores.score.npy"
    np.save(path, np.zeros(7, np.float32))
    assert found(folder) == {("checksum", path.name)}
    assert "the scores were written again since, or bits have flipped" in messages(folder)


def test_scores_that_only_some_shards_have_are_missed_in_the_others(folder):
    np.save(folder / f"{stem('b')}.scores.extra.npy", np.zeros(7))
    assert found(folder) == {("missing", f"{stem(name)}.scores.extra.npy") for name in "ac"}


def test_ids_outside_the_vocabulary_are_found_with_the_first_and_its_document(folder):
    documents = [np.frombuffer((folder / f"{stem(name)}.bin").read_bytes(), np.uint16) for name in NAMES]
    limit = int(max(tokens.max() for tokens in documents))
    assert found(folder, vocab_size=limit + 1) == set()
    holders = {("vocabulary", f"{stem(n)}.bin") for n, t in zip(NAMES, documents, strict=True) if t.max() == limit}
    assert found(folder, vocab_size=limit) == holders
    shard = open_source("s", str(folder / stem("a"))).shards[0]
    small = int(documents[0][0])  # some id of the first document is not below it
    first = int(np.flatnonzero(documents[0] >= small)[0])
    assert f"the first is {documents[0][first]} in document {shard.document_of_token(first)}" in messages(
        folder / stem("a"), vocab_size=small
    )


def test_the_vocabulary_is_that_of_the_manifest_unless_another_is_given(folder):
    path = folder / f"{stem('a')}.manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["tokenizer"]["vocab_size"] == VOCABULARY
    manifest["tokenizer"]["vocab_size"] = manifest["max_token_id"]
    path.write_text(json.dumps(manifest))
    assert found(folder) == {("vocabulary", f"{stem('a')}.bin")}


def test_negative_ids_are_found_without_manifest_and_without_vocabulary(tmp_path):
    write_shard(tmp_path / "shard", [[1, 2], [3, -4, 5]])
    checked = verify_shards(str(tmp_path))
    assert [(item.kind, Path(item.file).name) for item in checked.findings] == [("vocabulary", "shard.bin")]
    assert "the first is -4 in document 1" in checked.findings[0].message
    assert ["no readable manifest" in checked.unchecked[0], "give --vocab-size" in checked.unchecked[1]] == [True] * 2


def test_a_manifest_that_contradicts_its_shard_is_found(folder):
    path = folder / f"{stem('a')}.manifest.json"
    whole = json.loads(path.read_text())
    for field, value in (("documents", 5), ("tokens", 1), ("dtype", "int32"), ("max_token_id", 3)):
        path.write_text(json.dumps(whole | {field: value}))
        assert found(folder) == {("manifest", path.name)}, field
        assert f"{field} {value}" in messages(folder)


def test_a_stale_or_damaged_rank_index_is_found(folder):
    source = open_source("s", str(folder))
    path = index_path(source, "score")
    save_rank_index(build_rank_index(source, "score"), path)
    assert found(folder) == set()
    whole = path.read_bytes()
    change(path, flip(len(whole) - 1))
    assert found(folder) == {("rank index", path.name)}
    path.write_bytes(whole)
    drop_manifests(folder)
    np.save(folder / f"{stem('b')}.scores.score.npy", np.arange(7, dtype=np.float32))
    assert found(folder) == {("rank index", path.name)}
    assert "built from other shards or scores" in messages(folder)


def test_a_rank_index_elsewhere_is_checked_where_the_plan_says(folder, tmp_path_factory):
    source = open_source("s", str(folder))
    path = tmp_path_factory.mktemp("ranks") / "mine.rank"
    save_rank_index(build_rank_index(source, "score"), path)
    assert found(folder, rank_indexes={"score": path}) == set()
    change(path, flip(-1))
    assert found(folder, rank_indexes={"score": path}) == {("rank index", "mine.rank")}


def test_what_interrupted_builds_left_is_found_by_directory_prefix_and_glob(folder):
    left = {"d_text_document.bin.partial", "d_text_document.lengths.partial", ".x.score.rank.ab12", "orphan.bin"}
    for name in left:
        (folder / name).write_bytes(b"left")
    assert found(folder) == {("leftover", name) for name in left}
    (folder / f"{stem('a')}.bin.partial").write_bytes(b"left")
    for name in (folder / stem("a"), folder / f"{stem('a')}.idx", folder / "[a]_text_document"):
        assert found(name) == {("leftover", f"{stem('a')}.bin.partial")}


def test_shards_of_two_tokenizers_or_token_types_in_one_source_are_found(folder):
    rows = write_jsonl(folder / "rows.jsonl", number_rows(5, seed=9))
    tokenizer = TokenizerConfig(type="NullTokenizer", vocab_size=VOCABULARY + 1)
    build([rows], folder / "d", score_keys=("score",), tokenizer=tokenizer)
    assert found(folder) == {("tokenizer", f"{stem('d')}.manifest.json")}
    drop_manifests(folder)
    write_shard(folder / "e", [[1, 2]], [0.5])
    assert found(folder) == {("dtype", "e.idx")}


def test_a_shard_without_manifest_among_others_that_have_one_is_found(folder):
    write_shard(folder / "e", [[1, 2]], [0.5], UINT16_CODE)
    assert found(folder) == {("missing", "e.manifest.json")}


def test_the_same_documents_twice_are_found(folder):
    for path in list(folder.glob(f"{stem('a')}.*")):
        text = path.read_bytes()
        name = path.name.replace("a_", "d_")
        (folder / name).write_bytes(text.replace(b"a_text", b"d_text") if path.suffix == ".json" else text)
    assert found(folder) == {("duplicate", f"{stem('d')}.bin")}


def test_all_that_is_wrong_is_found_at_once_in_the_order_of_the_shards(folder):
    change(folder / f"{stem('a')}.bin", flip(0))
    (folder / f"{stem('b')}.manifest.json").write_text("{")
    np.save(folder / f"{stem('c')}.scores.score.npy", np.zeros(2))
    (folder / "x.bin.partial").touch()
    kinds = [item.kind for item in verify_shards(str(folder)).findings]
    assert kinds[0] == "manifest"
    assert [kind for kind in kinds[1:] if kind != "vocabulary"] == ["checksum", "scores", "size", "leftover"]


def test_nothing_to_verify_is_an_error_and_not_a_success(tmp_path):
    with pytest.raises(ShardError, match=r"directory without \.idx files"):
        verify_shards(str(tmp_path))


def test_a_meter_hears_of_every_byte(folder):
    class Meter:
        total = done = 0

        def start(self, what, total):
            self.total = total

        def advance(self, amount):
            self.done += amount

    meter = Meter()
    verify_shards(str(folder), meter=meter)
    assert meter.done == meter.total > 0


@pytest.fixture
def small_pieces(monkeypatch):
    """Files are read 8 bytes, or two documents, at a time."""
    monkeypatch.setattr("megatron_kaiyuan.inspection.shard_scan._BLOCK_BYTES", 8)
    monkeypatch.setattr("megatron_kaiyuan.shards.shard_files.CHUNK", 2)


def test_reading_in_pieces_finds_nothing_in_whole_shards(folder, small_pieces):
    assert found(folder) == set()


def test_places_are_told_right_when_they_lie_beyond_the_first_piece(tmp_path, small_pieces):
    prefix = write_shard(tmp_path / "shard", [[1, 2, 3], [4], [5, 6], [7, 800, 9], [10]], [0, 1, 2, np.nan, 4])
    told = messages(prefix, vocab_size=100)
    assert "ids outside a vocabulary of 100: 1, the first is 800 in document 3" in told
    assert "1 score is NaN, the first for document 3" in told
    path = Path(f"{prefix}.idx")
    lengths = np.array([3, 1, 2, 2, 2], np.int32)  # document 3 is a token short, document 4 one too long
    change(path, lambda data: data[:34] + lengths.tobytes() + data[54:])
    (tmp_path / "shard.bin").write_bytes(np.arange(11, dtype=np.int32).tobytes())
    assert "the first: document 4 begins at byte 36, not at 32" in messages(prefix)


def test_boundaries_are_compared_beyond_the_first_piece(folder, small_pieces):
    drop_manifests(folder)
    path = folder / f"{stem('a')}.idx"
    change(path, flip(-9))  # the last one is compared when the shard is opened
    assert found(folder) == {("index", path.name)}
    assert "document boundaries that are not one sequence apart: 1" in messages(folder)
