#!/usr/bin/env python3
"""Make a release of a run: weights, tokenizer, licence, model card, data card, and how to make the model again."""

import sys

from megatron_kaiyuan.commands.release import main
from megatron_kaiyuan.host.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(main))
