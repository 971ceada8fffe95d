#!/usr/bin/env python3
"""Average the weights of several checkpoints of one run, on the CPU and in one process."""

import sys

from megatron_kaiyuan.commands.average import main
from megatron_kaiyuan.host.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(main))
