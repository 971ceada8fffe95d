"""Folders that are not one whole source: several text keys in one, and builds that are not finished."""

from pathlib import Path

import pytest

from megatron_kaiyuan.data import Plan, open_shard, open_source
from megatron_kaiyuan.errors import ShardError
from megatron_kaiyuan.inspection.describe import describe_source
from tests.unit_tests.data.tiny import numbered_documents, phase_of, plan_of, write_manifest, write_shard
from tests.unit_tests.preprocess.corpus import build, build_folder, write_jsonl


def write_shards(folder, *names, manifest=None):
    """Shards of these names; each with a manifest of the key in `manifest`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        write_shard(folder / name, numbered_documents([5] * 4, 100 * number))
        if manifest is not None:
            write_manifest(folder / name, json_key=manifest[number], max_token_id=1000)
    return folder


def plan(shards):
    return Plan.from_spec(plan_of({"web": {"shards": shards}}, phase_of("shuffled", {"web": "all"})))


def shards_of(shards):
    return [Path(shard.prefix).name for shard in open_source("web", shards).shards]


def test_two_keys_of_the_same_rows_are_refused_and_each_alone_is_taken(tmp_path):
    folder = write_shards(tmp_path / "d", "p_text_document", "p_title_document", "q_text_document", "q_title_document")
    for item in (str(folder), f"{folder}/*", f"{folder}/p_*", f"{folder}/*.idx", f"{tmp_path}/*/*", f"{folder}/*.bin"):
        with pytest.raises(ShardError, match=r"source 'web': .*several --json-keys \(text: \d, title: \d\)") as caught:
            plan(item)
        where = str(folder) if item.startswith(str(folder)) else f"{tmp_path}/*"
        assert f"name one of them, {where}/*_text_document or {where}/*_title_document" in str(caught.value)
    for key in ("text", "title"):
        assert shards_of(f"{folder}/*_{key}_document") == [f"p_{key}_document", f"q_{key}_document"]
    both = [f"{folder}/*_{key}_document" for key in ("text", "title")]
    assert len(shards_of(both)) == 4
    assert shards_of([f"{folder}/p_text_document", f"{folder}/p_title_document"]) == [
        "p_text_document",
        "p_title_document",
    ]


NAMES = {
    "one key": (["a_text_document", "b_text_document"], None),
    "data sets with fields of different names": (["dolma_text_document", "stack_content_document"], None),
    "the same, with manifests": (["dolma_text_document", "stack_content_document"], ["text", "content"]),
    "data sets whose names begin alike": (["wiki_text_document", "wiki_clean_text_document"], None),
    "the same, with manifests of one key": (["wiki_text_document", "wiki_clean_text_document"], ["text", "text"]),
    "names of another kind": (["part-0", "part-1", "document", "text_document"], None),
}


@pytest.mark.parametrize("name", NAMES)
def test_shards_that_may_well_be_of_different_rows_are_one_source(tmp_path, name):
    names, manifest = NAMES[name]
    folder = write_shards(tmp_path / "d", *names, manifest=manifest)
    assert shards_of(str(folder)) == sorted(names)


@pytest.mark.parametrize("keys", [("text", "clean_text"), ("text", "my_title"), ("a_b", "b")])
def test_keys_with_underscores_are_told_by_the_manifests(tmp_path, keys):
    """By their names alone these could be two data sets of one key."""
    folder = write_shards(tmp_path / "d", *(f"p_{key}_document" for key in keys), manifest=keys)
    with pytest.raises(ShardError, match="several --json-keys") as caught:
        plan(str(folder))
    assert all(f"{key}: 1" in str(caught.value) for key in keys)


def test_a_working_directory_and_a_path_that_ends_in_a_slash_are_checked_too(tmp_path, monkeypatch):
    folder = write_shards(tmp_path / "d", "p_text_document", "p_title_document")
    monkeypatch.chdir(folder)
    for item in (".", "*", f"{folder}/", "p_*"):
        with pytest.raises(ShardError, match="several --json-keys"):
            plan(item)


@pytest.fixture
def rows(tmp_path):
    rows = [{"text": f"{n} 2 3", "title": f"{n} 1", "clean_text": f"7 {n}"} for n in range(40)]
    return write_jsonl(tmp_path / "rows.jsonl", rows)


def test_shards_of_preprocessing_with_several_keys_are_refused(tmp_path, rows):
    """A folder of shards, by its build record; single shards, by their manifests; and inspection says so."""
    keys = ["text", "title", "clean_text"]
    build_folder([rows], tmp_path / "many", json_keys=tuple(keys), shard_bytes=200)
    (tmp_path / "one").mkdir()
    build([rows], tmp_path / "one" / "p", json_keys=("text", "clean_text"))
    for folder in (tmp_path / "many", tmp_path / "one"):
        with pytest.raises(ShardError, match=r"several --json-keys \(clean_text: \d+, text: \d+"):
            plan(str(folder))
        findings = describe_source("web", str(folder))["findings"]
        assert [finding["kind"] for finding in findings] == ["keys"]
        assert open_source("web", f"{folder}/*_clean_text_document").num_tokens == 80
        assert describe_source("web", f"{folder}/*_clean_text_document")["findings"] == []


@pytest.fixture
def half(tmp_path, rows):
    """A folder of shards in two keys, of which shard 1 lacks its title and shard 3 everything."""
    folder = tmp_path / "out"
    build_folder([rows], folder, json_keys=("text", "title"), shard_bytes=150)
    assert len(list(folder.glob("*_text_document.idx"))) > 4
    for path in [*folder.glob("shard_00001_title_document.idx"), *folder.glob("shard_00003_*")]:
        path.unlink()
    return folder


MISSING = {
    "*_text_document": "3",
    "*_title_document": "1, 3",
    "*_title_document.idx": "1, 3",
    "shard_0000[0-3]_text_document": "3",
    "shard_0000[13]_title_document": "1, 3",
}


@pytest.mark.parametrize("pattern", MISSING)
def test_a_glob_of_a_folder_half_built_is_refused_with_the_shards_it_lacks(half, pattern):
    for item in (f"{half}/{pattern}", f"{half.parent}/o*/{pattern}", f"{half.parent}/**/{pattern}"):
        with pytest.raises(ShardError, match=rf"shards are missing \({MISSING[pattern]}\); run the same .*one by one"):
            plan(item)
        if "**" not in item and "[13]" not in item:  # the latter names nothing that is there
            findings = describe_source("web", item)["findings"]
            assert [finding["kind"] for finding in findings] == ["missing"]


def test_what_is_there_can_be_named_all_the_same(half):
    """A glob that no missing shard matches, or shards one by one."""
    assert len(shards_of(f"{half}/shard_0000[02]_text_document")) == 2
    assert len(shards_of(f"{half}/shard_0000[0-2]_text_document")) == 3
    present = sorted(str(path)[:-4] for path in half.glob("*_title_document.idx"))
    assert [Path(name).name for name in present if open_shard(name).documents] == shards_of(present)


def test_a_folder_that_a_glob_would_reach_is_checked_though_nothing_of_it_is_built(half, tmp_path):
    """Its build has begun; a source without it would be silently smaller."""
    (tmp_path / "out2").mkdir()
    (tmp_path / "out2" / "build.json").write_text((half / "build.json").read_text())
    for path in half.iterdir():
        path.unlink()
    write_shards(half, "a_text_document")
    with pytest.raises(ShardError, match=r"out2: \d+ of \d+ shards are missing"):
        plan(f"{tmp_path}/out*/*_text_document")
