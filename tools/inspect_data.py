#!/usr/bin/env python3
"""What shards hold and whether they are whole, or what a sample of a plan is, decoded. Changes nothing."""

import sys

from megatron_kaiyuan.commands.inspect import main
from megatron_kaiyuan.host.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(main))
