"""What the command line leaves open follows from the plan; what contradicts the plan is an error that says so."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.errors import ConfigError, KaiyuanError, ShardError
from megatron_kaiyuan.preprocess import TokenizerConfig
from megatron_kaiyuan.shards.manifest import TokenizerRecord
from megatron_kaiyuan.training.plan_arguments import (
    check_plan_arguments,
    check_tokenizer_of_shards,
    plan_argument_defaults,
)
from tests.unit_tests.data.tiny import numbered_documents, write_shard
from tests.unit_tests.preprocess.corpus import build_folder, save_bpe, write_jsonl

FINGERPRINT = "a" * 64


@pytest.fixture
def spec(tmp_path: Path) -> dict[str, Any]:
    """A plan of 10 samples of 4 tokens over one shard of 41 tokens."""
    write_shard(tmp_path / "text", numbered_documents([20, 21]))
    return {
        "seq_length": 4,
        "sources": {"text": {"shards": str(tmp_path / "text")}},
        "phases": [{"name": "only", "order": "shuffled", "sources": {"text": "all"}}],
    }


def write_manifest(prefix: Path, *, vocab_size: int = 50, fingerprint: str = FINGERPRINT) -> None:
    tokenizer = {"type": "T", "model": prefix.name, "vocab_size": vocab_size, "eod_id": 3, "fingerprint": fingerprint}
    manifest = {
        "documents": 2, "tokens": 41, "dtype": "int32", "max_token_id": 40, "append_eod": False, "files": {},
        "scores": {}, "tokenizer": tokenizer, "inputs": [], "skipped": {}, "json_key": "text", "created_by": "a test",
    }  # fmt: skip
    Path(f"{prefix}.manifest.json").write_text(json.dumps(manifest))


def defaults(args: argparse.Namespace, spec: dict[str, Any], saved: argparse.Namespace | None = None) -> dict[str, Any]:
    plan = Plan.from_spec(spec)
    return plan_argument_defaults(args, plan, saved, plan.tokenizer_record)


def tokenizer_of_shards(spec: dict[str, Any]) -> TokenizerRecord:
    record = Plan.from_spec(spec).tokenizer_record
    assert record is not None
    return record


def arguments(monkeypatch: pytest.MonkeyPatch, *words: str, **values: object) -> argparse.Namespace:
    """Megatron's own parser with our flags; `values` stand for what its validation fills in."""
    from megatron.training.arguments import parse_args

    from megatron_kaiyuan.arguments import add_kaiyuan_arguments

    monkeypatch.setattr(
        "sys.argv", ["pretrain", "--plan", "plan.yaml", "--no-create-attention-mask-in-dataloader", *words]
    )
    args = parse_args(add_kaiyuan_arguments)
    for name, value in ({"dataloader_type": "single", "global_batch_size": 2, "seq_length": 4} | values).items():
        setattr(args, name, value)
    return args


