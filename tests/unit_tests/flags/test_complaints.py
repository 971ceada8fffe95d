"""What Megatron's own checks find is one sentence with the flags at fault and their values, whatever it raised.

The checks are Megatron's real ones: none of them is named anywhere but here.
"""

from pathlib import Path

import pytest
from megatron.training import checkpointing
from megatron.training.arguments import parse_args, validate_args

from megatron_kaiyuan.arguments import arguments_provider
from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.flags.complaints import megatron_checks, no_silent_end
from megatron_kaiyuan.training.parsing import known_flags, parse

GOOD = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 32 --max-position-embeddings 32 "
    "--micro-batch-size 2 --global-batch-size 4 --train-iters 5 --lr 1e-3 --eval-interval 5 --transformer-impl local "
    "--no-persist-layer-norm --no-rope-fusion"
)


def check(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    monkeypatch.setattr("sys.argv", ["pretrain", *GOOD.split(), *words.split()])
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    with megatron_checks(known_flags()):
        validate_args(parse_args(arguments_provider({})))


def test_what_megatron_accepts_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch, "")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        # An assertion with a message, below a condition that was given.
        ("--train-samples 9", r"^--train-samples 9, --train-iters 5: expected iteration-based training \("),
        # Without a message.
        ("--min-lr 1", r"^--min-lr 1.0, --lr 0.001: Megatron requires --min-lr <= --lr \(.*arguments.py line \d+"),
        ("--fp16 --bf16", r"^--bf16, --fp16: Megatron requires not --bf16 "),
        ("--micro-batch-size 0", r"--micro-batch-size 0: Megatron requires --micro-batch-size > 0 "),
        # About a value that Megatron computed from what was given.
        ("--global-batch-size 3", r"^--global-batch-size 3, --micro-batch-size 2: .*must be divisible"),
        ("--tensor-model-parallel-size 2", r"^--tensor-model-parallel-size 2: world size \(1\) is not divisible"),
        # Something that was not given.
        ("--expert-model-parallel-size 2", r"^--num-experts \(not given\), --expert-model-parallel-size 2: "),
        # A flag that is off unless it is given, and on unless it is given.
        ("--fp32-residual-connection", r"^--fp16 \(not given\), --bf16 \(not given\), --fp32-residual-connection: "),
        ("--cuda-graph-impl full_iteration", r"^--no-check-for-nan-in-loss-and-grad \(not given\), --cuda-graph-impl"),
        # Not an assertion: a RuntimeError, a ValueError of int(), an assertion that fails to compute.
        ("--no-position-embedding", r"^--no-position-embedding.*: --no-position-embedding is deprecated, use"),
        ("--phase-transition-iterations a,b", r"^--phase-transition-iterations a,b: invalid literal for int\(\)"),
        ("--attention-backend local", r"--attention-backend local: --attention-backend local is only supported with"),
        # A missing package.
        ("--enable-msc", r"^--enable-msc: .*multistorageclient package is not installed"),
        # A line and exit code 0.
        ("--checkpoint-activations", r"^--checkpoint-activations: --checkpoint-activations is no longer valid"),
    ],
)
def test_a_mistake_is_one_sentence_with_flags_values_and_a_remedy(
    monkeypatch: pytest.MonkeyPatch, words: str, told: str
) -> None:
    with pytest.raises(ConfigError, match=told) as refused:
        check(monkeypatch, words)
    assert "\n" not in str(refused.value)
    assert str(refused.value).endswith("or leave it out")


def test_an_exit_with_code_0_in_the_midst_of_megatron_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its reader of the tracker prints a line and leaves, in the job of every rank."""
    monkeypatch.setenv("RANK", "0")
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("thr")
    with pytest.raises(ConfigError, match=r"ERROR: Invalid metadata file .*checkpointing.py line"), no_silent_end({}):
        checkpointing.read_metadata(str(tracker))
    with pytest.raises(SystemExit), no_silent_end({}, may_end=("read_metadata",)):
        checkpointing.read_metadata(str(tracker))


def test_a_flag_that_cannot_be_parsed_keeps_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        check(monkeypatch, "--micro-bath-size 2")
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "unrecognized arguments: --micro-bath-size 2" in told
    assert len(told.splitlines()) < 5


def test_the_help_is_no_mistake(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        check(monkeypatch, "--help")
    assert ended.value.code == 0
    assert "--tensor-model-parallel-size" in capsys.readouterr().out


def test_a_file_that_replaces_the_command_line_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["pretrain", "--plan", "plan.yaml", "--yaml-cfg=config.yaml"])
    with pytest.raises(ConfigError, match="--yaml-cfg replaces the whole command line"):
        parse({})
