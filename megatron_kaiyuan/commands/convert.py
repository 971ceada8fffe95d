"""Convert a checkpoint to Hugging Face's layout, or back; on the CPU, in one process, one layer at a time."""

import argparse
import re
from pathlib import Path

from megatron_kaiyuan.host import cpu_platform

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+)\s*(KB|MB|GB)", text.strip().upper())
    if match is None or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 5GB or 500MB")
    return int(match[1]) * _UNITS[match[2]]


def build_parser() -> argparse.ArgumentParser:
    """Command line of the tool."""
    parser = argparse.ArgumentParser(
        description="Convert a torch_dist checkpoint to a model folder of Hugging Face transformers, or back. Any "
        "parallel layout, averages too; on the CPU, with the memory of one layer. docs/convert.md has examples."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{export,import}")
    export = commands.add_parser("export", help="torch_dist checkpoint to Hugging Face")
    export.add_argument(
        "source", type=Path, metavar="CHECKPOINT", help="iter_* folder, or save directory (its latest checkpoint)"
    )
    export.add_argument("--tokenizer", type=Path, metavar="DIR", help="Hugging Face tokenizer folder to put beside")
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
    from megatron_kaiyuan.checkpoints.recovery import open_intact_checkpoint
    from megatron_kaiyuan.export.from_hugging_face import import_model
    from megatron_kaiyuan.export.to_hugging_face import export_checkpoint
    from megatron_kaiyuan.reporting.progress import ConsoleMeter

    with ConsoleMeter() as meter:
        if options.command == "export":
            checkpoint = open_intact_checkpoint(options.source)
            meter.start("exporting", checkpoint.num_bytes)
            model = export_checkpoint(
                checkpoint,
                options.output,
                tokenizer=options.tokenizer,
                max_file_bytes=options.max_shard_size,
                progress=meter.advance,
            )
        else:
            meter.start("importing", sum(path.stat().st_size for path in options.source.glob("*.safetensors")))
            model = import_model(options.source, options.output, iteration=options.iteration, progress=meter.advance)
    cap = f"soft-cap {model.logit_softcap:g}" if model.logit_softcap else "no soft-cap"
    print(
        f"{options.output}: {model.num_layers} layers, hidden size {model.hidden_size}, {model.padded_vocab_size:,} "
        f"token ids, {cap}"
    )
