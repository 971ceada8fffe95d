"""Write docs/megatron-flags.md from the table of flags: `.venv/bin/python tools/dev/flag_page.py`."""

import sys
from pathlib import Path

from megatron_kaiyuan.flags.evidence import evidence
from megatron_kaiyuan.flags.page import flag_page
from megatron_kaiyuan.flags.table import TABLE
from megatron_kaiyuan.host import cpu_platform
from megatron_kaiyuan.host.atomic import write_text_atomically
from megatron_kaiyuan.host.quiet import quiet_megatron_import

PAGE = Path(__file__).resolve().parents[2] / "docs/megatron-flags.md"


def main() -> int:
    """Write the page."""
    cpu_platform.install()
    with quiet_megatron_import():
        from megatron_kaiyuan.training.parsing import known_flags
    write_text_atomically(PAGE, flag_page(known_flags(), TABLE, evidence(known_flags())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
