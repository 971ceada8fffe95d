#!/usr/bin/env python3
"""Dry run of a plan: what a run will see, how often and in what order. Needs no GPU."""

import sys

from megatron_kaiyuan.commands.plan import main
from megatron_kaiyuan.host.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(main))
