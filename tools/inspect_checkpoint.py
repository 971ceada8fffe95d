#!/usr/bin/env python3
"""Say what a checkpoint is, and whether its files are as they were saved."""

import sys

from megatron_kaiyuan.commands.inspect_checkpoint import main
from megatron_kaiyuan.host.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(main))
