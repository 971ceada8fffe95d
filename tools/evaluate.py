#!/usr/bin/env python3
"""Held-out loss of checkpoints, for each source of a plan and each quantile band of its documents."""

import sys

from megatron_kaiyuan.commands.evaluate import main
from megatron_kaiyuan.host.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(main))
