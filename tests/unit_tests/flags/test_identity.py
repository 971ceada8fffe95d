"""What a model is, is decided for every architecture flag, so that none can be lost on the way to another run."""

from collections import Counter
from dataclasses import fields

from megatron_kaiyuan.flags.architecture import ARCHITECTURE
from megatron_kaiyuan.flags.identity import COMPUTATION, FUNCTION, RECIPE, WEIGHTS
from megatron_kaiyuan.flags.rules import ALWAYS, Fate, flag_of
from megatron_kaiyuan.training.parsing import known_flags

LISTED = (*WEIGHTS, *FUNCTION, *RECIPE, *COMPUTATION)


def test_every_option_of_a_model_stands_in_one_list() -> None:
    from megatron_kaiyuan.model.config import ARGUMENT_PREFIX, KaiyuanModelOptions

    refused = {
        name for rule in ARCHITECTURE if rule.fate is Fate.REFUSED and rule.where is ALWAYS for name in rule.names
    }
    wanted = {name for rule in ARCHITECTURE for name in rule.names} - refused
    wanted |= {ARGUMENT_PREFIX + option.name for option in fields(KaiyuanModelOptions)}
    assert wanted - set(LISTED) == set()
    assert {name: count for name, count in Counter(LISTED).items() if count > 1} == {}
    assert set(LISTED) - known_flags().keys() == set()


def test_options_of_a_model_are_spelled_as_the_parser_spells_them() -> None:
    flags = known_flags()
    assert {
        name: flag_of(name) for name in (*WEIGHTS, *FUNCTION, *RECIPE) if flag_of(name) not in flags[name].flags
    } == {}
