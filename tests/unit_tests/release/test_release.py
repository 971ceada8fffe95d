"""A release: its cards say what the run recorded, the Hub's own classes read them, and what is unknown is named."""

import functools
import hashlib
import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from megatron_kaiyuan.checkpoints.averaging import average_checkpoints, choose_checkpoints
from megatron_kaiyuan.checkpoints.checksums import content_fingerprint
from megatron_kaiyuan.checkpoints.identity import PLAN_RECORD
from megatron_kaiyuan.checkpoints.lineage import COMMANDS, STARTS
from megatron_kaiyuan.checkpoints.reading import open_checkpoint
from megatron_kaiyuan.commands import release
from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.errors import ReleaseError
from megatron_kaiyuan.export.to_hugging_face import export_checkpoint
from megatron_kaiyuan.release.cards import hub_metadata, render_cards
from megatron_kaiyuan.release.facts import ReleaseRequest
from megatron_kaiyuan.release.kit import ReleaseParts, facts_of_release, write_release
from megatron_kaiyuan.release.markdown import cell
from megatron_kaiyuan.release.publishing import published
from tests.unit_tests.data.tiny import phase_of, plan_of, write_manifest, write_source
from tests.unit_tests.export.small_models import SmallModel, save_model
from tests.unit_tests.model.reference import Features, Shape
from tests.unit_tests.quantile.test_language_model import write_tokenizer
from tests.unit_tests.reporting.run_files import SEQ_LENGTH, entry, write_run

COMMAND = "--plan /data/somebody/plan.yaml --wandb-api-key s3cr3t --data-args 'a\n```\nb' --proxy http://me:s3cr3t@host.example/x"
MODEL = SmallModel("qk norm alone", Features(qk_norm=True), Shape(vocab=384))


