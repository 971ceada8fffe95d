"""The command `kaiyuan VERB ...`: every tool under one name, for those who install the package."""

import sys
from importlib import import_module

from megatron_kaiyuan.host.cli import run_tool, say
from megatron_kaiyuan.host.version import code_version

__all__ = ["VERBS", "main"]

VERBS = {
    "doctor": ("doctor", "say what this machine can do, and what is missing"),
    "preprocess": ("preprocess", "turn JSONL, Parquet and text into shards of tokens with scores"),
    "inspect": ("inspect", "show what shards hold, or what a sample of a plan is"),
    "rank": ("rank", "order the documents of a source by a score"),
    "plan": ("plan", "show what a run will see, how often and in what order, before it runs"),
    "train": ("train", "train by a plan on the GPUs of this machine, or as one node of several"),
    "inspect-checkpoint": ("inspect_checkpoint", "show a checkpoint's step, samples and options; verify its files"),
    "average": ("average", "average checkpoints"),
    "evaluate": ("evaluate", "measure the loss on held-out documents, by source"),
    "generate": ("generate", "continue prompts"),
    "convert": ("convert", "write a model for Hugging Face, or read one from there"),
    "release": ("release", "make a release: weights, cards, and the commands that made them"),
    "quantile": ("quantile", "compare datasets slice by slice with small models"),
    "report": ("report", "write the page of a run"),
}
"""Of each verb: the module of this room whose `main` it calls, and what it does. The order is that of a run."""


def main() -> int:
    """Call the verb of the command line, and return its exit code."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        say(_overview())
        return 0
    if words[0] in ("--version", "-V"):
        say(f"megatron_kaiyuan {code_version()}")
        return 0
    if words[0] not in VERBS:
        say(f"error: kaiyuan has no verb {words[0]!r}; it has {', '.join(VERBS)}", file=sys.stderr)
        return 2
    sys.argv = [f"kaiyuan {words[0]}", *words[1:]]  # argparse names the command after the first
    return run_tool(lambda: import_module(f"megatron_kaiyuan.commands.{VERBS[words[0]][0]}").main())


def _overview() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {what}" for verb, (_, what) in VERBS.items()]
    head = ["usage: kaiyuan VERB ...", "       kaiyuan --version", ""]
    return "\n".join([*head, *lines, "", "kaiyuan VERB --help says what a verb takes."])
