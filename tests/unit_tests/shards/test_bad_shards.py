"""Shards and scores that cannot be meant: each refused with the file and a remedy, before a token is read."""

import json
import struct

import numpy as np
import pytest

from megatron_kaiyuan.data import CurriculumDataset, Plan, open_shard, open_source, resolve_prefixes
from megatron_kaiyuan.errors import ScoreError, ShardError
from megatron_kaiyuan.shards import index_check
from tests.unit_tests.data.tiny import (
    UINT16_CODE,
    numbered_documents,
    phase_of,
    plan_of,
    write_manifest,
    write_shard,
    write_source,
)

HEADER = struct.Struct("<9sQBQQ")


@pytest.fixture
def prefix(tmp_path):
    return write_shard(tmp_path / "shard", numbered_documents([3, 4, 5]), [1, 2, 3])


def plan(*prefixes, keep="all", order="curriculum", **more):
    sources = {"web": {"shards": list(prefixes), "score": "score"}}
    return Plan.from_spec(plan_of(sources, phase_of(order, {"web": keep}), seq_length=2, **more))


def edit(path, change):
    with open(path, "rb") as stream:  # noqa: PTH123
        raw = change(stream.read())
    with open(path, "wb") as stream:  # noqa: PTH123
        stream.write(raw)


def header(**fields):
    """A change of named header fields of an `.idx`."""
    names = ("magic", "version", "code", "sequences", "boundaries")

    def change(raw):
        values = dict(zip(names, HEADER.unpack(raw[: HEADER.size]), strict=True)) | fields
        return HEADER.pack(*values.values()) + raw[HEADER.size :]

    return change


DAMAGES = {
    "truncated bin": (".bin", lambda raw: raw[:-4], r"44 bytes, but .*\.idx ends at byte 48: the file is truncated"),
    "truncated bin by a byte": (".bin", lambda raw: raw[:-1], "47 bytes, but .* is truncated"),
    "empty bin": (".bin", lambda raw: b"", "0 bytes, but .* is truncated"),
    "longer bin": (".bin", lambda raw: raw + b"\0" * 4, "is longer than its index says.*copy or build both again"),
    "truncated idx": (".idx", lambda raw: raw[:-1], r"its header asks for \d+; the file is truncated, copy it again"),
    "idx cut in its header": (".idx", lambda raw: raw[:20], "not a Megatron index"),
    "empty idx": (".idx", lambda raw: b"", "not a Megatron index"),
    "longer idx": (".idx", lambda raw: raw + b"\0", "the file is damaged, copy it again"),
    "wrong magic": (".idx", header(magic=b"PARQUET\0\0"), "not a Megatron index .*rebuild the shard"),
    "version 2": (".idx", header(version=2), "index version 2, only version 1 is known; rebuild it"),
    "float tokens": (".idx", header(code=7), "dtype code 7 does not hold token ids; expected one of"),
    "double tokens": (".idx", header(code=6), "dtype code 6 does not hold token ids"),
    "unknown dtype": (".idx", header(code=99), "dtype code 99 does not hold token ids"),
    "another dtype": (".idx", header(code=8), "is longer than its index says"),
    "a boundary too few": (".idx", header(boundaries=3), "its header asks for"),
    "no boundary": (".idx", lambda raw: header(boundaries=0)(raw)[:-32], "no document boundary"),
    "absurd count": (".idx", header(sequences=2**60, boundaries=2**60 + 1), "the file is truncated"),
}


def word(array, entry, value):
    """A change of one entry of `lengths`, `pointers` or `boundaries` of an `.idx`; entry -1 is the last."""

    def change(raw):
        documents = HEADER.unpack(raw[: HEADER.size])[3]
        first, count, kind = {
            "lengths": (34, documents, np.int32),
            "pointers": (34 + 4 * documents, documents, np.int64),
            "boundaries": (34 + 12 * documents, documents + 1, np.int64),
        }[array]
        numbers = np.frombuffer(raw, kind, count, first).copy()
        numbers[entry] = value
        return raw[:first] + numbers.tobytes() + raw[first + numbers.nbytes :]

    return change


DAMAGES |= {
    "first pointer": (".idx", word("pointers", 0, 8), "first document begins at byte 8, .* the file is damaged"),
    "negative last pointer": (".idx", word("pointers", -1, -4), "at byte -4, .* the file is damaged"),
    "last pointer inside a token": (".idx", word("pointers", -1, 33), "at byte 33, .* the file is damaged"),
    "negative last length": (".idx", word("lengths", -1, -1), "last one of -1 tokens .* the file is damaged"),
    "first boundary": (".idx", word("boundaries", 0, 1), "numbered 1 to .* the file is damaged"),
    "last boundary": (".idx", word("boundaries", -1, 9), "numbered 0 to 9 of .* the file is damaged"),
}


