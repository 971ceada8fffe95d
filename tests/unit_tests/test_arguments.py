"""Our flags are one group beside Megatron's, and leave its command lines as they were."""

import argparse
import dataclasses

import pytest

from megatron_kaiyuan.arguments import (
    add_kaiyuan_arguments,
    arguments_provider,
    check_required_arguments,
    check_save_arguments,
)
from megatron_kaiyuan.errors import ConfigError


def parse(*words: str) -> argparse.Namespace:
    return add_kaiyuan_arguments(argparse.ArgumentParser()).parse_args(words)


def test_there_is_one_flag_for_each_model_option_with_the_same_default() -> None:
    from megatron_kaiyuan.model.config import KaiyuanModelOptions, model_options_from_args

    of_the_run = {"metrics", "activation_interval", "max_skipped_steps", "keep_checkpoints", "evaluate_average"}
    flags = {name.removeprefix("kaiyuan_") for name in vars(parse()) if name.startswith("kaiyuan_")}
    assert flags - of_the_run == {field.name for field in dataclasses.fields(KaiyuanModelOptions)}
    assert model_options_from_args(parse()) == KaiyuanModelOptions()


def test_the_flags_reach_the_model_options() -> None:
    from megatron_kaiyuan.model.config import KaiyuanModelOptions, model_options_from_args

    words = "--kaiyuan-sandwich-norm --kaiyuan-post-norm-gain-init 0.5 --kaiyuan-post-norm-depth-scaled"
    words += " --kaiyuan-logit-softcap 30 --kaiyuan-z-loss 1e-4 --kaiyuan-attention unfused"
    assert model_options_from_args(parse(*words.split())) == KaiyuanModelOptions(
        sandwich_norm=True,
        post_norm_gain_init=0.5,
        post_norm_depth_scaled=True,
        logit_softcap=30.0,
        z_loss=1e-4,
        attention="unfused",
    )
    with pytest.raises(ConfigError, match="--kaiyuan-logit-softcap"):
        model_options_from_args(parse("--kaiyuan-logit-softcap", "-1"))


def test_no_flag_repeats_one_of_megatrons(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.training.arguments import parse_args

    monkeypatch.setattr("sys.argv", ["pretrain", "--plan", "plan.yaml"])
    stock, ours = vars(parse_args(ignore_unknown_args=True)), vars(parse_args(add_kaiyuan_arguments))
    assert ours["plan"] == "plan.yaml"
    assert {name for name in ours if name not in stock} == set(vars(parse()))
    assert all(ours[name] == value for name, value in stock.items())


def test_help_is_printed_though_megatron_has_a_bare_percent_sign(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron.training.arguments import parse_args

    monkeypatch.setattr("sys.argv", ["pretrain", "--help"])
    with pytest.raises(SystemExit) as ended:
        parse_args(arguments_provider({}))
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert "--kaiyuan-sandwich-norm" in told
    assert "%%" not in told


NEEDED = ("--micro-batch-size", "--num-layers", "--hidden-size", "--num-attention-heads", "--lr", "--train-iters")
LENGTH = "--lr 1e-3 --train-iters 9"


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        ("", NEEDED),
        (f"--num-layers 2 --hidden-size 32 --num-attention-heads 2 {LENGTH}", NEEDED[:1]),
        (f"--micro-batch-size 1 --hidden-size 32 {LENGTH}", ("--num-layers", "--num-attention-heads")),
        (f"--use-checkpoint-args {LENGTH}", NEEDED[:1]),
        (f"--micro-batch-size 1 --use-checkpoint-args {LENGTH}", ()),
        ("--micro-batch-size 1 --use-checkpoint-args --train-samples 9", ("--lr",)),
        ("--micro-batch-size 1 --use-checkpoint-args --lr 1e-3", ("--train-iters",)),
        ("--micro-batch-size 1 --use-checkpoint-args --skip-train", ()),
    ],
)
def test_what_every_run_needs_is_asked_for(
    words: str, missing: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.training.arguments import parse_args

    monkeypatch.setattr("sys.argv", ["pretrain", *words.split()])
    args = parse_args(arguments_provider({}))
    if not missing:
        check_required_arguments(args, {})
        return
    with pytest.raises(ConfigError, match=f"^{', '.join(missing)}: not given"):
        check_required_arguments(args, {})


def test_what_follows_from_a_plan_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.training.arguments import parse_args

    monkeypatch.setattr("sys.argv", ["pretrain", "--micro-batch-size", "1", "--use-checkpoint-args"])
    args = parse_args(arguments_provider({}))
    check_required_arguments(args, {"lr": 0.1, "train_samples": 9})


def test_a_changed_default_gives_way_to_the_command_line() -> None:
    def megatron() -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser()
        parser.add_argument("--distributed-backend", default="nccl")
        return arguments_provider({"distributed_backend": "gloo"})(parser)

    assert megatron().parse_args([]).distributed_backend == "gloo"
    assert megatron().parse_args(["--distributed-backend", "ucc"]).distributed_backend == "ucc"


def test_every_default_of_the_cpu_platform_is_an_argument_of_megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.training.arguments import parse_args

    from megatron_kaiyuan.arguments import defaults_without_optional_kernels
    from megatron_kaiyuan.host.cpu_platform import CPU_ARGUMENT_DEFAULTS

    monkeypatch.setattr("sys.argv", ["pretrain"])
    assert {*CPU_ARGUMENT_DEFAULTS, *defaults_without_optional_kernels()} <= vars(parse_args()).keys()


def test_saving_without_an_interval_is_refused_with_the_remedy() -> None:
    ours = vars(parse())
    with pytest.raises(ConfigError, match="--save-interval 1000"):
        check_save_arguments(argparse.Namespace(**ours, save="runs/first", save_interval=None))
    check_save_arguments(argparse.Namespace(**ours, save="runs/first", save_interval=400))
    check_save_arguments(argparse.Namespace(**ours, save=None, save_interval=None))


@pytest.mark.parametrize("flag", ["--kaiyuan-activation-interval", "--kaiyuan-max-skipped-steps"])
def test_a_negative_interval_of_the_monitor_is_refused(flag: str) -> None:
    with pytest.raises(ConfigError, match=f"{flag} -1 is negative"):
        check_save_arguments(argparse.Namespace(**vars(parse(flag, "-1")), save=None, save_interval=None))
