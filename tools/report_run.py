#!/usr/bin/env python3
"""What happened in a training run, as one HTML page: loss, data, FP16 and throughput. Several runs are compared."""

import sys

from megatron_kaiyuan.commands.report import main
from megatron_kaiyuan.host.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(main))