@pytest.mark.parametrize(("array", "value"), [("lengths", 1000), ("pointers", 4), ("pointers", 1 << 40)])
def test_a_document_in_the_middle_that_runs_into_its_neighbour_stops_the_plan(tmp_path, monkeypatch, array, value):
    prefix = write_shard(tmp_path / "shard", numbered_documents([3, 4, 5, 4, 3]))
    spec = plan_of({"web": {"shards": prefix}}, phase_of("shuffled", {"web": "all"}), seq_length=2)
    assert Plan.from_spec(spec).fingerprint
    edit(f"{prefix}.idx", word(array, 2, value))
    with pytest.raises(
        ShardError, match=r"shard\.idx: documents that do not begin where the one before ends: \d, the fi"
    ):
        Plan.from_spec(spec)
    monkeypatch.setattr(index_check, "CHECKED_BYTES", 0)  # as with a large one, which is not read in whole
    with pytest.raises(ShardError, match=r"shard\.idx: document \d does not end where the next one begins .* damaged"):
        _ = Plan.from_spec(spec).fingerprint


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_shard_is_refused_by_file_name(prefix, name):
    suffix, change, message = DAMAGES[name]
    edit(prefix + suffix, change)
    with pytest.raises(ShardError, match=message) as caught:
        plan(prefix)
    assert prefix + suffix in str(caught.value)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_half_of_a_shard_is_named(prefix, tmp_path, suffix):
    (tmp_path / f"shard{suffix}").unlink()
    with pytest.raises(ShardError, match=rf"shard{suffix} does not exist .*without its suffix, or build it with"):
        open_shard(prefix)


def test_a_shard_without_tokens_or_documents_is_refused(tmp_path):
    for number, documents in enumerate(([], [[], []])):
        empty = write_shard(tmp_path / f"empty{number}", documents)
        with pytest.raises(ShardError, match=r"source 'web': .* holds no tokens; check the preprocessing log"):
            plan(empty)


def test_an_empty_shard_among_others_is_passed_over(prefix, tmp_path):
    empty = write_shard(tmp_path / "a-empty", [])
    assert plan(empty, prefix).num_samples == plan(prefix).num_samples


def test_a_multimodal_index_with_its_mode_bytes_is_read(prefix):
    before = plan(prefix).num_samples
    edit(prefix + ".idx", lambda raw: raw + b"\0\0\0")
    assert plan(prefix).num_samples == before


def test_names_that_match_nothing_are_refused_with_the_folder_looked_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("empty", "directory without .idx files"),
        ("shard_*", "glob that matches no .idx file"),
        ("nowhere/shard", r"nowhere/shard\.idx does not exist"),
    ):
        with pytest.raises(ShardError, match=message) as caught:
            open_source("web", name)
        assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("alias", ["{0}/shard", "{0}/shard.idx", "{0}/sh*", "{0}", "{0}/../{1}/shard", "shard", "link"])
def test_a_shard_named_twice_is_refused(prefix, tmp_path, monkeypatch, alias):
    monkeypatch.chdir(tmp_path)
    for suffix in (".bin", ".idx"):
        if alias == "link":
            (tmp_path / f"link{suffix}").symlink_to(f"shard{suffix}")
    again = alias.format(tmp_path, tmp_path.name)
    with pytest.raises(ShardError, match="is named twice; name each shard once and use repeat"):
        resolve_prefixes([prefix, again])


def test_megatrons_cache_beside_a_shard_does_not_hide_it(tmp_path):
    write_shard(tmp_path / "web", [[1, 2, 3]])
    (tmp_path / "web" / "cache" / "GPTDataset_indices").mkdir(parents=True)  # without --data-cache-path
    assert resolve_prefixes(str(tmp_path / "web")) == [str(tmp_path / "web")]
    write_shard(tmp_path / "web" / "part", [[1, 2, 3]])  # a folder of shards it is only with shards in it
    assert resolve_prefixes(str(tmp_path / "web")) == [str(tmp_path / "web" / "part")]


def test_prefixes_directories_and_globs_name_the_same_shards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_source(tmp_path / "s", numbered_documents([5] * 9), cuts=[3, 6])
    whole = [str(tmp_path / "s" / f"part-00{number}") for number in range(3)]
    assert resolve_prefixes(str(tmp_path / "s")) == whole
    assert resolve_prefixes(str(tmp_path / "s" / "part-*")) == whole
    assert resolve_prefixes(str(tmp_path / "s" / "*.bin")) == whole
    assert resolve_prefixes(str(tmp_path / "**" / "part-*")) == whole
    assert resolve_prefixes(whole[::-1]) == whole[::-1]
    assert resolve_prefixes("s/part-001.bin") == ["s/part-001"]


