#!/usr/bin/env python3
"""Held-out loss of checkpoints by source and quantile band of a plan, and their scores on tasks of lm-eval."""

import sys

from megatron_kaiyuan.commands.evaluate import main
from megatron_kaiyuan.host.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(main))
