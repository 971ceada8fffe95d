"""Named errors for user mistakes.

Every message says what was asked, what is wrong with the values (with the file, field or flag), and what to do.
All of them are raised before any accelerator work starts. `assert` is for our own invariants only.
"""

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ConvertError",
    "DeviceError",
    "KaiyuanError",
    "PlanError",
    "PreprocessError",
    "RankIndexError",
    "ResumeError",
    "SaveError",
    "ScoreError",
    "ShardError",
    "StudyError",
    "TokenizerError",
]


class KaiyuanError(ValueError):
    """Base of every error that a user can cause and mend."""


class _MaybeOfOneRank(KaiyuanError):
    """Base of those that one rank or all of them may come upon.

    Args:
        message: As for every error.
        of_one_rank: The other ranks do not know of it.
    """

    def __init__(self, message: str, *, of_one_rank: bool = False) -> None:
        super().__init__(message)
        self.of_one_rank = of_one_rank


class ConfigError(KaiyuanError):
    """Command-line flags or model options that cannot work together."""


class CheckpointError(KaiyuanError):
    """A checkpoint with a file that is damaged, missing, or names something else than data."""


class ConvertError(KaiyuanError):
    """A checkpoint that cannot be exported or imported: another architecture, or files that do not fit it."""


class DeviceError(KaiyuanError):
    """Error of one rank whose GPU other processes have filled.

    That rank alone knows of it.
    """


class PlanError(KaiyuanError):
    """A plan file with a wrong, missing or unknown field, or one that cannot be met by its sources."""


class ShardError(KaiyuanError):
    """A `.bin`/`.idx` pair that is missing, truncated, of another format version, or inconsistent."""


class SaveError(_MaybeOfOneRank):
    """A checkpoint that cannot be written: the disk is full, or a file of it cannot be opened."""


class ScoreError(KaiyuanError):
    """Quality scores of the wrong length, or with NaN."""


class RankIndexError(KaiyuanError):
    """A rank index that is missing, stale or damaged."""


class PreprocessError(KaiyuanError):
    """Input documents that cannot be turned into shards."""


class TokenizerError(KaiyuanError):
    """A tokenizer that is missing or is not the one the shards were built with."""


class ReleaseError(KaiyuanError):
    """A release cannot be made: a file of it is missing, wrong or of another run."""


class ResumeError(KaiyuanError):
    """A resume whose already consumed samples would differ from those of the saved run."""


class StudyError(KaiyuanError):
    """A quantile study whose file is wrong, whose sources cannot give the slices, or whose results do not compare."""


class MetricsError(KaiyuanError):
    """The file of a run's metrics that cannot be written or read."""


class TrainingStopped(_MaybeOfOneRank):
    """A run that was stopped because going on would waste the machines."""
