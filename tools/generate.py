#!/usr/bin/env python3
"""Continue prompts with the model of a checkpoint."""

import sys

from megatron_kaiyuan.commands.generate import main
from megatron_kaiyuan.host.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(main))
