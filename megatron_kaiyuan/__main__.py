"""`python -m megatron_kaiyuan VERB ...`: the command `kaiyuan` where its script is not on the path."""

import sys

from megatron_kaiyuan.commands.kaiyuan import main

if __name__ == "__main__":
    sys.exit(main())
