"""lm-evaluation-harness on our model: likelihoods against a plain softmax, local tasks, tasks that cannot be loaded."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_kaiyuan.errors import StudyError
from megatron_kaiyuan.quantile.study import Study, parse_study
from megatron_kaiyuan.quantile.tasks import TaskSuite, choice_scores
from tests.unit_tests.quantile.tiny_study import study_content

TEXTS = ["the cat sat on the mat and the dog sat on the log", "a bird in the hand is worth two in the bush"]
WORDS = sorted({word for text in TEXTS for word in text.split()})


def test_scores_of_a_choice_are_those_computed_by_hand() -> None:
    scores = choice_scores([-2.0, -3.0, -1.0], ["ab", "abcdef", "é"], gold=1)
    assert scores["answer_bits_per_byte"] == pytest.approx(3.0 / 6 / math.log(2))
    assert scores["accuracy"] == 0.0  # the third is likeliest
    assert scores["accuracy_norm"] == 1.0  # -1, -0.5 and -1 for each character
    normalised = [math.exp(-1), math.exp(-0.5), math.exp(-1)]
    assert scores["margin"] == pytest.approx(normalised[1] - normalised[0])
    assert scores["share_of_probability"] == pytest.approx(normalised[1] / sum(normalised))


def test_accuracy_norm_divides_by_the_choice_as_lm_eval_does_and_not_by_the_space_before_it() -> None:
    """lm-eval takes argmax(log likelihood / len(choice)): -3 / 1 loses to -5 / 2, and with the spaces it would win."""
    scores = choice_scores([-3.0, -5.0], [" a", " bc"], gold=1, choices=["a", "bc"])
    assert scores["accuracy_norm"] == 1.0
    assert choice_scores([-3.0, -5.0], [" a", " bc"], gold=0)["accuracy_norm"] == 1.0


def test_tasks_without_the_harness_say_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    study = parse_study(with_tasks(tmp_path, ["quiz"]))
    with pytest.raises(StudyError, match=r"pip install -c constraints.txt -e \".\[eval\]\""):
        load(study)


def test_a_study_without_tasks_does_not_need_the_harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert load(parse_study(study_content(tmp_path))).loaded == {}


def load(study: Study) -> TaskSuite:
    return TaskSuite.load(study.evaluation, study.tokenizer.model if study.tokenizer else None)


def with_tasks(folder: Path, tasks: list[str]) -> dict[str, Any]:
    """A study with tasks in `folder`."""
    content = study_content(folder)
    content["tokenizer"] = {"type": "HuggingFaceTokenizer", "model": str(folder / "tokenizer")}
    content["evaluation"] |= {"tasks": tasks, "task_folders": [str(folder)], "batch_size": 3}
    return content


def write_tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"})
    )
    return AutoTokenizer.from_pretrained(folder)


class Bigram:
    """A model whose logits depend on the token before alone; causal by construction."""

    def __init__(self, vocabulary: int) -> None:
        self.table = torch.randn(vocabulary, vocabulary + 5, generator=torch.Generator().manual_seed(0)) * 3
        self.widest = 0

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, mask: None) -> torch.Tensor:
        assert positions.shape == ids.shape
        self.widest = max(self.widest, ids.shape[1])
        return self.table[ids]

    def log_likelihood(self, ids: list[int], first: int, vocabulary: int) -> float:
        """Of `ids[first:]` given what is before, one token after another."""
        total = 0.0
        for before, token in zip(ids[first - 1 : -1], ids[first:], strict=True):
            total += float(torch.log_softmax(self.table[before, :vocabulary].double(), 0)[token])
        return total


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra eval)")
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    return SimpleNamespace(tokenizer=tokenizer, model=Bigram(len(tokenizer)), folder=tmp_path)


def language_model(harness: Any, positions: int = 64) -> Any:
    from megatron_kaiyuan.quantile.language_model import MegatronLanguageModel

    return MegatronLanguageModel(harness.model, harness.tokenizer, positions=positions, batch_size=3)


def request(*arguments: object) -> SimpleNamespace:
    return SimpleNamespace(args=arguments)


def test_likelihoods_are_those_of_a_plain_softmax_whatever_the_batch(harness: Any) -> None:
    pairs = [("the cat", " sat on"), ("", "a bird"), ("a bird in the hand", " is"), ("the", " log"), ("x", "y z")]
    found = language_model(harness).loglikelihood([request(*pair) for pair in pairs])
    for (context, continuation), (value, _) in zip(pairs, found, strict=True):
        before = harness.tokenizer.encode(context) or [harness.tokenizer.eos_token_id]
        whole = before + harness.tokenizer.encode(context + continuation)[len(harness.tokenizer.encode(context)) :]
        expected = harness.model.log_likelihood(whole, len(before), len(harness.tokenizer))
        assert value == pytest.approx(expected, abs=1e-4)


def test_a_rolling_likelihood_predicts_every_token_once(harness: Any) -> None:
    text = " ".join(TEXTS * 3)
    ids = [harness.tokenizer.eos_token_id, *harness.tokenizer.encode(text)]
    expected = harness.model.log_likelihood(ids, 1, len(harness.tokenizer))
    for positions in (4, 7, 1000):
        harness.model.widest = 0
        value = language_model(harness, positions).loglikelihood_rolling([request(text)])[0]
        assert value == pytest.approx(expected, abs=1e-3)
        assert harness.model.widest <= positions


def test_a_long_context_loses_its_oldest_tokens(harness: Any) -> None:
    long, short = " ".join(TEXTS * 4), TEXTS[1]
    model = language_model(harness, positions=8)
    assert model.loglikelihood([request(long, " dog")])[0][0] == pytest.approx(
        model.loglikelihood([request(short, " dog")])[0][0], abs=1e-5
    )
    assert harness.model.widest <= 8


def test_generation_is_greedy_and_ends_at_a_stop_text(harness: Any) -> None:
    model = language_model(harness)
    whole = model.generate_until([request("the cat", {"until": [], "max_gen_toks": 12})])[0]
    stop = whole[4:6]
    ended = model.generate_until([request("the cat", {"until": [stop], "max_gen_toks": 12})])[0]
    assert ended == whole[: whole.index(stop)]


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
{more}
"""
CHOICE = """output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_target: "{{gold}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]"""
GENERATE = """output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["."], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]"""


