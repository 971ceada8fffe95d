"""What a source is described as, against a count by hand."""

import numpy as np
import pytest

from megatron_kaiyuan.data import open_source
from megatron_kaiyuan.documents.rank_index import build_rank_index, index_path, save_rank_index
from megatron_kaiyuan.errors import ScoreError
from megatron_kaiyuan.inspection.describe import describe_source
from tests.unit_tests.data.tiny import numbered_documents, write_shard, write_source
from tests.unit_tests.preprocess.corpus import build, number_rows, write_jsonl

LENGTHS = [1, 2, 3, 40, 500, 6, 7, 800, 0, 10]
SCORES = [0.5, 2, 1, 4, 3, 9, 8, 7, 6, 5]


@pytest.fixture
def folder(tmp_path):
    write_source(tmp_path / "web", numbered_documents(LENGTHS), SCORES, cuts=[3, 7])
    return tmp_path / "web"


def test_counts_lengths_and_scores_are_those_of_the_documents(folder):
    told = describe_source("web", str(folder))
    assert (told["shards"], told["documents"], told["tokens"]) == (3, 10, sum(LENGTHS))
    assert told["dtypes"] == {"int32": 3}
    assert told["bytes"] == 4 * sum(LENGTHS)
    lengths = told["lengths"]
    assert lengths["exact"]
    assert lengths["mean"] == sum(LENGTHS) / 10
    assert [lengths["quantiles"][key] for key in ("0", "0.1", "0.5", "1")] == [0, 0, 6, 800]
    assert sum(row["documents"] for row in lengths["bins"]) == 10
    assert sum(row["tokens"] for row in lengths["bins"]) == sum(LENGTHS)
    for row in lengths["bins"]:
        inside = [length for length in LENGTHS if row["low"] <= length < row["high"]]
        assert (row["documents"], row["tokens"]) == (len(inside), sum(inside))
    score = told["scores"]["score"]
    assert score["grades"] == sorted(SCORES)
    assert score["band_tokens"] == [length for _, length in sorted(zip(SCORES, LENGTHS, strict=True))]
    assert told["findings"] == []


def test_many_different_scores_are_counted_in_bins_that_hold_all_of_them(tmp_path):
    rng = np.random.default_rng(0)
    scores = np.append(rng.normal(size=500), [1e9, -1e9]).astype(np.float32)
    write_source(tmp_path / "web", numbered_documents([3] * 502), scores.tolist())
    score = describe_source("web", str(tmp_path / "web"))["scores"]["score"]
    assert score["grades"] is None
    assert sum(row["documents"] for row in score["bins"]) == 502
    assert max(row["documents"] for row in score["bins"]) < 150, "two outliers squeezed all others into one bin"


def test_manifests_are_summed_up(tmp_path):
    for number in range(2):
        rows = [*number_rows(5, seed=number), {"text": "1"}, {"text": "", "score": 1}]
        path = write_jsonl(tmp_path / f"{number}.jsonl", rows)
        build([path], tmp_path / "s" / f"p{number}", score_keys=("score",), on_error="skip")
    write_shard(tmp_path / "s" / "stock", [[1]], [1])
    told = describe_source("s", str(tmp_path / "s"))["manifests"]
    assert (told["present"], told["missing"], told["unreadable"]) == (2, 1, 0)
    assert told["skipped"] == {"missing_score": 2, "empty_document": 2}
    assert (told["input_files"], told["input_rows"]) == (2, 14)
    (tokenizer,) = told["tokenizers"]
    assert (tokenizer["type"], tokenizer["vocab_size"], tokenizer["shards"]) == ("NullTokenizer", 1000, 2)
    assert tokenizer["appended_eod_id"] is None


def test_the_state_of_a_rank_index_is_told(folder):
    def state():
        told = describe_source("web", str(folder))
        return told["scores"]["score"]["rank_index"]["state"], [row["kind"] for row in told["findings"]]

    assert state() == ("missing", [])
    source = open_source("web", str(folder))
    save_rank_index(build_rank_index(source, "score"), index_path(source, "score"))
    assert state() == ("present", [])
    np.save(folder / "part-000.scores.score.npy", np.zeros(3, np.float32))
    assert state() == ("stale", ["rank index"])


def test_what_cannot_be_read_is_left_out_and_named(folder):
    (folder / "part-000.bin").write_bytes(b"")
    np.save(folder / "part-001.scores.score.npy", np.zeros(2))
    (folder / "part-002.manifest.json").write_text("{}")
    told = describe_source("web", str(folder))
    assert (told["shards"], told["documents"]) == (3, 7)
    assert told["scores"]["score"]["count"] == 3
    kinds = {(row["kind"], row["file"].rpartition("/")[2]) for row in told["findings"]}
    assert {("unreadable", "part-000.idx"), ("scores", "part-001.scores.score.npy")} <= kinds
    assert ("manifest", "part-002.manifest.json") in kinds


def test_nan_scores_are_counted(folder):
    np.save(folder / "part-000.scores.score.npy", np.array([1, np.nan, 2], np.float32))
    score = describe_source("web", str(folder))["scores"]["score"]
    assert (score["count"], score["nan"]) == (9, 1)


def test_only_the_scores_asked_for_are_described_and_unknown_ones_refused(folder):
    for number, count in enumerate((3, 4, 3)):
        np.save(folder / f"part-00{number}.scores.other.npy", np.arange(count))
    assert list(describe_source("web", str(folder))["scores"]) == ["other", "score"]
    assert list(describe_source("web", str(folder), scores=["other"])["scores"]) == ["other"]
    with pytest.raises(ScoreError, match=r"--score fun: no shard has these scores \(there: other, score\)"):
        describe_source("web", str(folder), scores=["fun"])


def test_a_source_without_scores_and_one_without_documents_can_be_described(tmp_path):
    write_shard(tmp_path / "plain", [[1, 2], [3]])
    write_shard(tmp_path / "empty", [])
    assert describe_source("x", str(tmp_path / "plain"))["scores"] == {}
    assert describe_source("x", str(tmp_path / "empty"))["lengths"] == {"count": 0, "nan": 0}
