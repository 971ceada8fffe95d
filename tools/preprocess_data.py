#!/usr/bin/env python3
"""Turn JSONL and Parquet documents into Megatron's .bin/.idx shards with score sidecars and a manifest."""

import sys

from megatron_kaiyuan.commands.preprocess import main
from megatron_kaiyuan.host.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(main))
