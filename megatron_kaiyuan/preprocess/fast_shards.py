"""What becomes of a folder in which gigatoken is found to give other ids than the reference.

The checks of fast_tokenize.py see samples, so a difference may be found after shards were finished. Their manifests
tell who made them (`tokenized_by`); those of gigatoken are taken away, those of other tasks too, and a file in the
folder tells every later start to use the reference. A task that was at work meanwhile finds it after its next shard.
"""

import importlib.metadata
import json
from pathlib import Path

from megatron_kaiyuan.errors import TokenizerError
from megatron_kaiyuan.host.atomic import write_text_atomically
from megatron_kaiyuan.preprocess.build_record import BuildRecord
from megatron_kaiyuan.preprocess.fast_tokenize import TokenizersDiffer
from megatron_kaiyuan.preprocess.shard_state import retire
from megatron_kaiyuan.shards.manifest import TokenizerRecord

__all__ = ["DIFFERENCE_FILE", "FastShards", "gigatoken_name", "named"]

DIFFERENCE_FILE = "gigatoken_differs.json"
_MOST_NAMED = 8


def gigatoken_name() -> str:
    """`gigatoken <version>`, as manifests have it."""
    return f"gigatoken {importlib.metadata.version('gigatoken')}"


class FastShards:
    """The shards of one build that gigatoken made.

    Args:
        folder: Of the shards; None for a single one, which gets its final name only when all of it was checked.
        record: The build.
        tokenizer: Its tokenizer.
    """

    def __init__(self, folder: Path | None, record: BuildRecord, tokenizer: TokenizerRecord) -> None:
        self._folder = folder
        self._record = record
        self._fingerprint = tokenizer.fingerprint

    def known_difference(self) -> str | None:
        """What some task found; None where nothing was, or for another tokenizer."""
        if self._folder is None:
            return None
        try:
            told = json.loads((self._folder / DIFFERENCE_FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return str(told["found"]) if told["tokenizer"] == self._fingerprint else None

    def check(self) -> None:
        """Raise TokenizersDiffer where another task found a difference meanwhile; asked after a shard has its name."""
        if found := self.known_difference():
            raise TokenizersDiffer(found)

    def withdraw(self) -> list[str]:
        """Take the shards away; their names."""
        if self._folder is None:
            return []
        prefixes = self._record.builds(self._folder)
        return [Path(prefix).name for prefix in prefixes if retire(prefix, lambda made: made.tokenized_by is None)]

    def condemn(self, found: str) -> list[str]:
        """Remember the difference, then take the shards away, so that none that is finished later is missed."""
        if self._folder is not None:
            told = {"found": found, "tokenizer": self._fingerprint}
            write_text_atomically(self._folder / DIFFERENCE_FILE, json.dumps(told) + "\n")
        return self.withdraw()

    def stopped_by(self, difference: TokenizersDiffer) -> TokenizerError:
        """What to tell when a difference was found during a run."""
        gone = self.condemn(str(difference))
        if self._folder is None:
            return TokenizerError(f"{difference}; run again with --tokenizer-backend reference")
        return TokenizerError(
            f"{difference}; {named(gone)} taken away, because gigatoken had made them; run the same command again, "
            f"every task of it: it uses the reference now ({self._folder / DIFFERENCE_FILE} says why)"
        )


def named(shards: list[str]) -> str:
    """`2 shards (a, b) were`."""
    more = f", and {len(shards) - _MOST_NAMED} more" if len(shards) > _MOST_NAMED else ""
    return f"{len(shards)} shards ({', '.join(shards[:_MOST_NAMED])}{more}) were" if shards else "no shards were"
