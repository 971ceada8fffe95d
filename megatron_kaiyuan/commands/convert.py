"""Convert a checkpoint to Hugging Face's layout, or back.

It works on the CPU, in one process, one layer at a time.
"""

import argparse
import re
from pathlib import Path
from typing import Any

from megatron_kaiyuan.host import cpu_platform
from megatron_kaiyuan.host.cli import CommandParser, say
from megatron_kaiyuan.host.terminal import counted

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
_LAYOUTS = ("auto", "kaiyuan", "llama", "qwen2", "qwen3", "gemma3")
_DTYPES = ("float32", "float16", "bfloat16")


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+)\s*(KB|MB|GB)", text.strip().upper())
    if match is None or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 5GB or 500MB")
    return int(match[1]) * _UNITS[match[2]]


def build_parser() -> argparse.ArgumentParser:
    """Command line of the tool."""
    parser = CommandParser(
        description="Convert a torch_dist checkpoint to a model folder of Hugging Face transformers, or back. Any "
        "parallel layout, averages too; on the CPU, with the memory of one layer. docs/convert.md has examples."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{export,import}")
    export = commands.add_parser("export", help="torch_dist checkpoint to Hugging Face")
    export.add_argument(
        "source", type=Path, metavar="CHECKPOINT", help="iter_* folder, or save directory (its latest checkpoint)"
    )
    export.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="the run's tokenizer, to put beside: a folder or file with tokenizer.json, or a SentencePiece .model or "
        "TikTokenizer ranks, which are converted",
    )
    export.add_argument(
        "--layout",
        choices=_LAYOUTS,
        default="auto",
        help="auto (default): the layout of transformers that computes the model exactly, so that every engine runs it "
        "(llama, qwen2, qwen3), or else our own with its code; gemma3, on request, is exact in FP32 and rounded in "
        "16 bits",
    )
    export.add_argument("--dtype", choices=_DTYPES, help="dtype of the exported weights (default: as stored)")
    export.add_argument(
        "--no-check",
        action="store_true",
        help="do not load the result and run ids through it; the check needs the memory of the whole model",
    )
    export.add_argument(
        "--max-shard-size", type=_size, default="5GB", metavar="SIZE", help="largest safetensors file (default 5GB)"
    )
    back = commands.add_parser("import", help="Hugging Face model folder to torch_dist checkpoint")
    back.add_argument("source", type=Path, metavar="MODEL", help="folder with config.json and safetensors")
    back.add_argument(
        "--iteration", type=int, metavar="N", help="number of the checkpoint (default: that it was exported from, or 1)"
    )
    for command in (export, back):
        command.add_argument("--output", required=True, type=Path, metavar="DIR", help="where to write; must be new")
    return parser


def main() -> None:
    """Run the tool."""
    options = build_parser().parse_args()
    cpu_platform.install()
    if options.command == "export":
        _export(options)
    else:
        _import(options)


def _export(options: argparse.Namespace) -> None:
    import torch

    from megatron_kaiyuan.checkpoints.recovery import open_intact_checkpoint
    from megatron_kaiyuan.commands.verifying import shown_on
    from megatron_kaiyuan.export.to_hugging_face import export_checkpoint
    from megatron_kaiyuan.reporting.progress import ConsoleMeter

    with ConsoleMeter() as meter:
        checkpoint = open_intact_checkpoint(options.source, shown_on(meter))
        meter.start("exporting", checkpoint.num_bytes)
        exported = export_checkpoint(
            checkpoint,
            options.output,
            tokenizer=options.tokenizer,
            layout=options.layout,
            dtype=getattr(torch, options.dtype) if options.dtype else None,
            check=not options.no_check,
            max_file_bytes=options.max_shard_size,
            progress=meter.advance,
        )
    _print_model(options.output, exported.layout.architecture)
    code = "; loads with trust_remote_code=True" if exported.layout.has_code else "; loads without trust_remote_code"
    say(f"layout {exported.layout.name}, {exported.dtype}{code}")
    if exported.largest is not None:
        of = f", of {torch.finfo(exported.dtype).max:.6g}" if exported.dtype == torch.float16 else ""
        say(f"checked on a text: largest activation {exported.largest.value:.4g}{of} ({exported.largest.module})")


def _import(options: argparse.Namespace) -> None:
    from megatron_kaiyuan.export.from_hugging_face import import_model
    from megatron_kaiyuan.reporting.progress import ConsoleMeter

    with ConsoleMeter() as meter:
        meter.start("importing", sum(path.stat().st_size for path in options.source.glob("*.safetensors")))
        model = import_model(options.source, options.output, iteration=options.iteration, progress=meter.advance)
    _print_model(options.output, model)


def _print_model(output: Path, model: Any) -> None:
    cap = f"soft-cap {model.logit_softcap:g}" if model.logit_softcap else "no soft-cap"
    say(
        f"{output}: {counted(model.num_layers, 'layer')}, hidden size {model.hidden_size}, {model.padded_vocab_size:,} "
        f"token ids, {cap}"
    )