def write_tasks(folder: Path) -> None:
    rows = [
        {"q": f"the cat {number}", "choices": ["sat on", "bird", "hand"], "gold": number % 3, "answer": "the mat"}
        for number in range(4)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, more in (("quiz", CHOICE), ("essay", GENERATE)):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=folder / "rows.jsonl", more=more))
    missing = TASK.format(name="gone", data=folder / "nowhere.jsonl", more=CHOICE)
    (folder / "gone.yaml").write_text(missing)


@pytest.mark.filterwarnings("default")  # of the harness and its own dependencies
def test_local_tasks_are_scored_and_missing_ones_named(harness: Any) -> None:
    write_tasks(harness.folder)
    study = parse_study(with_tasks(harness.folder, ["quiz", "gone", "essay"]))
    suite = load(study)
    assert list(suite.failed) == ["gone"]
    assert "nowhere.jsonl" in suite.failed["gone"]
    results, failed = suite.evaluate(harness.model, positions=64)
    assert list(results) == ["quiz", "essay"]
    assert list(failed) == ["gone"]
    model = language_model(harness)
    values = [model.loglikelihood([request("the cat 1", f" {answer}")])[0][0] for answer in ("sat on", "bird", "hand")]
    expected = choice_scores(values, [" sat on", " bird", " hand"], gold=1)
    assert results["quiz"].answer_bits_per_byte[1] == pytest.approx(expected["answer_bits_per_byte"], abs=1e-4)
    assert results["quiz"].metrics["accuracy"][1] == expected["accuracy"]
    answer = model.loglikelihood([request("the cat 2", " the mat")])[0][0]
    assert results["essay"].answer_bits_per_byte[2] == pytest.approx(-answer / math.log(2) / 8, abs=1e-4)
    assert suite.evaluate(harness.model, positions=64)[0] == results
