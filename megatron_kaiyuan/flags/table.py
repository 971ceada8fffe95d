"""The whole table: every flag of Megatron's parser that somebody has decided on."""

from megatron_kaiyuan.flags.architecture import ARCHITECTURE
from megatron_kaiyuan.flags.rules import Rule

__all__ = ["TABLE"]

TABLE: tuple[Rule, ...] = (*ARCHITECTURE,)
