"""The flags this package adds to Megatron's, in one group, and the defaults it changes. Nothing else knows argparse."""

import argparse
import importlib.util
import re
from collections.abc import Callable, Mapping

from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.kernels.support import cuda_kernels_available

__all__ = [
    "add_kaiyuan_arguments",
    "arguments_provider",
    "check_required_arguments",
    "check_save_arguments",
    "defaults_without_optional_kernels",
]


def add_kaiyuan_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the group `kaiyuan`, whose model options are all off.

    Megatron's own command lines so keep their meaning.
    """
    group = parser.add_argument_group("kaiyuan", "data plan and model options of megatron_kaiyuan")
    group.add_argument(
        "--plan",
        metavar="FILE",
        help="data plan (YAML): phases, curriculum, repetition, held-out documents and learning rate. It replaces "
        "--data-path, --split and the data cache; --seq-length, --train-samples and --lr follow it where they are not "
        "given",
    )
    _add_model_options(group)
    _add_monitor_options(group)
    group.add_argument(
        "--kaiyuan-keep-checkpoints",
        type=int,
        metavar="N",
        help="delete older checkpoints of --save, but for the newest N and those that the plan averages (default: "
        "delete none)",
    )
    group.add_argument(
        "--kaiyuan-evaluate-average",
        nargs="?",
        choices=["end", "always"],
        const="end",
        metavar="WHEN",
        help="end (or no WHEN): after the last step, average the checkpoints that the plan names, into the folder of "
        "--save with -averaged behind it, and evaluate the average on the held-out documents. always: also evaluate "
        "the average of those saved so far when one of them is saved, from the second on",
    )
    return parser


def _add_monitor_options(group: argparse._ArgumentGroup) -> None:
    """Flags of `megatron_kaiyuan.monitoring.monitor`."""
    group.add_argument(
        "--kaiyuan-metrics",
        metavar="FILE",
        help="append a JSON line to FILE at every --log-interval: loss and tokens by source, tokens by quantile band, "
        "loss scale, activations, throughput (default: metrics.jsonl in the folder of --save, if there is one)",
    )
    group.add_argument(
        "--kaiyuan-activation-interval",
        type=int,
        default=100,
        metavar="STEPS",
        help="measure max |activation| of each layer every so many steps (default 100; 0 = never)",
    )
    group.add_argument(
        "--kaiyuan-max-skipped-steps",
        type=int,
        default=50,
        metavar="STEPS",
        help="stop with a diagnosis after so many skipped steps in a row, or among twice as many at the smallest loss "
        "scale (default 50; 0 = never)",
    )


def _add_model_options(group: argparse._ArgumentGroup) -> None:
    """One flag for each field of `megatron_kaiyuan.model.config.KaiyuanModelOptions`, with its default."""
    group.add_argument(
        "--kaiyuan-sandwich-norm",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="RMSNorm on the outputs of attention and MLP as well, inside the residual branch",
    )
    group.add_argument(
        "--kaiyuan-post-norm-gain-init",
        type=float,
        default=1.0,
        metavar="GAIN",
        help="initial gain of those output norms (default 1.0)",
    )
    group.add_argument(
        "--kaiyuan-post-norm-depth-scaled",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="divide that gain by sqrt(--num-layers)",
    )
    group.add_argument(
        "--kaiyuan-branch-scale-bits",
        type=int,
        default=0,
        metavar="K",
        help="compute 2^-K of what attention and MLP output, which their output norm takes back: the same function, "
        "with K bits more room in FP16; needs --kaiyuan-sandwich-norm; 0 (default) = off",
    )
    group.add_argument(
        "--kaiyuan-raise-branch-scale-below",
        type=float,
        default=0.0,
        metavar="HEADROOM",
        help="raise K by itself, up to 8, when at a metered step of a run in FP16 what it scales is less than HEADROOM "
        "times below 65504; a resumed run keeps the K that it had reached; 8 is sensible; 0 (default) = never",
    )
    group.add_argument(
        "--kaiyuan-recompute-swiglu",
        action="store_true",
        help="compute SwiGLU's output again in the backward pass instead of keeping it: the same training bit for bit, "
        "2 bytes x --ffn-hidden-size less a token and layer in 16 bits",
    )
    group.add_argument(
        "--kaiyuan-logit-softcap",
        type=float,
        default=0.0,
        metavar="CAP",
        help="output logits become CAP * tanh(logits / CAP); 0 (default) = off",
    )
    group.add_argument(
        "--kaiyuan-z-loss",
        type=float,
        default=0.0,
        metavar="WEIGHT",
        help="add WEIGHT * logsumexp(logits)^2 to the loss of each token; 0 (default) = off",
    )
    group.add_argument(
        "--kaiyuan-attention",
        choices=["auto", "sdpa", "sdpa-flash", "sdpa-torch-order", "unfused"],
        default="auto",
        help="core attention of --transformer-impl local: torch SDPA, cuDNN's kernel first (auto); the same without "
        "cuDNN, or in torch's own order of kernels; or Megatron's unfused one",
    )
    group.add_argument(
        "--kaiyuan-fusions",
        default="auto",
        metavar="NAMES",
        help="fused kernels for the same mathematics: none, or some of norm,rotary,swiglu,loss joined by commas; auto "
        "(default): all where CUDA and Triton are present",
    )


def arguments_provider(
    platform_defaults: Mapping[str, object],
) -> Callable[[argparse.ArgumentParser], argparse.ArgumentParser]:
    """What Megatron calls with its parser: adds our flags and sets defaults, which flags on the command line override.

    Args:
        platform_defaults: Value by the name argparse stores it under; the names are Megatron's.
    """

    def provide(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        add_kaiyuan_arguments(parser)
        _escape_percent_signs(parser)
        parser.set_defaults(**platform_defaults)
        parser.usage = "%(prog)s --plan PLAN <flags of Megatron and of this package>; --help tells them all"
        return parser

    return provide


def _escape_percent_signs(parser: argparse.ArgumentParser) -> None:
    """Escape a bare `%` in the help of a flag of Megatron 0.19, on which `--help` fails.

    `%(default)s` and `%%` stay.
    """
    for action in parser._actions:
        if action.help and action.help is not argparse.SUPPRESS:
            action.help = re.sub(r"%%|%(?!\()", "%%", action.help)


def defaults_without_optional_kernels() -> dict[str, object]:
    """Defaults of Megatron that assume Transformer Engine or apex, changed where these are not installed."""
    defaults: dict[str, object] = {}
    if not _installed("transformer_engine"):
        defaults.update(transformer_impl="local", no_persist_layer_norm=True, apply_rope_fusion=False)
    if not _installed("fused_weight_gradient_mlp_cuda"):  # the name of apex's extension module
        # `compat.fuse_weight_gradients_without_apex` stands in for it on CUDA.
        defaults["gradient_accumulation_fusion"] = cuda_kernels_available()
    if not _installed("scaled_upper_triang_masked_softmax_cuda"):  # apex too
        defaults["masked_softmax_fusion"] = False
    if not _installed("one_logger"):  # a package of NVIDIA's own network; Megatron points to it at every start
        defaults["enable_one_logger"] = False
    return defaults


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def check_required_arguments(args: argparse.Namespace, open_values: Mapping[str, object]) -> None:
    """Refuse a command line without what every run needs, and say at once all that is missing.

    Args:
        args: Parsed, not yet validated.
        open_values: Values of arguments that the command line leaves open.

    Raises:
        ConfigError: names all that is missing.
    """
    needed = ["--micro-batch-size"]
    if not (args.use_checkpoint_args or args.yaml_cfg or args.hybrid_layer_pattern):
        needed += ["--num-layers", "--hidden-size", "--num-attention-heads"]
    if not args.skip_train:
        needed += ["--lr"]
        if not (args.train_samples or open_values.get("train_samples")):
            needed += ["--train-iters"]
    values = vars(args) | dict(open_values)
    if missing := [flag for flag in needed if values[flag[2:].replace("-", "_")] is None]:
        raise ConfigError(
            f"{', '.join(missing)}: not given; docs/training.md has a whole command, and "
            "examples/pretrain_kaiyuan_2b.sh one for GPUs"
        )


def check_save_arguments(args: argparse.Namespace) -> None:
    """Refuse a run that has a place to save but no interval, or is to report to wandb but lacks its settings.

    Megatron stops at the first with a bare assertion, at the second with a TypeError of the last rank alone.

    Raises:
        ConfigError: `--save` without `--save-interval`, a negative interval of the monitor, or `--wandb-project`
            without what it needs.
    """
    for flag in ("--kaiyuan-activation-interval", "--kaiyuan-max-skipped-steps"):
        value = getattr(args, flag[2:].replace("-", "_"))
        if value < 0:
            raise ConfigError(f"{flag} {value} is negative; 0 switches it off")
    if args.save and not args.save_interval:
        raise ConfigError(
            f"--save {args.save} without --save-interval: say how often, such as --save-interval 1000 (steps); the "
            "end of the run is saved anyway"
        )
    if vars(args).get("wandb_project"):
        _check_wandb_arguments(args)


def _check_wandb_arguments(args: argparse.Namespace) -> None:
    asked = f"--wandb-project {args.wandb_project}"
    if not _installed("wandb"):
        raise ConfigError(f"{asked}, but wandb is not installed: pip install wandb, or leave the flag out")
    if not args.wandb_exp_name:
        raise ConfigError(f"{asked} without --wandb-exp-name: give the run a name, such as --wandb-exp-name first")
    if not (args.save or args.wandb_save_dir):
        raise ConfigError(f"{asked} without a folder for its files: add --wandb-save-dir DIR, or --save DIR")
