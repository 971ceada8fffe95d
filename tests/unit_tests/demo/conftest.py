"""The demo is a script with modules beside it; its tests find them as the script does."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "demo"))
