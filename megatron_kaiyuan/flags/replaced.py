"""The refusal of values that Megatron replaces: what was given must be what the run has.

Megatron's validation and its config class overwrite some arguments, mostly without a word. `--mup-width-mult` is
computed from other flags, whatever was given. `--grad-reduce-in-bf16` undoes `--accumulate-allreduce-grads-in-fp32`.
"""

from collections.abc import Iterable, Mapping

from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.flags.spelling import Spelling

__all__ = ["refuse_replaced"]

_PLAIN = (bool, int, float, str)
_TRIVIAL = {
    ("sequence_parallel", False),
    ("no_weight_decay_cond_type", None),
    ("optimizer", "muon"),
    ("use_distributed_optimizer", False),
}
"""Replacements that change nothing: a sequence is not shared among the ranks of a group of one; Megatron writes
`--no-weight-decay-cond-type` as `--apply-wd-to-qk-layernorm`, and muon with a sharded optimizer as other arguments."""


def refuse_replaced(
    names: Iterable[str], given: Mapping[str, object], used: Iterable[object], flags: Mapping[str, Spelling]
) -> None:
    """Refuse flags whose value Megatron has replaced by another one.

    A value that was only written in another way passes: a text as a list, a name as a dtype.

    Args:
        names: Of the arguments that the command line gives.
        given: Their values as parsed.
        used: Objects whose attributes of the same names are what the run takes.
        flags: How the parser spells them.

    Raises:
        ConfigError: names all of them, with both values.
    """
    complaints = [
        f"{flags[name].written(given[name])}: Megatron replaces it by {now} with the other flags of this run; leave it "
        "out, or change what it depends on"
        for name in sorted(names)
        for now in _other_values(name, given, used)
    ]
    if complaints:
        raise ConfigError("; ".join(complaints))


def _other_values(name: str, given: Mapping[str, object], used: Iterable[object]) -> list[object]:
    """Return the first value that is not the one given, if there is one."""
    before = given.get(name)
    values = [getattr(one, name) for one in used if hasattr(one, name)]
    others = [now for now in values if _differs(before, now) and (name, now) not in _TRIVIAL]
    return others[:1]


def _differs(before: object, now: object) -> bool:
    if not isinstance(before, _PLAIN) or not (now is None or isinstance(now, _PLAIN)):
        return False
    if isinstance(before, str) != isinstance(now, str) and now is not None:
        return False  # parsed further
    if now is None and not isinstance(before, str) and before <= 0:
        return False  # a number that stands for none
    return before != now
