#!/usr/bin/env python3
"""Build or verify the rank index of a source: its documents in ascending quality, memory-mapped by every later run."""

import sys

from megatron_kaiyuan.commands.rank import main
from megatron_kaiyuan.host.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(main))
