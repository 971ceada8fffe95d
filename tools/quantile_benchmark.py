#!/usr/bin/env python3
"""Quantile data benchmarking: which slice of which dataset is worth training on."""

import sys

from megatron_kaiyuan.commands.quantile import main
from megatron_kaiyuan.host.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(main))
