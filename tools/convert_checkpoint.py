#!/usr/bin/env python3
"""Convert a checkpoint to Hugging Face's layout, or back.

It works on the CPU, in one process, one layer at a time.
"""

import sys

from megatron_kaiyuan.commands.convert import main
from megatron_kaiyuan.host.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(main))
