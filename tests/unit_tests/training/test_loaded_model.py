"""Starts from a checkpoint: the model is the checkpoint's, however little of it the command line repeats."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.functional_tests.training_run import MODEL_FLAGS, TRAINING_FLAGS, train_well, write_corpus
from tests.helpers import run_distributed

FEATURES = ("qk_layernorm", "kaiyuan_sandwich_norm", "kaiyuan_logit_softcap", "swiglu", "hidden_dropout", "num_layers")
SAVED = [True, True, 30.0, True, 0.0, 2]
LATER = "--kaiyuan-raise-branch-scale-below 8 --kaiyuan-branch-scale-bits 6 --fp16"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan, a run of one step, and the same run as stock Megatron would have saved it."""
    folder = tmp_path_factory.mktemp("runs")
    plan = ("--plan", str(write_corpus(folder)))
    once = ("--exit-interval", "1", "--save-interval", "1")
    train_well(folder, *plan, *once, "--save", "saved", *LATER.split())
    train_well(folder, *plan, *once, "--save", "legacy", "--ckpt-format", "torch")
    return folder


def starts(_rank: int, folder: Path, command_lines: list[str]) -> dict[str, Any]:
    """What each command line becomes: the model's options, or the complaint."""
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
    from megatron.training import global_vars

    from megatron_kaiyuan.errors import KaiyuanError
    from megatron_kaiyuan.training import launch

    torch.distributed.destroy_process_group()
    found: dict[str, Any] = {}
    for words in command_lines:
        sys.argv = ["pretrain", "--plan", str(folder / "plan.yaml"), *TRAINING_FLAGS, *words.format(folder).split()]
        try:
            args, *_ = launch._configure()
            found[words] = [getattr(args, name) for name in FEATURES] + [
                args.kaiyuan_branch_scale_bits,
                args.padded_vocab_size,
            ]
        except KaiyuanError as error:
            found[words] = f"{type(error).__name__}: {error}"
        global_vars.destroy_global_vars()
        unset_num_microbatches_calculator()
    torch.distributed.init_process_group("gloo")
    return found


SHORT = "--vocab-size 96"
WHOLE = " ".join(MODEL_FLAGS)
LOAD = "--load {}/saved"
TAKEN: dict[str, list[Any]] = {
    f"{LOAD} {SHORT}": [*SAVED, 6, 96],
    f"{LOAD} --finetune {SHORT}": [*SAVED, 6, 96],
    f"{LOAD} --use-checkpoint-args {SHORT}": [*SAVED, 6, 96],
    f"{LOAD} --finetune --use-checkpoint-args {SHORT}": [*SAVED, 6, 96],
    f"--pretrained-checkpoint {{}}/saved {SHORT}": [*SAVED, 6, 96],
    # What --load will hold is read from --pretrained-checkpoint until then.
    f"--load {{0}}/new --exit-on-missing-checkpoint --pretrained-checkpoint {{0}}/saved {SHORT}": [*SAVED, 6, 96],
    "--load {}/legacy " + f"--ckpt-format torch --finetune {SHORT}": [*SAVED, 0, 96],
    f"{LOAD} {WHOLE}": [*SAVED, 6, 96],
    # What only says how to train may be changed.
    f"{LOAD} {SHORT} --hidden-dropout 0.2": [*SAVED[:4], 0.2, 2, 6, 96],
    # The branch scale that the run had reached stays, where it may rise.
    f"{LOAD} {SHORT} --fp16 --kaiyuan-raise-branch-scale-below 8 --kaiyuan-branch-scale-bits 2": [*SAVED, 6, 96],
    f"{LOAD} --finetune {SHORT} --fp16 --kaiyuan-branch-scale-bits 2": [*SAVED, 6, 96],
    f"{LOAD} --finetune {SHORT} --kaiyuan-raise-branch-scale-below 0 --kaiyuan-branch-scale-bits 2": [*SAVED, 2, 96],
    # A new run may change the function.
    f"{LOAD} --finetune {SHORT} --kaiyuan-logit-softcap 0": [True, True, 0.0, True, 0.0, 2, 6, 96],
}
REFUSED = {
    f"{LOAD} {SHORT} --kaiyuan-logit-softcap 50": "--kaiyuan-logit-softcap was 30.0 and is now 50.0",
    f"{LOAD} {SHORT} --num-layers 4": "--num-layers was 2 and is now 4",
    f"{LOAD} {SHORT} --no-kaiyuan-sandwich-norm": "--kaiyuan-sandwich-norm was True and is now False",
    f"{LOAD} --finetune {SHORT} --num-layers 4": "--num-layers was 2 and is now 4, but the weights come from",
    f"{LOAD} --finetune {SHORT} --make-vocab-size-divisible-by 64": "--padded-vocab-size was 96 and is now 128, but",
    f"{LOAD} --use-checkpoint-args {SHORT} --rotary-base 5": "--rotary-base 5 (there 10000): --use-check",
    f"{LOAD} --use-checkpoint-args {SHORT} --hidden-dropout 0.2": "--hidden-dropout 0.2 (there 0.0): --use",
    f"{LOAD} --finetune {SHORT} --moe-router-topk 3": "--moe-router-topk 3 without --num-experts",
    SHORT: "--num-layers, --hidden-size, --num-attention-heads: not given",
}


@pytest.fixture(scope="module")
def started(folder: Path) -> dict[str, Any]:
    [found] = run_distributed(starts, 1, folder, [*TAKEN, *REFUSED], timeout=300)
    return dict(found)


@pytest.mark.parametrize("words", TAKEN)
def test_the_model_is_that_of_the_checkpoint(words: str, started: dict[str, Any]) -> None:
    assert started[words] == TAKEN[words]


@pytest.mark.parametrize("words", REFUSED)
def test_another_model_is_refused_by_name(words: str, started: dict[str, Any]) -> None:
    assert REFUSED[words] in started[words]
