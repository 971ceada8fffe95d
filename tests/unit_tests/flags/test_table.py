"""Every flag has a fate, what is passed on is read by Megatron, and what would have no effect is refused by name."""

import ast
import re
import sys
import warnings
from collections import Counter
from pathlib import Path

import pytest

from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.flags import architecture
from megatron_kaiyuan.flags.rules import Fate, by_name
from megatron_kaiyuan.flags.table import TABLE
from megatron_kaiyuan.training.parsing import known_flags, parse

ROWS = by_name(TABLE)
OF_THE_MODEL = {
    *architecture.OF_OTHER_GROUPS,
    *(name for name, flag in known_flags().items() if flag.group in architecture.GROUPS),
}
"""What the table of architecture has to cover, by Megatron's own grouping."""


def test_every_flag_has_exactly_one_fate_and_every_row_is_of_a_flag() -> None:
    flags = set(known_flags())
    assert sorted(flags - set(ROWS)) == []
    assert sorted(set(ROWS) - flags) == []
    fates = Counter(name for rule in TABLE if not rule.where.says for name in rule.names)
    assert {name: fates[name] for name in set(ROWS) if fates[name] != 1} == {}


def readers() -> dict[str, set[str]]:
    """Modules of Megatron's and ours that a training run imports, by the names of the attributes that they read."""
    import megatron_kaiyuan.training.launch  # noqa: F401 - what a run imports

    found: dict[str, set[str]] = {}
    for name, module in list(sys.modules.items()):
        path = getattr(module, "__file__", None)
        if (
            not name.startswith(("megatron.core", "megatron.training", "megatron_kaiyuan.training"))
            or path is None
            or not path.endswith(".py")
        ):
            continue
        with warnings.catch_warnings(action="ignore"):  # escape sequences in its docstrings
            tree = ast.parse(Path(path).read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.setdefault(node.attr, set()).add(name)
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
                attribute = node.args[1].value if isinstance(node.args[1], ast.Constant) else None
                found.setdefault(str(attribute), set()).add(name)
    return found


def test_what_is_passed_on_is_read_and_what_nothing_reads_is_refused() -> None:
    read = readers()
    # Megatron puts the names of these together.
    by_prefix = {name for name in ROWS if name.startswith("muon_")} | {"moe_deepep_num_sms", "moe_hybridep_num_sms"}
    passed = {name for name, rules in ROWS.items() for rule in rules if rule.fate is Fate.PASSED_ON}
    assert sorted(name for name in passed - by_prefix if name not in read) == []
    unread = {name for name, rules in ROWS.items() if any("nothing in Megatron" in rule.says for rule in rules)}
    assert unread
    assert sorted(name for name in unread if name in read) == []


def test_every_refusal_says_what_to_do() -> None:
    remedy = re.compile(r"leave it out|; (use|give|install|add)\b|give one of them")
    assert [rule.says for rule in TABLE if rule.fate is Fate.REFUSED and not remedy.search(rule.says)] == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        # Ignored in runs with a plan.
        ("--plan p --split 99,1,0", r"^--split 99,1,0 with --plan: the plan says which documents"),
        (
            "--plan p --data-cache-path c --num-dataset-builder-threads 4",
            "^--data-cache-path c, --num-dataset-builder-th",
        ),
        ("--plan p --per-dataset-sequences-path f", "^--per-dataset-sequences-path f with --plan"),
        ("--plan p --data-path a", "^--data-path a with --plan: both name the data"),
        ("--plan p --no-mmap-bin-files", "^--no-mmap-bin-files with --plan"),
        ("--plan p --mock-data", "^--mock-data with --plan: both name the data"),
        ("--plan p --multiple-validation-sets", "^--multiple-validation-sets with --plan: each evaluation tells"),
        ("--plan p --tokenizer-model t", "^--tokenizer-model t without --tokenizer-type: nothing reads it then; give"),
        # Of other programs, with a plan and without.
        ("--plan p --sft", "^--sft: conversations and their masks are not supported"),
        ("--plan p --fim-data --fim-rate 0.9", "^--fim-data, --fim-rate 0.9: no text is cut"),
        ("--dataloader-inter-document-masking", "^--dataloader-inter-document-masking: batches of packed documents"),
        ("--inprocess-restart", "^--inprocess-restart: a run is not restarted inside its process"),
        ("--perform-rl-step", "^--perform-rl-step: reinforcement learning is another program"),
        ("--img-h 32 --mask-prob 0.3", "--mask-prob 0.3: .*BERT.*; --img-h 32: .*image models"),
        ("--inference-max-requests 4", "^--inference-max-requests 4: it is read by Megatron's inference alone"),
        # Read only where another one is given.
        ("--hysteresis 1", "^--hysteresis 1 without --fp16: nothing reads it then; give --fp16 too, or leave it out$"),
        ("--muon-momentum 0.5", "^--muon-momentum 0.5 without --optimizer muon"),
        ("--wandb-exp-name x", "^--wandb-exp-name x without --wandb-project"),
        ("--tensorboard-log-interval 5", "^--tensorboard-log-interval 5 without --tensorboard-dir"),
        ("--save s --async-save", "^--async-save without --use-persistent-ckpt-worker: Megatron saves synchronously"),
        ("--no-pad-vocab-size", "^--no-pad-vocab-size without --padded-vocab-size: Megatron knows no number of rows"),
        ("--num-experts 1", "^--num-experts 1 below --moe-router-topk: each token goes to more experts than there are"),
        ("--ckpt-convert-save d", "^--ckpt-convert-save d without --ckpt-convert-format: nothing is converted then"),
        ("--num-experts 4 --moe-ncclep-zero-copy", "^--moe-ncclep-zero-copy without --moe-token-dispatcher-type flex"),
        ("--fake-process-group", "^--fake-process-group: its processes send each other nothing"),
        (
            "--no-initialization",
            "^--no-initialization without --load and --pretrained-checkpoint: the weights would be",
        ),
        ("--use-mup --mup-width-mult 2", "^--mup-width-mult 2.0: Megatron computes it; leave it out, or give --hidden"),
        # Which end in a traceback of Megatron's.
        (
            "--save s --non-persistent-save-interval 2",
            "^--non-persistent-save-interval 2 without --non-persistent-ckpt",
        ),
        ("--save s --save-dgrads-interval 2", "^--save-dgrads-interval 2 without the package transformer_engine"),
        # Read by nothing.
        ("--exit-signal-handler-for-dataloader", "^--exit-signal-handler-for-dataloader: nothing in Megatron 0.19"),
        (
            "--rampup-batch-size 4 4 100",
            "^--rampup-batch-size .*: this Megatron ignores it.*--step-batch-size-schedule",
        ),
    ],
)
def test_a_flag_without_effect_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, words: str, told: str) -> None:
    monkeypatch.setattr("sys.argv", ["pretrain", *words.split()])
    with pytest.raises(ConfigError, match=told):
        parse({})


@pytest.mark.parametrize(
    "words",
    [
        "--data-path a --split 99,1,0 --data-cache-path c --num-dataset-builder-threads 4",
        "--fp16 --hysteresis 1 --initial-loss-scale 1024",
        "--optimizer muon --muon-momentum 0.5",
        "--use-mcore-models --use-dist-ckpt --ckpt-fully-parallel-save",
        "--tokenizer-type HuggingFaceTokenizer --tokenizer-model t",
        "--plan p --null-tokenizer-eod-id 5",
        "--tensorboard-dir t --tensorboard-log-interval 5",
    ],
)
def test_what_has_an_effect_is_taken(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    monkeypatch.setattr("sys.argv", ["pretrain", *words.split()])
    parse({})