def test_shards_of_two_token_types_are_not_one_source(prefix, tmp_path):
    other = write_shard(tmp_path / "other", [[1, 2]], [0], UINT16_CODE)
    with pytest.raises(ShardError, match=r"source 'web': .*shard holds int32 tokens and .*other uint16; .*rebuild"):
        plan(prefix, other)


@pytest.mark.parametrize("manifest", [True, False])
def test_a_token_outside_the_vocabulary_is_found_and_its_shard_named(prefix, tmp_path, manifest):
    if manifest:
        write_manifest(prefix, max_token_id=11)
    opened = plan(prefix)
    opened.check_vocabulary(12)
    with pytest.raises(ShardError, match=r"source 'web', shard .*shard: token id 11, but the vocabulary has 11 ids"):
        opened.check_vocabulary(11)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"max_token_id": null}', "\xff"])
def test_a_damaged_manifest_is_refused_by_name(prefix, tmp_path, text):
    (tmp_path / "shard.manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ShardError, match=r"shard\.manifest\.json: .*restore the file or rebuild the shard"):
        plan(prefix)


def test_a_plan_refuses_a_manifest_that_training_would(prefix):
    """The dry run and the run have one reader."""
    path = write_manifest(prefix)
    plan(prefix)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "extra": 1}))
    with pytest.raises(ShardError, match=r"manifest\.json: extra: no field that this version knows"):
        plan(prefix)
    del content["tokenizer"]["fingerprint"]
    path.write_text(json.dumps(content))
    with pytest.raises(ShardError, match=r"manifest\.json: tokenizer\.fingerprint: Field required"):
        plan(prefix)


def test_a_negative_token_is_outside_every_vocabulary(tmp_path):
    prefix = write_shard(tmp_path / "shard", [[1, -2, 3, 4]], [0])
    with pytest.raises(ShardError, match=r"token id .*but the vocabulary has 1,000 ids"):
        plan(prefix).check_vocabulary(1000)


def replace_scores(tmp_path, scores):
    np.save(tmp_path / "shard.scores.score.npy", scores)


BAD_SCORES = {
    "too few": (np.zeros(2), r"shape \(2,\), but the shard has 3 documents; .*write them again"),
    "too many": (np.zeros(4), r"shape \(4,\), but the shard has 3 documents"),
    "a table": (np.zeros((3, 2)), r"shape \(3, 2\)"),
    "one number": (np.array(1.0), r"shape \(\)"),
    "text": (np.array(["a", "b", "c"]), "dtype <U1 is not a number; scores are floats, higher is better"),
    "booleans": (np.zeros(3, bool), "dtype bool is not a number"),
}


@pytest.mark.parametrize("order", ["shuffled", "curriculum"])
@pytest.mark.parametrize("name", BAD_SCORES)
def test_scores_that_do_not_fit_their_documents_are_refused_by_file_name(prefix, tmp_path, name, order):
    scores, message = BAD_SCORES[name]
    replace_scores(tmp_path, scores)
    with pytest.raises(ScoreError, match=message) as caught:
        _ = plan(prefix, order=order).fingerprint
    assert f"{prefix}.scores.score.npy" in str(caught.value)


def test_a_score_that_is_not_a_number_is_refused_with_its_document(prefix, tmp_path):
    replace_scores(tmp_path, np.array([1, np.nan, np.nan], np.float32))
    with pytest.raises(ScoreError, match=r"2 scores are NaN, the first for document 1; .*score it, or leave it out"):
        plan(prefix)


@pytest.mark.parametrize("order", ["shuffled", "curriculum"])
def test_a_missing_sidecar_is_refused_with_those_that_are_there(prefix, tmp_path, order):
    (tmp_path / "shard.scores.score.npy").rename(tmp_path / "shard.scores.quality.npy")
    with pytest.raises(ScoreError, match=r"no such score sidecar \(there: shard\.scores\.quality\.npy\); build") as e:
        _ = plan(prefix, order=order).fingerprint
    assert f"{prefix}.scores.score.npy" in str(e.value)


@pytest.mark.parametrize("damage", ["short", "five bytes", "empty", "text"])
def test_a_damaged_sidecar_is_refused_by_file_name(prefix, damage):
    changes = {"short": lambda raw: raw[:-3], "five bytes": lambda raw: raw[:5], "empty": lambda raw: b""}
    edit(f"{prefix}.scores.score.npy", changes.get(damage, lambda raw: b"score\n1\n"))
    with pytest.raises(ScoreError, match=r"scores\.score\.npy: not a whole \.npy file of numbers .*write the scores"):
        plan(prefix)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32, np.int64, np.uint8])
def test_scores_may_be_any_kind_of_number(prefix, tmp_path, dtype):
    replace_scores(tmp_path, np.array([3, 1, 2], dtype))
    order = CurriculumDataset(plan(prefix))
    assert order[len(order) - 1]["tokens"].tolist()[-1] == 2
