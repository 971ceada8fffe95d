"""Continue prompts with the model of a checkpoint."""

import argparse
import sys
from pathlib import Path

from megatron_kaiyuan.host.cli import CommandParser, say
from megatron_kaiyuan.host.devices import start_device
from megatron_kaiyuan.host.quiet import quiet_megatron_import


def build_parser() -> argparse.ArgumentParser:
    """Command line of the tool."""
    parser = CommandParser(description="Continue prompts with the model of a checkpoint, in one process.")
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="iter_* folder, or save directory (its latest)"
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        type=Path,
        metavar="PATH",
        help="the run's tokenizer: a folder or file with tokenizer.json, a SentencePiece .model, or TikTokenizer ranks",
    )
    parser.add_argument("--prompt", required=True, nargs="+", metavar="TEXT", help="one or several texts to continue")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="longest continuation (default 64)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 = greedy (default 0.8)")
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="draw among the K likeliest; 0 = all (default)"
    )
    parser.add_argument("--seed", type=int, default=1234, metavar="N", help="same seed, same text (default 1234)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the texts there as well")
    return parser


def main() -> None:
    """Run the tool."""
    options = build_parser().parse_args()
    say(start_device(), file=sys.stderr)
    from megatron_kaiyuan.checkpoints.recovery import open_intact_checkpoint
    from megatron_kaiyuan.checkpoints.tokenizer import tokenizer_of_checkpoint
    from megatron_kaiyuan.commands.verifying import shown_on
    from megatron_kaiyuan.evaluation.generation import Sampling, continue_text
    from megatron_kaiyuan.reporting.progress import ConsoleMeter

    with quiet_megatron_import():
        from megatron_kaiyuan.evaluation.loading import load_model

    sampling = Sampling(
        temperature=options.temperature, top_k=options.top_k, max_new_tokens=options.max_new_tokens, seed=options.seed
    )
    with ConsoleMeter() as meter:
        checkpoint = open_intact_checkpoint(options.checkpoint, shown_on(meter))
    tokenizer = tokenizer_of_checkpoint(options.tokenizer, checkpoint.arguments)
    model, positions = load_model(checkpoint)
    texts = [prompt + continue_text(model, tokenizer, prompt, sampling, positions) for prompt in options.prompt]
    separated = f"\n{'-' * 40}\n".join(texts) + "\n"
    say(separated)
    if options.output:
        options.output.write_text(separated, encoding="utf-8")