def test_what_is_left_open_follows_from_the_plan(spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    spec["phases"][0]["lr"] = {"start": 0.1, "end": 0.3, "shape": "linear"}
    args = arguments(monkeypatch, "--vocab-size", "50", seq_length=None)
    assert defaults(args, spec) == {
        "seq_length": 4,
        "max_position_embeddings": 4,
        "train_samples": 10,
        "lr": 0.3,
        "tokenizer_type": "NullTokenizer",
    }


def test_a_resumed_run_keeps_the_base_rate_of_its_checkpoint(
    spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec["phases"][0]["lr"] = {"start": 0.1, "end": 0.3, "shape": "linear"}
    args = arguments(monkeypatch, "--vocab-size", "50")
    assert defaults(args, spec, argparse.Namespace(lr=0.2))["lr"] == 0.2


def test_what_is_given_stays(spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    words = "--seq-length 4 --max-position-embeddings 8 --train-iters 5 --tokenizer-type NullTokenizer --vocab-size 50"
    args = arguments(monkeypatch, *words.split())
    assert defaults(args, spec) == {}


def test_windows_of_another_length_are_refused_before_megatron_compares_them(
    spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(monkeypatch, "--vocab-size", "50", "--seq-length", "8", seq_length=8)
    with pytest.raises(ConfigError, match="--seq-length 8, but the plan cuts its samples to seq_length 4"):
        defaults(args, spec)


def test_the_vocabulary_comes_from_the_manifests(
    spec: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_manifest(tmp_path / "text")
    plan = Plan.from_spec(spec)
    plan.check_vocabulary(41)
    with pytest.raises(ShardError, match="token id 40"):
        plan.check_vocabulary(40)
    values = defaults(arguments(monkeypatch), spec)
    assert values["tokenizer_type"] == "NullTokenizer"
    assert values["vocab_size"] == 50
    assert values["null_tokenizer_eod_id"] == 3


def test_an_unknown_vocabulary_is_an_error(spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"vocabulary is unknown.*give --vocab-size N, or --tokenizer-type"):
        defaults(arguments(monkeypatch), spec)


def test_shards_of_two_tokenizers_are_an_error_that_names_both(
    spec: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path / "more", numbered_documents([20, 21]))
    spec["sources"]["more"] = {"shards": str(tmp_path / "more")}
    write_manifest(tmp_path / "text")
    write_manifest(tmp_path / "more", fingerprint="b" * 64)
    with pytest.raises(KaiyuanError, match=r"different tokenizers") as refused:
        defaults(arguments(monkeypatch), spec)
    assert "text" in str(refused.value)
    assert "more" in str(refused.value)


@pytest.mark.parametrize(
    "given",
    [
        {"train_samples": 10},
        {"train_samples": 11},  # the last, half-filled batch is dropped either way
        {"train_iters": 5},
    ],
)
def test_a_run_over_the_whole_plan_is_accepted(
    spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch, given: dict[str, object]
) -> None:
    check_plan_arguments(arguments(monkeypatch, **given), Plan.from_spec(spec))


def test_documents_may_be_kept_apart_without_a_mask_from_the_loader(
    spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--reset-attention-mask", "--reset-position-ids")
    given = arguments(monkeypatch, *flags, train_iters=5, create_attention_mask_in_dataloader=False)
    check_plan_arguments(given, Plan.from_spec(spec))


@pytest.mark.parametrize(
    ("words", "values", "complaint"),
    [
        ("", {"train_samples": 12}, r"--train-samples 12, but the plan has 10 samples \(5 steps of 2\): repeat more"),
        ("", {"train_samples": 8}, r"--train-samples 8, but the plan has 10 samples.*--exit-interval"),
        ("", {"train_iters": 4}, r"--train-iters 4 x --global-batch-size 2 = 8 samples, but the plan has 10"),
        ("", {"train_iters": 5, "global_batch_size": 16}, "10 samples, fewer than --global-batch-size 16"),
        ("", {"train_iters": 5, "seq_length": 8}, "--seq-length 8, but the plan cuts its samples to seq_length 4"),
        ("", {"train_iters": 5, "dataloader_type": "cyclic"}, "a plan needs --dataloader-type single"),
        ("--full-validation", {"train_iters": 5}, "the plan holds out no documents"),
    ],
)
def test_a_contradiction_is_an_error_with_both_values(
    spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch, words: str, values: dict[str, object], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        check_plan_arguments(arguments(monkeypatch, *words.split(), **values), Plan.from_spec(spec))


@pytest.fixture
def tokenizer(spec: dict[str, Any], tmp_path: Path) -> Path:
    """A tokenizer, of which the shards of the plan are built."""
    folder = save_bpe(tmp_path / "bpe")
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "the quick brown fox"}] * 9)
    config = TokenizerConfig(type="HuggingFaceTokenizer", model=str(folder))
    build_folder([path], tmp_path / "shards", tokenizer=config)
    spec["sources"]["text"]["shards"] = str(tmp_path / "shards")
    return folder


def named(monkeypatch: pytest.MonkeyPatch, model: Path, kind: str = "HuggingFaceTokenizer") -> argparse.Namespace:
    return arguments(monkeypatch, "--tokenizer-type", kind, "--tokenizer-model", str(model))


def swapped(tokenizer: Path) -> Path:
    """A copy in which two tokens have each other's ids."""
    other = shutil.copytree(tokenizer, tokenizer.with_name("swapped"))
    content = json.loads((other / "tokenizer.json").read_text())
    ids = content["model"]["vocab"]
    first, second = [token for token in ids if len(token) == 1][:2]
    ids[first], ids[second] = ids[second], ids[first]
    (other / "tokenizer.json").write_text(json.dumps(content))
    return other


def test_the_tokenizer_of_the_shards_is_accepted_wherever_it_lies(
    spec: dict[str, Any], tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, copied = tokenizer_of_shards(spec), shutil.copytree(tokenizer, tokenizer.with_name("copied"))
    for model in (tokenizer, copied, copied / "tokenizer.json"):
        check_tokenizer_of_shards(named(monkeypatch, model), record, record.eod_id)


@pytest.mark.parametrize("what", ["ids", "type", "file"])
def test_another_tokenizer_than_that_of_the_shards_is_refused(
    spec: dict[str, Any], tokenizer: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    record = tokenizer_of_shards(spec)
    given = {
        "ids": lambda: named(monkeypatch, swapped(tokenizer)),
        "type": lambda: named(monkeypatch, tokenizer / "tokenizer.json", "TikTokenizer"),
        "file": lambda: named(monkeypatch, tokenizer / "nowhere"),
    }[what]()
    complaint = {"ids": "another one", "type": "another type", "file": "cannot be compared.*No such file"}[what]
    with pytest.raises(ConfigError, match=rf"--tokenizer-model .*: it .*{complaint}.*leave --tokenizer-type out"):
        check_tokenizer_of_shards(given, record, record.eod_id)


def test_another_end_of_document_than_in_the_shards_is_refused(
    spec: dict[str, Any], tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tokenizer_of_shards(spec)
    assert record.eod_id is not None
    with pytest.raises(ConfigError, match=rf"end with id 9 there, and with {record.eod_id} in the shards.*leave"):
        check_tokenizer_of_shards(named(monkeypatch, tokenizer), record, 9)


def test_a_null_tokenizer_stands_for_any_but_must_not_name_another_end(
    spec: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_manifest(tmp_path / "text")
    record = tokenizer_of_shards(spec)
    null = ("--tokenizer-type", "NullTokenizer", "--vocab-size", "151935")
    check_tokenizer_of_shards(arguments(monkeypatch, *null), record, 151934)
    check_tokenizer_of_shards(arguments(monkeypatch, *null, "--null-tokenizer-eod-id", "3"), record, 3)
    with pytest.raises(ConfigError, match=r"--null-tokenizer-eod-id 4: .* id 4 there, and with 3 in the shards.*leave"):
        check_tokenizer_of_shards(arguments(monkeypatch, *null, "--null-tokenizer-eod-id", "4"), record, 4)


def test_shards_without_a_manifest_take_any_tokenizer(
    spec: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Plan.from_spec(spec).tokenizer_record
    assert record is None
    check_tokenizer_of_shards(named(monkeypatch, tmp_path / "nowhere"), record, 9)
