"""Every input of a release is read whole or refused in a sentence, and proves that it is of the run."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_kaiyuan.checkpoints.averaging import average_checkpoints, choose_checkpoints
from megatron_kaiyuan.checkpoints.identity import PLAN_RECORD
from megatron_kaiyuan.checkpoints.lineage import COMMANDS, STARTS
from megatron_kaiyuan.checkpoints.reading import open_checkpoint
from megatron_kaiyuan.errors import ReleaseError
from megatron_kaiyuan.release.cards import hub_metadata, render_cards
from megatron_kaiyuan.release.kit import examine_release, facts_of_release
from megatron_kaiyuan.release.markdown import address
from tests.unit_tests.export.small_models import save_model
from tests.unit_tests.release.test_release import MODEL, evaluation_of, folder, parts_of, request_of  # noqa: F401
from tests.unit_tests.reporting.run_files import entry, write_run


def refused(folder: Path, **changes: Any) -> list[str]:  # noqa: F811
    return examine_release(parts_of(folder), request_of(folder, **changes))[1]


ODD: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "a folder": lambda path: path.mkdir(),
    "empty": lambda path: path.write_bytes(b""),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe\x00{"),
    "truncated": lambda path: path.write_text('{"results": [{"label": "a"'),
    "deep": lambda path: path.write_text("[" * 200_000),
    "a list": lambda path: path.write_text("[]"),
    "a number": lambda path: path.write_text("7"),
    "other fields": lambda path: path.write_text('{"results": [{"label": 7}]}'),
    "null": lambda path: path.write_text("null"),
    "huge": lambda path: truncate(path, (64 << 20) + 1),
}


def truncate(path: Path, size: int) -> None:
    with path.open("wb") as stream:
        stream.truncate(size)


@pytest.mark.parametrize("flag", ["evaluation", "metrics", "plan", "tokenizer"])
@pytest.mark.parametrize("what", ODD)
def test_an_odd_file_is_refused_in_a_sentence(what: str, flag: str, folder: Path, tmp_path: Path) -> None:  # noqa: F811
    path = tmp_path / "file"
    ODD[what](path)
    found = refused(folder, **{flag: path})
    [sentence] = [line for line in found if line.startswith(f"--{flag} ")]
    assert str(path) in sentence
    assert "\n" not in sentence
    assert "Traceback" not in sentence


@pytest.mark.parametrize("what", ["missing", "a folder", "empty", "not UTF-8", "huge"])
def test_an_odd_licence_is_refused_in_a_sentence(what: str, folder: Path, tmp_path: Path) -> None:  # noqa: F811
    ODD[what](tmp_path / "LICENSE")
    parts = replace(parts_of(folder), licence_file=tmp_path / "LICENSE")
    [sentence] = examine_release(parts, request_of(folder))[1]
    assert sentence.startswith(f"--license-file {tmp_path / 'LICENSE'}: ")


def test_everything_wrong_is_said_in_one_pass(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    missing = tmp_path / "missing"
    changes = dict.fromkeys(("evaluation", "metrics", "plan", "tokenizer"), missing)
    parts = replace(parts_of(folder), licence_file=missing)
    facts, found = examine_release(parts, request_of(folder, licence=None, **changes))
    assert len(found) == 5
    assert "the licence of the weights: --license" in facts["unknown"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"seed": 99}, "--seed was 99"),
        ({STARTS: [[0, "another"]]}, "its starts have other names"),
        ({PLAN_RECORD: {"format": "of others"}}, "its data plan differs"),
    ],
)
def test_an_average_of_another_run_is_refused(change: dict[str, Any], why: str, folder: Path) -> None:  # noqa: F811
    parts = parts_of(folder)
    assert parts.averaged is not None
    vars(parts.averaged.arguments).update(change)
    with pytest.raises(ReleaseError, match=why):
        facts_of_release(parts, request_of(folder))


def test_a_checkpoint_that_is_no_average_is_refused(folder: Path) -> None:  # noqa: F811
    parts = parts_of(folder)
    with pytest.raises(ReleaseError, match="so it is no average"):
        facts_of_release(replace(parts, averaged=parts.last), request_of(folder))


def test_without_starts_the_members_prove_an_average(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    """Another run of the same seed, plan and shape has other weights."""
    save_model(replace(MODEL, gain_of_products=2.0), tmp_path / "other", torch.float32)
    average_checkpoints(choose_checkpoints(tmp_path / "other", 1, None), "mean", tmp_path / "averaged")
    parts = parts_of(folder)
    own = examine_release(replace(parts, averaged=without_starts(folder / "averaged", parts)), request_of(folder))[1]
    assert not any(line.startswith("--averaged") for line in own)
    other = replace(parts, averaged=without_starts(tmp_path / "averaged", parts))
    found = examine_release(other, request_of(folder, evaluation=None))[1]
    assert [line for line in found if "is not the average of the run's checkpoints" in line]


def without_starts(path: Path, parts: Any) -> Any:
    checkpoint = open_checkpoint(path)
    vars(checkpoint.arguments).update({**vars(parts.last.arguments), STARTS: None})
    return checkpoint


def test_metrics_of_another_run_are_refused(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    steps = [entry(step) | {"start": "first"} for step in (1, 2, 3)]
    other = [*steps[:2], steps[2] | {"start": "another"}]
    cases = {
        "step 3 was written by another run": other,
        "48 samples at iteration 3": [entry(step, batch=16) for step in (1, 2, 3)],
        "samples of 64 tokens": [line | {"tokens": 512, "sources": {}} for line in steps],
        "nothing in it names the run": [entry(step) for step in (1, 2, 3)],
        "begins after iteration 3": [entry(step) for step in (4, 5)],
        "is no source of the run's plan": [
            line | {"sources": {"foreign": {"loss": 1.0, "tokens": 256, "bands": [0] * 10}}} for line in steps
        ],
    }
    for number, (why, lines) in enumerate(cases.items()):
        found = refused(folder, metrics=write_run(tmp_path / str(number), lines) / "metrics.jsonl")
        assert [line for line in found if why in line], (why, found)


def test_metrics_go_as_far_as_the_released_checkpoint(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    lines = [entry(step, skipped_steps=1) | {"start": "first"} for step in (1, 2, 3, 4, 5)]
    path = write_run(tmp_path / "run", lines) / "metrics.jsonl"
    facts = facts_of_release(parts_of(folder), request_of(folder, metrics=path))
    assert (facts["run"]["steps"], facts["run"]["skipped_steps"]) == (3, 3)


def test_metrics_that_only_their_place_proves_are_said_to_be_so(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    shutil.copytree(folder / "run", tmp_path / "run")
    write_run(tmp_path / "run", [entry(step) for step in (1, 2, 3)])
    parts = parts_of(folder)
    last = open_checkpoint(tmp_path / "run")
    vars(last.arguments).update(vars(parts.last.arguments))
    request = request_of(folder, metrics=tmp_path / "run/metrics.jsonl")
    facts = facts_of_release(replace(parts, last=last), request)
    assert any(line.startswith("proof that metrics.jsonl is of this run") for line in facts["unknown"])


def test_a_plan_of_another_order_or_without_a_record_is_refused(folder: Path) -> None:  # noqa: F811
    spec = yaml.safe_load((folder / "plan.yaml").read_text())
    other = folder / "other.yaml"
    other.write_text(yaml.safe_dump(spec | {"seed": 5}))
    assert "orders other samples than the run did" in " ".join(refused(folder, plan=other))
    parts = parts_of(folder)
    delattr(parts.last.arguments, PLAN_RECORD)
    with pytest.raises(ReleaseError, match="the checkpoint records no plan that this one could be compared with"):
        facts_of_release(parts, request_of(folder, evaluation=None))


def test_results_are_taken_by_content_and_not_by_path(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    content = json.loads((folder / "evaluation.json").read_text())
    path = tmp_path / "evaluation.json"
    [row] = content["results"]

    def write(**changes: Any) -> Path:
        path.write_text(json.dumps({**content, "results": [row | changes]}))
        return path

    assert refused(folder, evaluation=write(label="anywhere")) == []
    [line] = refused(folder, evaluation=write(checkpoint="0" * 32))
    assert "measures the files of other weights" in line
    [line] = refused(folder, evaluation=write(checkpoint=None))
    assert "does not say which files it measured" in line
    path.write_text(json.dumps(content | {"plan_fingerprint": "0" * 16}))
    [line] = refused(folder, evaluation=path)
    assert "its documents may have been trained on" in line


def test_an_interrupted_run_shows_the_command_of_every_start(folder: Path) -> None:  # noqa: F811
    parts = parts_of(folder)
    told = {STARTS: [[0, "first"], [2, "second"]], COMMANDS: [[0, "0.1", "--lr 1"], [2, "0.2", "--lr 2"]]}
    for weights in parts.weights:
        vars(weights.checkpoint.arguments).update(told)
    facts = examine_release(parts, request_of(folder))[0]
    text = render_cards(facts)["reproduce.md"]
    assert "The run was started 2 times" in text
    first, second = text.index("### From step 0"), text.index("### From step 2")
    assert "--lr 1" in text[first:second]
    assert "--lr 2" in text[second:]


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("GPL-3.0-or-later", {"license": "gpl-3.0"}),
        ("ODC-By-1.0", {"license": "odc-by"}),
        ("our own", {"license": "other", "license_name": "our own", "license_link": "LICENSE"}),
        (None, {}),
    ],
)
def test_a_licence_has_the_hubs_name(named: str | None, expected: dict[str, str], folder: Path) -> None:  # noqa: F811
    facts = facts_of_release(parts_of(folder), request_of(folder)) | {"licence": named}
    assert {name: value for name, value in hub_metadata(facts).items() if "license" in name} == expected
    hub = pytest.importorskip("huggingface_hub", reason="transformers brings it")
    data = hub.ModelCard(render_cards(facts)["README.md"]).data
    assert (data.license, data.license_name) == (expected.get("license"), expected.get("license_name"))


@pytest.mark.parametrize(
    ("origin", "dataset"),
    [
        ("https://huggingface.co/datasets/maker/pages", "maker/pages"),
        ("https://huggingface.co/datasets/maker/pages/tree/main/data", "maker/pages"),
        ("https://hf.co/datasets/squad", "squad"),
        ("https://huggingface.co/datasets/squad/tree/main", "squad"),
        ("hf://datasets/maker/pages@v1", "maker/pages"),
        ("maker/pages", None),
        ("dumps/2024", None),
        ("https://example.org/maker/pages", None),
        ("https://huggingface.co/maker/model", None),
    ],
)
def test_only_what_is_declared_a_dataset_becomes_one(origin: str, dataset: str | None, folder: Path) -> None:  # noqa: F811
    facts = facts_of_release(parts_of(folder), request_of(folder))
    facts["sources"]["scored"]["origin"] = origin
    assert hub_metadata(facts).get("datasets") == (None if dataset is None else [dataset])
    assert f"| origin | {address(origin)} |" in render_cards(facts)["DATA.md"], "the address is shown as it is"
