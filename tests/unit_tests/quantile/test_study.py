"""The study file: every mistake is named by its field, and the cost is that of the model that is built."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_kaiyuan.errors import StudyError
from megatron_kaiyuan.quantile.cost import estimate_cost
from megatron_kaiyuan.quantile.evaluation_spec import DEFAULT_TASKS
from megatron_kaiyuan.quantile.reference_model import PRESETS, ReferenceModel, preset_model
from megatron_kaiyuan.quantile.runs import common_flags, training_command, write_slices
from megatron_kaiyuan.quantile.study import load_study, parse_study
from megatron_kaiyuan.quantile.tasks import check_tasks
from tests.unit_tests.quantile.tiny_study import sliced_study, study_content, tiny_study, write_sources

ROOT = Path(__file__).resolve().parents[3]


def changed(content: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """The content with one field set."""
    *parents, last = path.split(".")
    inner = content
    for name in parents:
        inner[name] = dict(inner.get(name, {}))
        inner = inner[name]
    inner[last] = value
    return content


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("slices.tops", ["0%", "0%"], "slices.tops: 0 is named twice"),
        ("slices.tops", ["0%"], "slices.tops"),
        ("slices.tops", ["0%", 30], "slices.tops.1: '30' is not between 0% and 100%; did you mean 30%?"),
        ("slices.tokens", 1000, "slices.tokens: 1,000 is not a whole number of windows of 32 tokens; 992 is"),
        ("training.tokens", 1100, "training.tokens: 1,100 is not a whole number of steps of 8 x 32 tokens; 1,024 is"),
        ("training.tokens", 512, "training.tokens: 512 is less than a slice (1,024)"),
        ("training.seeds", [1, 1], "training.seeds: 1 is named twice"),
        ("training.seeds", 0, "training.seeds: 0 seeds"),
        ("training.seeds", [-1, 2], "seeds: -1 is no seed; Megatron takes whole numbers from 1"),
        ("training.min_lr", 0.5, "min_lr 0.5 is above lr"),
        ("model.hidden_size", 30, "heads of 15 are odd"),
        ("training.processes", 3, "global_batch_size must be a multiple of micro_batch_size x processes"),
        ("model", "huge", "model: 'huge' is unknown; name one of kaiyuan_0.5b, tiny"),
        ("model.num_query_groups", 7, "num_attention_heads 2 is not divisible by num_query_groups 7"),
        ("evaluation.held_out", {"other": {"documents": 50}}, "held_out.other: is not one of the sources; give it"),
        ("evaluation.held_out", {"good": {"documents": 50, "shards": "x"}}, "held_out.good: is one of the sources"),
        ("evaluation.tasks", ["piqa", "piqa"], "'piqa' names two measures"),
        ("evaluation.tasks", ["clean"], "'clean' names two measures"),
        ("evaluation.colour", "red", "evaluation.colour: unknown key"),
        ("output", None, "output"),
        ("level", 0.7, "level"),
        ("sources", {"a b": {"shards": "x", "score": "s"}}, "the name 'a b' becomes part of file names"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, field: str, value: object, words: str) -> None:
    with pytest.raises(StudyError) as caught:
        parse_study(changed(study_content(tmp_path), field, value))
    assert words in str(caught.value)


def test_all_wrong_fields_are_named_at_once(tmp_path: Path) -> None:
    content = changed(changed(study_content(tmp_path), "level", 2), "seq_length", "long")
    with pytest.raises(StudyError, match="2 wrong field") as caught:
        parse_study(content, "mine.yaml")
    assert "mine.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"), [("a: [", "not YAML"), ("- 1", "a study is a mapping"), ("a: 1\na: 2", "twice")]
)
def test_a_file_that_is_no_study_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(StudyError, match=words):
        load_study(path)
    with pytest.raises(StudyError, match="cannot be read"):
        load_study(tmp_path / "none.yaml")


def test_the_committed_studies_are_valid() -> None:
    for path in ("examples/quantile/study.yaml", "studies/quantile_study.yaml", "examples/quantile/full_study.yaml"):
        assert load_study(ROOT / path).training.seeds == (1, 2, 3)


def test_quantiles_and_suite_are_those_of_the_report_by_default(tmp_path: Path) -> None:
    held_out = {"clean": {"shards": "x", "documents": 40}}
    evaluation = {"tasks": "default", "held_out": held_out}
    study = tiny_study(tmp_path, slices={"tokens": 1024}, evaluation=evaluation)
    assert [float(top) for top in study.slices.tops] == [0, 0.2, 0.4, 0.6, 0.8]
    assert tuple(task.name for task in study.evaluation.all_tasks()) == DEFAULT_TASKS
    wanted = [
        "mmlu",
        "arc_easy",
        "commonsense_qa",
        "boolq",
        "piqa",
        "hellaswag",
        "winogrande",
        "cmmlu",
        "ceval-valid",
        "gsm8k",
        "humaneval",
    ]
    assert set(wanted) < set(DEFAULT_TASKS)
    assert study.evaluation.capability_of("boolq") == "knowledge"
    assert study.evaluation.capability_of("piqa") == "common sense"


def test_the_parameters_are_those_of_the_model_that_is_built() -> None:
    import torch

    from megatron_kaiyuan.model.config import KaiyuanModelOptions, KaiyuanTransformerConfig
    from megatron_kaiyuan.model.parameters import count_parameters

    for name in PRESETS:
        model = ReferenceModel.model_validate(preset_model(name))
        config = KaiyuanTransformerConfig(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            ffn_hidden_size=model.ffn_hidden_size,
            num_attention_heads=model.num_attention_heads,
            num_query_groups=model.num_query_groups,
            gated_linear_unit=True,
            add_bias_linear=False,
            normalization="RMSNorm",
            qk_layernorm=True,
            activation_func=torch.nn.functional.silu,
            transformer_impl="local",
            use_cpu_initialization=True,
            cuda_graph_modules=[],  # its default is deprecated
            kaiyuan=KaiyuanModelOptions(sandwich_norm=True),
        )
        counted = count_parameters(config, 151_936, tied_embeddings=model.tied_embeddings)
        assert model.parameters(151_936) == counted.total


def test_the_default_reference_model_has_half_a_billion_parameters() -> None:
    model = ReferenceModel.model_validate(preset_model("kaiyuan_0.5b"))
    assert 0.45e9 < model.parameters(151_936) < 0.55e9


def test_the_cost_is_the_stated_formula(tmp_path: Path) -> None:
    study = tiny_study(tmp_path, cost={"tokens_per_second": 1000, "main_run": {"parameters": "1B", "tokens": "20B"}})
    cost = estimate_cost(study, 96)
    # by hand: a layer has 32 x 64 (qkv of 2 heads and 1 group), 32 x 32, 3 x 32 x 64 weights and 4 x 32 + 2 x 16 gains
    layers = 2 * (32 * 64 + 32 * 32 + 3 * 32 * 64 + 4 * 32 + 2 * 16) + 32
    assert cost.parameters == layers + 2 * 96 * 32
    assert cost.tokens == 18 * 1024
    assert cost.flops == 18 * 1024 * (6 * (layers + 96 * 32) + 12 * 2 * 32 * 32 / 2)
    assert cost.gpu_hours == pytest.approx(18 * 1024 / 1000 / 3600)
    assert cost.share_of_main_run == pytest.approx(cost.flops / 1.2e20)


def test_a_study_that_is_only_reported_differently_keeps_its_runs(tmp_path: Path) -> None:
    one, other = tiny_study(tmp_path), tiny_study(tmp_path, level=0.01)
    assert one.training_digest == other.training_digest
    assert one.training_digest != tiny_study(tmp_path, seed=9).training_digest


def test_a_run_is_one_command_with_its_seed_and_plan(tmp_path: Path) -> None:
    study, sliced = sliced_study(tmp_path)
    command = training_command(study, sliced.runs[1], "python")
    assert command[:5] == ["python", "-m", "megatron_kaiyuan.pretrain", "--plan", sliced.runs[1].plan]
    assert command[command.index("--seed") + 1] == "2"
    assert command[command.index("--save") + 1] == command[command.index("--load") + 1]
    assert "--seed" not in common_flags(study)


def test_several_processes_are_started_by_torchrun(tmp_path: Path) -> None:
    training = study_content(tmp_path)["training"] | {"processes": 2, "micro_batch_size": 4}
    study, sliced = sliced_study(tmp_path, training=training)
    assert training_command(study, sliced.runs[0])[1:6] == [
        *["-m", "megatron_kaiyuan.host.torchrun", "--standalone", "--nproc-per-node", "2"]
    ]


@pytest.mark.parametrize(
    ("evaluation", "words"),
    [({"tasks": ["piqa"]}, "evaluation.tasks needs the tokenizer"),
     ({"task_folders": ["nowhere"]}, "task_folders: nowhere is no folder")],
)  # fmt: skip
def test_what_the_evaluation_would_miss_is_said_before_the_training(
    tmp_path: Path, evaluation: dict[str, Any], words: str
) -> None:
    known = study_content(tmp_path)["evaluation"]
    with pytest.raises(StudyError, match=words):
        check_tasks(tiny_study(tmp_path, evaluation=known | evaluation))
    check_tasks(tiny_study(tmp_path))


def test_shards_without_a_known_vocabulary_are_refused(tmp_path: Path) -> None:
    write_sources(tmp_path)
    training = study_content(tmp_path)["training"] | {"flags": []}
    with pytest.raises(StudyError, match="the size of the vocabulary is unknown"):
        write_slices(tiny_study(tmp_path, training=training))


def test_an_edited_local_task_is_another_evaluation(tmp_path: Path) -> None:
    """And what Python or an editor leaves in its folder is none."""
    folder = tmp_path / "tasks"
    (folder / "data").mkdir(parents=True)
    (folder / "quiz.yaml").write_text("task: quiz")
    (folder / "data" / "quiz.jsonl").write_text("{}")
    study = tiny_study(tmp_path)
    spec = study.evaluation.model_copy(update={"task_folders": (str(folder),)})
    study = study.model_copy(update={"evaluation": spec})
    before = study.evaluation_digest
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "utils.pyc").write_bytes(b"compiled")
    (folder / ".quiz.yaml.swp").write_text("open in an editor")
    assert study.evaluation_digest == before
    (folder / "data" / "quiz.jsonl").write_text("{}\n{}")
    edited = study.evaluation_digest
    (folder / "data" / "quiz.jsonl").rename(folder / "data" / "other.jsonl")
    renamed = study.evaluation_digest
    assert len({before, edited, renamed}) == 3
    assert study.training_digest == tiny_study(tmp_path).training_digest
    shutil.rmtree(folder)
    with pytest.raises(StudyError, match=r"task_folders: .*tasks is no folder; put it there"):
        _ = study.evaluation_digest


def test_a_study_without_local_tasks_keeps_the_digest_of_its_results(tmp_path: Path) -> None:
    study = tiny_study(tmp_path)
    fields = {"max_windows": None, "tasks": [], "task_folders": [], "limit": None, "generate": False}
    content = json.dumps([study.training_digest, fields], sort_keys=True)
    assert study.evaluation_digest == hashlib.sha256(content.encode()).hexdigest()[:16]


def test_all_that_does_not_fit_together_is_told_at_once(tmp_path: Path) -> None:
    content = study_content(tmp_path)
    content["slices"] |= {"tokens": 1025}
    content["evaluation"]["held_out"]["good"] = {"documents": 40, "shards": "elsewhere"}
    content["training"] |= {"micro_batch_size": 3}
    with pytest.raises(StudyError) as refused:
        parse_study(content)
    for words in ("held_out.good: is one of the sources", "not a whole number of windows", "must be a multiple of"):
        assert words in str(refused.value)