def write_plan(folder: Path, **facts: str) -> Path:
    """Two sources; `facts` are of the scored one, whose shard alone has a manifest."""
    documents = [[1] * SEQ_LENGTH for _ in range(40)]
    scored = write_source(folder / "scored", documents, [float(number) for number in range(40)])
    plain = write_source(folder / "plain", documents)
    files = {
        path.suffix[1:]: {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in (folder / "scored").glob("part-000.*")
        if path.suffix in (".bin", ".idx")
    }
    inputs = [{"name": "pages|1.jsonl", "bytes": 9, "rows": 50}]
    write_manifest(folder / "scored/part-000", skipped={"empty": 7, "no text": 3}, files=files, inputs=inputs)
    spec = plan_of(
        {"scored": scored | facts, "plain": plain},
        phase_of("curriculum", {"scored": {"repeat": 2}, "plain": {}}),
        seq_length=SEQ_LENGTH,
    )
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def evaluation_of(folder: Path, path: Path) -> Path:
    task = {
        "items": 4,
        "num_fewshot": 0,
        "limit": None,
        "scores": {"accuracy": 0.25, "answer_bits_per_byte": 1.5},
        "standard_errors": {"accuracy": 0.1, "answer_bits_per_byte": None},
    }
    held_out = {"loss": 2.0, "tokens": 64, "bits_per_byte": 0.75, "bands": []}
    files = content_fingerprint(folder) if folder.is_dir() else "of others"
    row = {"label": str(folder), "iteration": 3, "sources": {"scored": held_out}, "tasks": {"quiz": task}}
    plan = Plan.load(path.parent / "plan.yaml") if (path.parent / "plan.yaml").is_file() else None
    content = {"plan_fingerprint": plan and plan.fingerprint, "results": [row | {"checkpoint": files}]}
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one checkpoint, its average, tokenizer, plan and evaluation."""
    folder = tmp_path_factory.mktemp("released")
    save_model(MODEL, folder / "run", torch.float32)
    average_checkpoints(choose_checkpoints(folder / "run", 1, None), "mean", folder / "averaged")
    write_tokenizer(folder / "tokenizer")
    write_plan(folder, origin="https://huggingface.co/datasets/maker/pages", licence="odc-by")
    lines = [entry(1), entry(2, skipped_steps=2), entry(3)]
    write_run(folder / "run", [line | {"start": "first"} for line in lines])
    evaluation_of(open_checkpoint(folder / "averaged").folder, folder / "evaluation.json")
    (folder / "licence.txt").write_text("the text")
    return folder


def parts_of(folder: Path) -> ReleaseParts:
    """The checkpoints with what training records in their arguments."""
    parts = ReleaseParts(
        last=open_checkpoint(folder / "run"),
        averaged=open_checkpoint(folder / "averaged"),
        licence_file=folder / "licence.txt",
    )
    for weights in parts.weights:
        vars(weights.checkpoint.arguments).update(recorded(folder))
    return parts


@functools.cache
def recorded(folder: Path) -> dict[str, Any]:
    return {
        "seq_length": SEQ_LENGTH,
        "consumed_train_samples": 24,  # of those of the plan
        STARTS: [[0, "first"]],
        COMMANDS: [[0, "0.1.0", COMMAND]],
        PLAN_RECORD: Plan.load(folder / "plan.yaml").order_record(),
    }


def request_of(folder: Path, **changes: Any) -> ReleaseRequest:
    request = ReleaseRequest(
        name="tiny",
        licence="apache-2.0",
        languages=("en", "zh"),
        hardware="2 CPU cores",
        plan=folder / "plan.yaml",
        metrics=folder / "run/metrics.jsonl",
        evaluation=folder / "evaluation.json",
        tokenizer=folder / "tokenizer",
    )
    return replace(request, **changes)


@pytest.fixture(scope="module")
def written(folder: Path) -> dict[str, Any]:
    return write_release(parts_of(folder), request_of(folder), folder / "release")


def test_stock_transformers_loads_both_sets_of_weights(folder: Path, written: dict[str, Any]) -> None:
    assert written["layout"] == {"name": "qwen3", "has_code": False}
    for subfolder in ("", "last"):
        model = AutoModelForCausalLM.from_pretrained(folder / "release", subfolder=subfolder, dtype=torch.float32)
        assert type(model).__name__ == "Qwen3ForCausalLM"
    assert (folder / "release/LICENSE").read_text() == "the text"
    assert (folder / "release/tokenizer.json").is_file()
    assert (folder / "release/generation_config.json").is_file()
    assert json.loads((folder / "release/release.json").read_text())["name"] == "tiny"


@pytest.mark.usefixtures("written")
def test_the_hubs_own_classes_read_the_head_of_the_card(folder: Path) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="transformers brings it")
    card = hub.ModelCard((folder / "release/README.md").read_text())
    data = card.data
    assert (data.license, data.language, data.library_name) == ("apache-2.0", ["en", "zh"], "transformers")
    assert data.datasets == ["maker/pages"]
    assert data.model_name == "tiny"
    found = {(one.dataset_name, one.metric_type): one.metric_value for one in data.eval_results}
    assert found == {
        ("quiz", "accuracy"): 0.25,
        ("quiz", "answer_bits_per_byte"): 1.5,
        ("scored, held-out documents", "bits_per_byte"): 0.75,
    }


@pytest.mark.usefixtures("written")
def test_the_cards_say_what_the_run_recorded(folder: Path) -> None:
    card, data, again = ((folder / "release" / name).read_text() for name in ("README.md", "DATA.md", "reproduce.md"))
    described = Plan.load(folder / "plan.yaml").describe()
    sums = "\n".join(sha256(folder / "scored" / f"part-000.{role}") for role in ("bin", "idx"))
    assert f"fingerprint `{described['fingerprint']}`" in card
    assert "| steps skipped for an overflow of the gradients | 2 |" in card
    assert "average (mean) of the checkpoints of iterations 3 (weight 1)" in card
    assert "| `last` | checkpoint of iteration 3 |" in card
    assert "trust_remote_code" not in card
    assert "| quiz | 4 | 0 | accuracy | 0.25 | 0.1 |" in card
    told = f"{described['sources']['scored']['tokens_seen']:,}"
    assert f"| tokens in the whole plan, of which a part was shown | {told} |" in data
    assert "have seen 24 of these samples" in card
    assert "| rows that gave no document | empty 7, no text 3 |" in data
    assert r"| input | pages\|1.jsonl |" in data, "the name ends no cell"
    assert f"| sha256 | {hashlib.sha256(sums.encode()).hexdigest()} |" in data
    assert "2 CPU cores" in again
    assert "--input 'pages|1.jsonl'" in again
    assert "--weights mean --iterations 3 " in again


def test_what_is_unknown_is_named_and_not_invented(written: dict[str, Any]) -> None:
    """The small checkpoint was not made by a run, and only one of the sources has facts and a manifest."""
    unknown = written["unknown"]
    assert [line.split(":")[0] for line in unknown] == [
        "the commit of the code that trained",
        "proof that the tokenizer is the run's",
        "origin of plain",
        "licence of plain",
        "hashes, input and what was removed of plain",
        "headroom of FP16",
    ]
    texts = render_cards(written)
    assert all(f"- {cell(line)}" in texts["README.md"] for line in published(unknown))
    assert "| sha256 | unknown |" in texts["DATA.md"]


def test_a_run_that_says_nothing_has_a_card_all_the_same(folder: Path) -> None:
    facts = facts_of_release(ReleaseParts(last=open_checkpoint(folder / "run")), ReleaseRequest(name="bare"))
    assert len(facts["unknown"]) == 11
    assert hub_metadata(facts).keys() == {"library_name", "pipeline_tag", "tags"}
    assert "Unknown: see below." in render_cards(facts)["README.md"]


def test_results_without_tasks_and_tasks_without_results_are_said(folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "evaluation.json").read_text())
    [row] = content["results"]
    tasks = row.pop("tasks")
    path = tmp_path / "evaluation.json"
    fingerprint = content["plan_fingerprint"]
    path.write_text(json.dumps(content))
    facts = facts_of_release(parts_of(folder), request_of(folder, evaluation=path))
    assert "| scored | 2 | 0.75 |" in render_cards(facts)["README.md"]
    results = [row | {"tasks": tasks, "not_evaluated": {"gsm8k": "no network"}}]
    path.write_text(json.dumps({"plan_fingerprint": fingerprint, "results": results}))
    facts = facts_of_release(parts_of(folder), request_of(folder, evaluation=path))
    assert "the score on gsm8k: no network" in facts["unknown"]


def test_an_output_that_exists_is_left_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ReleaseError, match="exists; remove it"):
        write_release(parts_of(folder), request_of(folder), tmp_path / "there")


@pytest.mark.parametrize("flags", [[], ["--check", "--output", "x"]])
def test_the_command_writes_or_checks(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["release.py", "run", *flags])
    with pytest.raises(ReleaseError, match="give --output DIR to write a release, or --check"):
        release.main()


@pytest.mark.usefixtures("written")
def test_nothing_that_is_published_has_a_secret_or_a_folder_of_the_machine(folder: Path) -> None:
    for path in (folder / "release").rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        for private in (b"s3cr3t", b"somebody", b"host.example", str(folder).encode()):
            assert private not in content, (path.name, private)
    assert "--plan .../plan.yaml --wandb-api-key '***'" in (folder / "release/reproduce.md").read_text()


@pytest.mark.usefixtures("written")
def test_a_command_stays_in_its_fence(folder: Path) -> None:
    text = (folder / "release/reproduce.md").read_text()
    blocks = re.findall(r"^(`{3,})bash\n(.*?)\n\1$", text, re.MULTILINE | re.DOTALL)
    [command] = [block for _, block in blocks if "torchrun" in block]
    words = subprocess.run(
        ["bash", "-c", f"show() {{ printf '%s\\0' \"$@\"; }}\n{command.replace('torchrun', 'show')}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    assert "a\n```\nb" in words, "a shell reads the word as it was typed"


def test_an_unfinished_folder_of_somebody_else_is_left_alone(folder: Path, tmp_path: Path) -> None:
    """Nothing that lies beside the release is removed, and nothing is left where it fails."""
    other = tmp_path / ".release.release"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    parts = replace(parts_of(folder), licence_file=tmp_path)
    with pytest.raises(ReleaseError, match="--license-file"):
        write_release(parts, request_of(folder), tmp_path / "release")
    assert (other / "thesis.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == [".release.release"]


def test_nobody_is_asked_whether_code_may_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "n")
    checkpoint = open_checkpoint(folder / "run")
    export_checkpoint(checkpoint, tmp_path / "hf", tokenizer=folder / "tokenizer", layout="kaiyuan", check=True)
    assert asked == []
