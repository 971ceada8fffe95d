"""The whole table: the fate of every flag of Megatron's parser and of ours."""

from megatron_kaiyuan.flags.architecture import ARCHITECTURE
from megatron_kaiyuan.flags.data import DATA
from megatron_kaiyuan.flags.elsewhere import ELSEWHERE
from megatron_kaiyuan.flags.machines import MACHINES
from megatron_kaiyuan.flags.ours import OURS
from megatron_kaiyuan.flags.rules import Rule
from megatron_kaiyuan.flags.training import TRAINING

__all__ = ["TABLE"]

TABLE: tuple[Rule, ...] = (*ARCHITECTURE, *DATA, *TRAINING, *MACHINES, *ELSEWHERE, *OURS)
